"""Bind compressors to one model: an immutable plan, made once by `compress_model`."""
