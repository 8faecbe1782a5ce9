"""Teach the parameters of compressors what a model itself attends to."""
