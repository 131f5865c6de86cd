"""Measurements; each runs as `python -m bench.NAME` and none is imported by the package."""
