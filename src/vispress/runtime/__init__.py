"""The mechanism: hooks, cache layers, per-forward state, attention rows. Knows transformers."""
