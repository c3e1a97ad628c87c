"""Stream processing: turns document events into searchable passages and invalidates cached answers."""
