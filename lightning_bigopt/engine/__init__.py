"""The engine that runs the capabilities of a Trainer, and the base class of capabilities."""
