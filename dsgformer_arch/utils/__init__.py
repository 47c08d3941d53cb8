"""Errors, progress, files and text: what every part of the package uses."""
