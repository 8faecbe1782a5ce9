"""The parts of the GPU suite (`benchmarks/gpu_suite.py`); they run tiny on a CPU, too."""
