"""Outside systems: one folder each, with its port, its client, its in-memory twin and its provisioning."""
