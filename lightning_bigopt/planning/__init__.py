"""Plans without training: the outline of a run, laws of its loss, and of its learning rate."""

from lightning_bigopt.planning.expected_loss import ExpectedLoss
from lightning_bigopt.planning.hyperparameter_law import HyperparameterLaw
from lightning_bigopt.planning.loss_curve import LossCurve
from lightning_bigopt.planning.loss_law import LossLaw
from lightning_bigopt.planning.multi_power_law import MultiPowerLaw
from lightning_bigopt.planning.published_laws import suggest
from lightning_bigopt.planning.suggestion import Suggestion

__all__ = [
    "ExpectedLoss",
    "HyperparameterLaw",
    "LossCurve",
    "LossLaw",
    "MultiPowerLaw",
    "Suggestion",
    "suggest",
]
