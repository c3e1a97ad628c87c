"""One step of the topology per module."""
