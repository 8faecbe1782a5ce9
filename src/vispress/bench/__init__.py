"""Benchmarks: methods x keep ratios on questions with known answers, resumable and reproducible.

Packages, each of which knows only those below it:

* `page`: one HTML page from a results folder
* `search`: schedules found on calibration questions
* `run`: the cells of a plan, run and stored (`run.engine.run`)
* `timing`: what compression costs in time, memory, KV bytes and FLOPs
* `results`: the results folder, and its cells as statistics, tables and plots (`results.summary`)
* `plan`: what a run does, and the controls that stand beside its methods
* `model`: the model under test, batches for it, conversations with it
* `tasks`: questions with their answers, and how an answer is scored
"""
