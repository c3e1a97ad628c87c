"""Ingest service: accepts document events, and connectors that send them."""
