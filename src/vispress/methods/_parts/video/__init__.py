"""Frames of a video: scenes, groups, runs of one place."""
