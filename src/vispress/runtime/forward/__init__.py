"""Run one language-model call: the spine, its state, the signals it reads, its record."""
