"""Costs of compression: time, memory, KV bytes and FLOPs."""
