"""Read and merge inside the vision encoder."""
