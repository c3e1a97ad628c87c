"""The processors: document events become searchable passages and dropped answers."""
