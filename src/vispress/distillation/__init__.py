"""Train the parameters of compressors on a model that stays as it is."""
