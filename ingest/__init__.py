"""The way in: document events are accepted here and nowhere else."""
