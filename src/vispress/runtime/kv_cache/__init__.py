"""Hold short keys and values under logical lengths: cache layers, and names of theirs."""
