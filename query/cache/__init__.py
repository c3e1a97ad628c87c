"""Reading cached answers: cache keys, freshness reads, near cache, invalidation subscription and lag."""
