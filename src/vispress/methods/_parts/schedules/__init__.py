"""Layers and budgets of methods that act at several depths."""
