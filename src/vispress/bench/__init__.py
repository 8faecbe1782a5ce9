"""Benchmarks: methods x keep ratios on questions with known answers, resumable and reproducible.

`vispress.bench.engine.run` runs a plan, `vispress.bench.summary` turns its cells into rows.
"""
