"""Plug-ins for evaluation harnesses: lmms-eval and VLMEvalKit.

Each module is imported by its harness, or run from the command line; vispress itself imports none.
"""
