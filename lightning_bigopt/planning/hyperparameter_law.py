"""A power law of learning rate, batch and weight decay in parameters and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.checks import (
    check_number,
    check_positive,
    shown,
)
from lightning_bigopt.planning.suggestion import Suggestion
from lightning_bigopt.planning.sweep_table import Grid, grids_of
from lightning_bigopt.type_checks import check_instance

__all__ = ["HyperparameterLaw"]

_TOLERANCE = 1.05
"""Factor outside a range without a warning: ranges are stated with two or three digits."""


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class HyperparameterLaw:
    r"""Power laws of the best learning rate, batch and weight decay.

    Each law is :math:`c\, N^a D^b` with the coefficient :math:`c` and the exponents :math:`a` of
    the parameters :math:`N` and :math:`b` of the tokens :math:`D`. The weight decay is

    .. math:: \lambda = \frac{B}{\eta\, D\, \tau(N, D)}

    with the batch :math:`B` in tokens, the learning rate :math:`\eta` and the timescale
    :math:`\tau`, the updates over which AdamW averages as a fraction of the run.

    Args:
        name: Name of the law.
        learning_rate: ``(c, a, b)`` of the peak learning rate; None if the law gives none.
        batch_tokens: ``(c, a, b)`` of the global batch in tokens.
        timescale: ``(c, a, b)`` of the timescale; None if the law gives no weight decay.
        parameters: Smallest and largest number of parameters measured.
        tokens: Smallest and largest number of tokens measured; None if unknown.
        tokens_per_parameter: Smallest and largest ratio measured; None if unknown.
        counts: Which parameters count, for messages.
        source: Where the law is published.

    Raises:
        ValueError: If a coefficient is not positive, an exponent not finite, or a range no pair of
            ascending positive numbers.

    Example:
        >>> law = HyperparameterLaw(
        ...     name="mine",
        ...     learning_rate=(1.0, -0.5, 0.1),
        ...     batch_tokens=(10.0, 0.0, 0.5),
        ...     parameters=(1e7, 1e9),
        ... )
        >>> law.suggest(parameters=1e8, tokens=1e10).batch_tokens
        1000000.0

    References:
        Li et al., "Predictable Scale: Part I, Step Law", 2025, arXiv:2503.04715.
    """

    name: str
    learning_rate: tuple[float, float, float] | None
    batch_tokens: tuple[float, float, float]
    timescale: tuple[float, float, float] | None = None
    parameters: tuple[float, float]
    tokens: tuple[float, float] | None = None
    tokens_per_parameter: tuple[float, float] | None = None
    counts: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Checks the arguments; lists, as in YAML, become tuples."""
        for field in ("name", "counts", "source"):
            check_instance(field, getattr(self, field), str, hint=f"write {field}='mine'")
        for field in ("learning_rate", "batch_tokens", "timescale"):
            value = getattr(self, field)
            if value is not None or field == "batch_tokens":
                object.__setattr__(self, field, _checked_law(field, value))
        for field in ("parameters", "tokens", "tokens_per_parameter"):
            value = getattr(self, field)
            if value is not None or field == "parameters":
                object.__setattr__(self, field, _checked_range(field, value))

    def suggest(
        self, *, parameters: float, tokens: float, learning_rate: float | None = None
    ) -> Suggestion:
        """Returns the suggestion for a run, and warns if the run is outside the measured range.

        Args:
            parameters: Parameters of the model, counted as the law counts them.
            tokens: Tokens of the run.
            learning_rate: The learning rate of a law that gives none, for its weight decay.

        Returns:
            The suggestion.

        Raises:
            ValueError: If a number is not positive, or ``learning_rate`` is passed to a law that
                gives one.

        Warns:
            UserWarning: If the run is outside a range in which the law was measured.
        """
        is_given = learning_rate is not None
        check_positive("parameters", parameters, hint="write a number such as 1e8")
        check_positive("tokens", tokens, hint="write a number such as 2e9")
        if learning_rate is not None:
            check_positive("learning_rate", learning_rate, hint="write a number such as 1e-3")
            if self.learning_rate is not None:
                raise ValueError(
                    f"learning_rate must be None with the law {self.name!r}, got "
                    f"{shown(learning_rate)}; this law gives the learning rate, so leave it out"
                )
            learning_rate = float(learning_rate)
        elif self.learning_rate is not None:
            learning_rate = _value(self.learning_rate, parameters, tokens)
        batch = _value(self.batch_tokens, parameters, tokens)
        decay = None
        if self.timescale is not None and learning_rate is not None:
            timescale = _value(self.timescale, parameters, tokens)
            decay = batch / (learning_rate * tokens * timescale)
        outside = tuple(self._outside(parameters, tokens))
        if outside:
            warnings.warn(
                f"The law {self.name!r} is used outside the range in which it was measured: "
                f"{'; '.join(outside)}. Check the suggestion with a short sweep.",
                UserWarning,
                stacklevel=2,
            )
        return Suggestion(
            law=self.name,
            parameters=float(parameters),
            tokens=float(tokens),
            learning_rate=learning_rate,
            batch_tokens=batch,
            weight_decay=decay,
            measured=self.measured,
            outside=outside,
            source=self.source,
            learning_rate_is_given=is_given,
            needs_learning_rate=self.learning_rate is None and self.timescale is not None,
        )

    @property
    def measured(self) -> str:
        """The ranges in which the law was measured, in words."""
        count = f" ({self.counts})" if self.counts else ""
        return ", ".join(
            f"{what}{count if what == 'parameters' else ''} {low:.4g}"
            + (f" to {high:.4g}" if high > low else "")
            for what, (low, high) in self._ranges()
        )

    @classmethod
    def fit(
        cls, table: Any, *, within: float = 0.01, name: str = "fitted", source: str = ""
    ) -> HyperparameterLaw:
        r"""Fits the laws of learning rate and batch to sweeps.

        A sweep is a grid of runs with one number of parameters and tokens. Near its best run, the
        logarithm of the loss is a quadratic function of the logarithms of learning rate and batch.
        All sweeps are fitted together, with one shape of this bowl and with centers on the power
        laws:

        .. math:: \ln \ell = c_g + \tfrac12 (z - z^*)^\top H (z - z^*), \qquad
            z = (\ln \eta, \ln B), \quad z^* = M\, (1, \ln N, \ln D)^\top

        This is a linear least-squares problem in :math:`c_g`, :math:`H` and :math:`HM`. A quantity,
        parameters or tokens, that is the same in all sweeps gets the exponent 0. Published
        coefficients are not used.

        Args:
            table: Dicts (a ``csv.DictReader``, too), or a mapping of columns (a pandas DataFrame,
                too), with ``parameters``, ``tokens``, ``learning_rate``, ``batch_tokens`` and
                ``loss``; a row is one run, and further columns are ignored. The loss is positive.
                Runs whose tokens differ by at most 2 % are of one sweep.
            within: Runs whose loss is at most this fraction above the best of their sweep are
                fitted. Far from the optimum the bowl is steeper towards high learning rates.
            name: Name of the law.
            source: Where the sweeps come from, for messages.

        Returns:
            The law; its measured range is that of the sweeps.

        Raises:
            ValueError: If the table lacks a column or has a value that is not positive and finite,
                if the sweeps do not determine the exponents, or if the fitted runs have no minimum.

        Warns:
            UserWarning: If the best run of a sweep is at the edge of its grid, if a sweep has one
                run within ``within``, or if there are only as many sweeps as coefficients.

        Example:
            >>> import math
            >>> table = [
            ...     dict(
            ...         parameters=n,
            ...         tokens=d,
            ...         learning_rate=lr,
            ...         batch_tokens=b,
            ...         loss=2 + math.log(lr * n**0.5) ** 2 / 99 + math.log(b / d**0.5) ** 2 / 99,
            ...     )
            ...     for n, d in ((1e6, 1e8), (1e6, 4e8), (4e6, 1e8), (4e6, 4e8))
            ...     for lr in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
            ...     for b in (5e3, 1e4, 2e4, 4e4)
            ... ]
            >>> law = HyperparameterLaw.fit(table)
            >>> [round(exponent, 1) + 0.0 for exponent in law.learning_rate]
            [1.0, -0.5, 0.0]
            >>> [round(exponent, 1) + 0.0 for exponent in law.batch_tokens]
            [1.0, 0.0, 0.5]
        """
        from lightning_bigopt.planning.joint_fit import fitted_laws

        check_positive("within", within, hint="write 0.01")
        grids = grids_of(table)
        _warn_of(grids, within)
        learning_rate, batch = fitted_laws(grids, within=within)
        return cls(
            name=name,
            learning_rate=learning_rate,
            batch_tokens=batch,
            parameters=_span(grid.parameters for grid in grids),
            tokens=_span(grid.tokens for grid in grids),
            source=source,
        )

    def _ranges(self) -> list[tuple[str, tuple[float, float]]]:
        pairs = (
            ("parameters", self.parameters),
            ("tokens", self.tokens),
            ("tokens per parameter", self.tokens_per_parameter),
        )
        return [(what, pair) for what, pair in pairs if pair is not None]

    def _outside(self, parameters: float, tokens: float) -> list[str]:
        values = {
            "parameters": parameters,
            "tokens": tokens,
            "tokens per parameter": tokens / parameters,
        }
        sentences = []
        for what, (low, high) in self._ranges():
            value = values[what]
            factor, side = (low / value, "below") if value < low else (value / high, "above")
            if factor > _TOLERANCE:
                sentences.append(
                    f"{what} {value:.3g} is a factor of {factor:.2g} {side} "
                    + (f"{low:.4g} to {high:.4g}" if high > low else f"{low:.4g}")
                )
        return sentences


def _value(law: tuple[float, float, float], parameters: float, tokens: float) -> float:
    coefficient, of_parameters, of_tokens = law
    return float(coefficient * parameters**of_parameters * tokens**of_tokens)


def _span(values: Any) -> tuple[float, float]:
    listed = list(values)
    return min(listed), max(listed)


def _warn_of(grids: Sequence[Grid], within: float) -> None:
    """Warns of sweeps that say little about their optimum."""
    for grid in grids:
        edge = grid.edge()
        if edge:
            _warn(
                f"The best run of the sweep with {grid.text} has the {edge} of its grid, so that "
                f"the optimum may be beyond it; extend the grid, or leave out the sweep."
            )
        if sum(loss <= grid.best * (1 + within) for loss in grid.losses) == 1:
            _warn(
                f"The sweep with {grid.text} has one run within {within:.2%} of its best loss, and "
                f"does not contribute to the fit; add runs near it, or increase within."
            )


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


def _checked_law(name: str, value: Any) -> tuple[float, float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ValueError(
            f"{name} must be a coefficient and the exponents of parameters and tokens, got "
            f"{shown(value)}; write {name}=(0.58, 0.0, 0.571)"
        )
    check_positive(f"{name}[0]", value[0], hint="write the coefficient, such as 0.58")
    check_number(f"{name}[1]", value[1], hint="write the exponent of the parameters, such as 0.0")
    check_number(f"{name}[2]", value[2], hint="write the exponent of the tokens, such as 0.571")
    return (float(value[0]), float(value[1]), float(value[2]))


def _checked_range(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(
            f"{name} must be the smallest and the largest value measured, got {shown(value)}; "
            f"write {name}=(1e7, 1e9)"
        )
    check_positive(f"{name}[0]", value[0], hint="write a number such as 1e7")
    check_positive(f"{name}[1]", value[1], hint="write a number such as 1e9")
    if value[0] > value[1]:
        raise ValueError(f"{name} must be ascending, got {shown(value)}; exchange the values")
    return (float(value[0]), float(value[1]))
