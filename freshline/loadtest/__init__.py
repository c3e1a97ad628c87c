"""Load on an installation, as many users make it, and what came of it."""
