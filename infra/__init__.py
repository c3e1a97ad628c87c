"""Clients of external systems. Each package has a port and its implementations, including an in-memory one."""
