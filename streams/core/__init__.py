"""Pure rules of processing."""
