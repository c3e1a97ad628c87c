"""Pure rules of stream processing: no I/O, no clock, no randomness."""
