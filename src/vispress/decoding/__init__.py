"""Decode with visual tokens in mind: stand-alone procedures that need no compression."""
