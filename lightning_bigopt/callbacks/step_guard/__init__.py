"""StepGuard: rejects harmful updates before they are applied."""

from lightning_bigopt.callbacks.step_guard.replay import Replay, replay
from lightning_bigopt.callbacks.step_guard.step_guard import StepGuard
from lightning_bigopt.callbacks.step_guard.too_many_rejections import TooManyRejectionsError

__all__ = ["Replay", "StepGuard", "TooManyRejectionsError", "replay"]
