"""Checkpoints that `vispress` loads by name; there is no code here."""
