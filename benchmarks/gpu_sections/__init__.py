"""The sections of benchmarks/gpu.py: each a function that adds rows until nothing is left to do."""
