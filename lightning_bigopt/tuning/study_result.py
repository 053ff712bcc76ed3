"""The result of a hyperparameter study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_bigopt.reporting.study import StudyRecord

__all__ = ["Study"]


@dataclass(frozen=True, kw_only=True)
class Study(StudyRecord):
    """The result of :func:`study`; ``print`` shows it as a table.

    Its fields are those of :class:`~lightning_bigopt.reporting.study.StudyRecord`: ``trials``,
    ``best_values``, ``config`` (the best values as YAML), ``importance`` and ``budgets``.
    ``best_loss``, ``updates``, ``updates_saved`` and ``seconds`` follow from the trials.

    Example:
        >>> from lightning_bigopt.reporting.study import Axis, StudyTrial
        >>> trial = StudyTrial(number=0, state="complete", values={"lr": 0.1}, loss=2.0, updates=50)
        >>> axis = Axis(name="lr", low=0.01, high=1.0, is_log=True)
        >>> found = Study(name="gpt", monitor="val_loss", axes=(axis,), trials=(trial,))
        >>> found.best_loss, found.updates
        (2.0, 50)
    """

    def report(self, path: str | Path) -> Path:
        """Writes the study as one self-contained HTML file.

        Args:
            path: The file, such as ``"study.html"``.

        Returns:
            The path.

        Raises:
            ValueError: If the path is a folder or cannot be written.
        """
        from lightning_bigopt.reporting.study_report import write_study_report

        return write_study_report(self, path)

    def picture(self, path: str | Path) -> Path:
        """Draws the loss against each value, and writes a file.

        Args:
            path: The file, such as ``"study.png"`` or ``"study.svg"``; the suffix selects the
                format.

        Returns:
            The path.

        Raises:
            ValueError: If the path is a folder or cannot be written.
        """
        from lightning_bigopt.reporting.study_picture import write_study_picture

        return write_study_picture(self, path)
