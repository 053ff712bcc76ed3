"""The mutable half of every capability; callbacks and mixins only hand hooks over to it."""
