"""Which tokens go together: matching, clusters, duplicates."""
