"""The command line, and what is run from it: the composition root of all rooms."""
