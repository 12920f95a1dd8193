"""Tests and benchmarks that want a GPU, in one command: `python -m benchmarks.gpu`."""
