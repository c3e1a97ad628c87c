"""Fault injection on a real installation under load, with an independent checker."""
