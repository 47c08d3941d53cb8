"""Errors, progress, files and text, for all parts of the package."""
