"""The one table of everything that is logged."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TAGS", "Tag"]


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One logged quantity.

    Args:
        name: As it stands in the logger; ``[...]`` is left out where there is only one.
        unit: Its unit; ``"1"`` for a ratio.
        meaning: One sentence.

    Example:
        >>> next(tag.unit for tag in TAGS if tag.name == "clip/coefficient")
        '1'
    """

    name: str
    unit: str
    meaning: str


TAGS: tuple[Tag, ...] = (
    Tag(
        name="optim/lr[/optimizer][/group]",
        unit="1",
        meaning="Learning rate of a parameter group, as used by this update.",
    ),
    Tag(
        name="grad_norm/total[/optimizer]",
        unit="1",
        meaning="Global norm of the gradient before it was clipped.",
    ),
    Tag(
        name="clip/coefficient[/optimizer]",
        unit="1",
        meaning="Factor that clipping put on the gradient; 1 where it did not act.",
    ),
    Tag(
        name="batch/global_size",
        unit="samples",
        meaning="Samples over all processes in this update.",
    ),
    Tag(
        name="progress/samples",
        unit="samples",
        meaning="Samples over all processes consumed, this update included.",
    ),
)
