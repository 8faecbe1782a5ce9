"""Scores of tokens, and what they are made of."""
