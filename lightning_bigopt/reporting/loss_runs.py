"""Reads the loss curves of pilot runs from their logs."""

from __future__ import annotations

from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from lightning_bigopt.checks import shown
from lightning_bigopt.planning.loss_curve import LossCurve
from lightning_bigopt.reporting.runs import Run, holds_logs, read_run
from lightning_bigopt.type_checks import check_instance

__all__ = ["read_loss_curve", "read_loss_curves"]

_RATES = ("optim/lr", "lr-")  # of OptimizationMonitor and of LearningRateMonitor
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
    """
    check_instance("loss", loss, str, hint="write 'val_loss'")
    return _curve_of(read_run(folder), loss)


def read_loss_curves(folder: str | PathLike[str], *, loss: str = "val_loss") -> list[LossCurve]:
    """Reads the loss curves of all runs below a folder, in the order of their paths.

    Args:
        folder: A folder with a log folder for each run, at any depth.
        loss: As for :func:`read_loss_curve`.

    Raises:
        ValueError: As for :func:`read_loss_curve`, or if there is no run.
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
    return [read_loss_curve(path, loss=loss) for path in found]


def _curve_of(run: Run, loss: str) -> LossCurve:
    if run.axis != "update":
        raise ValueError(
            f"the logs must be by update, got {run.axis} as the horizontal axis in {run.name}; "
            "pass OptimizationMonitor(x_axis='updates') in the pilots"
        )
    rates = {tag: curve for tag, curve in run.select(*_RATES).items() if len(curve) > 1}
    if not rates:
        raise ValueError(
            f"the logs must contain the learning rate, got {shown(sorted(run.curves)[:8])} in "
            f"{run.name}; {_RATE_ADVICE}"
        )
    if loss not in run.curves:
        similar = get_close_matches(loss, run.curves, n=1)
        advice = f"did you mean {similar[0]!r}?" if similar else "name a logged value"
        raise ValueError(
            f"loss must be the name of a value in the logs, got {loss!r} but "
            f"{shown(sorted(run.curves)[:8])} in {run.name}; {advice}"
        )
    highest = max(rates.values(), key=lambda curve: max(value for _, value in curve))
    return LossCurve.from_points(
        steps=[step for step, _ in highest],
        learning_rates=[value for _, value in highest],
        # Lightning logs the values of update t, which is the t+1st, at step t.
        updates=[step + 1 for step, _ in run.curves[loss]],
        losses=[value for _, value in run.curves[loss]],
        name=run.name,
    )
