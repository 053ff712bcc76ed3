"""What this package promises of an optimizer, checked for a catalog of optimizers."""
