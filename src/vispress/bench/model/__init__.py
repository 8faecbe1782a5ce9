"""The model under test: loading it, batches for it, conversations with it."""
