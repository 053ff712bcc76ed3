"""Notebooks, and the script that executes them."""
