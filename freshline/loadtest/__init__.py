"""Load generation against an installation, and its results."""
