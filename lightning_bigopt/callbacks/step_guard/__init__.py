"""StepGuard: rejects harmful updates before they are applied."""

from lightning_bigopt.callbacks.step_guard.replay import Replay, replay
from lightning_bigopt.callbacks.step_guard.step_guard import StepGuard

__all__ = ["Replay", "StepGuard", "replay"]
