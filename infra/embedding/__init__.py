"""Text to vectors: one port, its models, and an in-memory twin."""
