"""What it means that an installation did not come back."""


class NotRecovered(Exception):
    """It did not come back in the time it has; the message says what is missing."""
