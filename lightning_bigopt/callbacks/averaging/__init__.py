"""The capability that averages the weights, and its parts."""
