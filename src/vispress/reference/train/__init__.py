"""Training the reference models from nothing, in three resumable stages."""
