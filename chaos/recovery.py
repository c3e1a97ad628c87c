"""Recovery failures."""


class NotRecovered(Exception):
    """The installation did not recover in time. The message names what is missing."""
