"""Pure rules of acceptance."""
