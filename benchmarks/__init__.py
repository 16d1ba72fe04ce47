"""Checks against known answers that take minutes: run them by hand, ``python -m benchmarks.NAME``."""
