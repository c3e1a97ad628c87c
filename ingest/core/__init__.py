"""Pure functions of acceptance."""
