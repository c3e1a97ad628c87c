"""Benchmarks. Each starts its own installation on the local stack and reports what shared the processor cores."""
