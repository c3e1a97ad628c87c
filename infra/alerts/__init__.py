"""Telling people that something is wrong: one port, and its channels."""
