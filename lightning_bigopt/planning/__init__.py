"""Plans without training: the outline of a run, and laws of its loss."""

from lightning_bigopt.planning.expected_loss import ExpectedLoss
from lightning_bigopt.planning.loss_curve import LossCurve
from lightning_bigopt.planning.loss_law import LossLaw
from lightning_bigopt.planning.multi_power_law import MultiPowerLaw

__all__ = ["ExpectedLoss", "LossCurve", "LossLaw", "MultiPowerLaw"]
