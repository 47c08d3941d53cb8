"""The block compiled for a CPU."""
