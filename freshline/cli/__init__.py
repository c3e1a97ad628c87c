"""The ``freshline`` command: one module per group of commands."""
