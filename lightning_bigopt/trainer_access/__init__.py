"""Access to Lightning's Trainer: only this package uses its private names and internal classes.

Each module covers one part of the Trainer. Import the modules as namespaces::

    from lightning_bigopt.trainer_access import loop, strategies

``tests/lightning_contract`` asserts that every private name used here exists in Lightning.
"""
