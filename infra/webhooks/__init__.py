"""Webhooks: permitted targets, signatures, sending and storage."""
