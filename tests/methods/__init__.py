"""A package, so that its name does not mean ``benchmarks/methods.py``."""
