"""Timings of kernels, models and methods; run the scripts, the packages hold their parts."""
