"""Webhooks: where they may lead, how they are signed, sent and kept."""
