"""Benchmarks: each starts an installation of its own on the local stack, measures, and says what shared the cores."""
