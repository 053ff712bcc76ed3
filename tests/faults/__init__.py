"""Faults that a training run must survive: kills, wrong arguments, failing processes, full disks.

Each module has a function ``measure()`` that runs many cases and returns their results as
Markdown, for ``benchmarks/faults.py``. The tests run a few cases of each.
"""
