"""Metrics and rolling statistics of the query service."""
