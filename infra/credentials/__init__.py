"""Who asks: API keys and signed tokens, and what they entitle to (I7)."""
