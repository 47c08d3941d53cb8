"""One harness that measures every system the same way; `tools/benchmark.py` is its command line."""
