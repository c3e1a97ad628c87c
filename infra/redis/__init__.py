"""Cached answers, event states and versions."""
