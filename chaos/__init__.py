"""Faults on real processes, under load, and an independent judge of what they did."""
