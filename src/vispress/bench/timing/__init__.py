"""What compression costs: time, memory, KV bytes and FLOPs."""
