"""The ``freshline`` command, one module for each group of commands."""
