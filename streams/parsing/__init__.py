"""Parsing of untrusted content to Markdown."""
