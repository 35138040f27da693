"""From scores to ranks: metrics, run files, exact search, one-to-one assignment, the pool."""
