"""Redis: cached answers, event states and versions."""
