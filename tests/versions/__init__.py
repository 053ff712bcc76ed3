"""A short end-to-end set, and the environments of other versions in which it runs."""
