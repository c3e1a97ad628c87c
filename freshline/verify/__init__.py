"""Verification: the ``verify`` command, and the invariants shared by simulation, system tests and chaos runs."""
