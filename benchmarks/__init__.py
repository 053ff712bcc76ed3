"""Measurements whose pages are in docs/benchmarks; the tests run small cases of some."""
