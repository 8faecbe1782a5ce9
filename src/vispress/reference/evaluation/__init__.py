"""Held-out questions of every kind, and exact match of what a model answers."""
