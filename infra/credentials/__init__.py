"""Authentication by API keys and signed tokens (I7)."""
