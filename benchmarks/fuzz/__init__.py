"""Fuzzing of everything that reads what others wrote: `python -m benchmarks.fuzz --minutes 10`.

A target (`target.py`) has valid documents, a way to mutate them and a check. Atheris guides the mutations by coverage;
where it is not installed, Hypothesis draws them. `engines.py` has both, `__main__.py` runs each target in a process.
"""
