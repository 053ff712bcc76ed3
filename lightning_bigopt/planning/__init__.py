"""Plans of a run: outline of its updates, and laws of learning rate, batch and weight decay."""

from lightning_bigopt.planning.hyperparameter_law import HyperparameterLaw
from lightning_bigopt.planning.published_laws import suggest
from lightning_bigopt.planning.suggestion import Suggestion

__all__ = ["HyperparameterLaw", "Suggestion", "suggest"]
