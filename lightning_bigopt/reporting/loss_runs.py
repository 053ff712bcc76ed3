"""Reads the loss curves of pilot runs from their logs."""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from itertools import pairwise
from os import PathLike
from pathlib import Path

from lightning_bigopt.checks import shown
from lightning_bigopt.planning.loss_curve import LossCurve
from lightning_bigopt.reporting.runs import Curve, Run, holds_logs, read_run
from lightning_bigopt.type_checks import check_instance

__all__ = ["read_loss_curve", "read_loss_curves"]

_OTHER_FIELDS = ("-momentum", "-weight_decay")  # of LearningRateMonitor
_LARGEST_GAP = 0.05
_RATE_ADVICE = "add OptimizationMonitor() or LearningRateMonitor() to the pilots"


def read_loss_curve(folder: str | PathLike[str], *, loss: str = "val_loss") -> LossCurve:
    """Reads the loss curve of a run from TensorBoard events or the ``metrics.csv`` of a CSVLogger.

    The learning rate is that of the parameter group with the highest one, as OptimizationMonitor
    (``optim/lr…``) or LearningRateMonitor (``lr-…``) logged it; between two logged updates it is
    interpolated.

    Args:
        folder: The log folder of one run.
        loss: Name of the logged loss. ``"val_loss"`` has less noise, a loss of training batches
            has more points.

    Returns:
        The curve, for :meth:`LossLaw.fit`.

    Raises:
        ValueError: If the folder holds no logs or several runs, or the loss or the learning rate
            was not logged by update.

    Example:
        >>> law = LossLaw.fit(
        ...     [read_loss_curve("runs/constant"), read_loss_curve("runs/cosine")]
        ... )  # doctest: +SKIP
    """
    check_instance("loss", loss, str, hint="write 'val_loss'")
    run = read_run(folder)
    if problem := _problem(run):
        raise ValueError(
            f"folder must contain a run from its beginning, got {run.name}, which {problem}; "
            f"{_RATE_ADVICE}"
        )
    return _curve_of(run, loss)


def read_loss_curves(folder: str | PathLike[str], *, loss: str = "val_loss") -> list[LossCurve]:
    """Reads the loss curves of all runs below a folder, in the order of their paths.

    Args:
        folder: A folder with a log folder for each run, at any depth.
        loss: As for :func:`read_loss_curve`.

    Raises:
        ValueError: If there is no run, or a loss was not logged.

    Warns:
        UserWarning: If logs are left out: they have no learning rate, continue another run, or are
            those of a second logger.

    Example:
        >>> law = LossLaw.fit(read_loss_curves("runs/pilots"))  # doctest: +SKIP
    """
    check_instance("loss", loss, str, hint="write 'val_loss'")
    root = Path(folder)
    folders = sorted(path for path in (root, *root.rglob("*")) if path.is_dir())
    # TensorBoard's HParams tab needs a separate event file, in a folder beside the run's.
    found = [path for path in folders if path.name != "hyperparameters" and holds_logs(path)]
    if not found:
        raise ValueError(
            f"pilots must be a folder with the logs of runs, got {str(root)!r}, which has none; "
            "pass the folder of a TensorBoardLogger or of a CSVLogger"
        )
    curves: list[LossCurve] = []
    skipped = []
    for path in found:
        run = read_run(path)
        if problem := _problem(run):
            skipped.append(f"{run.name} {problem}")
            continue
        curve = _curve_of(run, loss)
        if any(curve.losses == other.losses for other in curves):
            skipped.append(f"{run.name} has the losses of another run: two loggers")
            continue
        curves.append(curve)
    if not curves:
        raise ValueError(
            f"pilots must contain a run from its beginning, got {'; '.join(skipped)}; "
            f"{_RATE_ADVICE}"
        )
    if skipped:
        warnings.warn(f"These logs are left out: {'; '.join(skipped)}.", UserWarning, stacklevel=2)
    return curves


def _curve_of(run: Run, loss: str) -> LossCurve:
    if run.axis != "update":
        raise ValueError(
            f"the logs must be by update, got {run.axis} as the horizontal axis in {run.name}; "
            "pass OptimizationMonitor(x_axis='updates') in the pilots"
        )
    if loss not in run.curves:
        similar = get_close_matches(loss, run.curves, n=1)
        advice = f"did you mean {similar[0]!r}?" if similar else "name a logged value"
        raise ValueError(
            f"loss must be the name of a value in the logs, got {loss!r} but "
            f"{shown(sorted(run.curves)[:8])} in {run.name}; {advice}"
        )
    highest = _learning_rates(run)
    gaps = [later - step for (step, _), (later, _) in pairwise(highest)]
    if max(gaps) > max(_LARGEST_GAP * highest[-1][0], 10):
        warnings.warn(
            f"The learning rate of {run.name} was logged every {max(gaps)} updates only, of "
            f"{highest[-1][0] + 1}; a short warm-up or cooldown is not seen. Lower "
            "log_every_n_steps.",
            UserWarning,
            stacklevel=3,
        )
    return LossCurve.from_points(
        steps=[step for step, _ in highest],
        learning_rates=[value for _, value in highest],
        # Lightning logs a validation after update t, the t+1st, at step t. A training loss was
        # computed before that update, which makes no difference to the law.
        updates=[step + 1 for step, _ in run.curves[loss]],
        losses=[value for _, value in run.curves[loss]],
        # Before the first record the learning rate is taken to rise from 0.
        warmup=highest[0][0],
        name=run.name,
    )


def _problem(run: Run) -> str:
    """Returns why the learning rates of a run are unknown; "" if they are known."""
    rates = _learning_rates(run)
    if not rates:
        return f"has no learning rate among {shown(sorted(run.curves)[:8])}"
    if len(rates) < 2:
        return "has the learning rate only once (LearningRateMonitor(logging_interval='step'))"
    (first, _), (second, _) = rates[:2]
    if first > 2 * (second - first):
        return f"begins at update {first + 1:,} and continues another run"
    return ""


def _learning_rates(run: Run) -> Curve:
    """Returns the learning rates of the parameter group with the highest one."""
    rates = [
        curve
        for tag, curve in run.curves.items()
        if tag == "optim/lr"
        or tag.startswith("optim/lr/")
        or (tag.startswith("lr-") and not tag.endswith(_OTHER_FIELDS))
    ]
    return max(rates, key=lambda curve: max(value for _, value in curve), default=[])
