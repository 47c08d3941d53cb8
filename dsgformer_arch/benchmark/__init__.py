"""Benchmarks that measure all systems in the same way; `tools/benchmark.py` is the command line."""
