"""The result of a comparison of two trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_bigopt.reporting.comparison import ComparisonRecord

__all__ = ["Comparison"]


@dataclass(frozen=True, kw_only=True)
class Comparison(ComparisonRecord):
    """The result of :func:`compare`; ``print`` shows the losses by seed and the verdict.

    Its fields are those of :class:`~lightning_bigopt.reporting.comparison.ComparisonRecord`: ``a``
    and ``b`` with best values, config, search, and the losses, updates and seconds of each seed,
    ``test`` with the paired t-test, and ``relevant``. ``verdict``, ``winner``, ``difference``
    (b - a), ``interval``, ``p_value``, ``detectable_difference`` and ``updates_ratio`` follow from
    them.

    Example:
        >>> from lightning_bigopt.reporting.compared_side import ComparedSide, SeedRun
        >>> from lightning_bigopt.reporting.paired_test import paired_test
        >>> losses = [2.0, 2.1, 2.2, 2.3], [1.9, 2.02, 2.09, 2.21]
        >>> sides = [
        ...     ComparedSide(
        ...         name=name,
        ...         runs=tuple(SeedRun(seed=n, loss=x, updates=9) for n, x in enumerate(own)),
        ...     )
        ...     for name, own in zip(["a.yaml", "b.yaml"], losses)
        ... ]
        >>> found = Comparison(
        ...     a=sides[0], b=sides[1], monitor="val_loss", test=paired_test(*losses)
        ... )
        >>> found.verdict
        'b.yaml is better by 0.095 (95 % interval 0.07446 to 0.1155, p = 0.00068, n = 4)'
        >>> found.winner.name, round(found.detectable_difference, 3)
        ('b.yaml', 0.027)
    """

    def report(self, path: str | Path) -> Path:
        """Writes the comparison as one self-contained HTML file.

        Args:
            path: The file, such as ``"comparison.html"``.

        Returns:
            The path.

        Raises:
            ValueError: If the path is a folder or cannot be written.
        """
        from lightning_bigopt.reporting.comparison_report import write_comparison_report

        return write_comparison_report(self, path)

    def picture(self, path: str | Path) -> Path:
        """Draws the losses by seed, the difference and the searches, and writes a file.

        Args:
            path: The file, such as ``"comparison.png"`` or ``"comparison.svg"``; the suffix selects
                the format.

        Returns:
            The path.

        Raises:
            ValueError: If the path is a folder or cannot be written.
        """
        from lightning_bigopt.reporting.comparison_picture import write_comparison_picture

        return write_comparison_picture(self, path)
