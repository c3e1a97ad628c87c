"""The way out: questions are answered here."""
