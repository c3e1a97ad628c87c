"""Determines which cached answers a change of the index alters, from the evidence stored with each answer."""
