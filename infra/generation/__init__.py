"""Results to a written answer: one port and its generators."""
