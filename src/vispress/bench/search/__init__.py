"""Searching schedules: an objective on calibration questions, and two searches of it."""
