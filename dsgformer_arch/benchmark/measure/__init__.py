"""Measurements.  Each module produces the rows of one command of `tools/benchmark.py`."""
