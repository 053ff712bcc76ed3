"""The parts of ``benchmarks/loss_law.py``."""
