"""Connectors for folders, git repositories and event files. They are ordinary clients of the ingest API."""
