"""The command line and its commands; the composition root of all packages."""
