"""The outline of a run: progress, batch size and learning rates of each update, in advance."""
