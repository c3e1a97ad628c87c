"""The steps of the topology, one in each module."""
