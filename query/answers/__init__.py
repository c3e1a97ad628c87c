"""From a question to an answer: cache lookup, single flight, generation, streaming, refresh-ahead."""
