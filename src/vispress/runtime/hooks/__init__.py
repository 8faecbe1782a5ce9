"""Reach into a model instance: observed attention, patched methods, paused checkpointing."""
