"""Record a forward once, and run it again without Python: CUDA graphs, and what stands for them."""
