"""Generators of answers from retrieved passages."""
