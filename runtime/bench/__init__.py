"""Measure scoring speed on this machine: `python -m runtime.bench`."""
