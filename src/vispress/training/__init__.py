"""Train the parameters of compressors: targets that a model gives by itself, and loops."""
