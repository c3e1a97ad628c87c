"""Pure rules of processing: no I/O, no clock, no randomness."""
