"""The suggestion of a law: learning rate, batch and weight decay, with the range of the law."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bigopt.checks import check_count

__all__ = ["Suggestion"]


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """The suggestion of a law for one run.

    Args:
        law: Name of the law.
        parameters: Parameters of the model, counted as the law counts them.
        tokens: Tokens of the run.
        learning_rate: Peak learning rate; None if the law gives none.
        batch_tokens: Tokens of a global batch.
        weight_decay: Weight decay of AdamW, which the learning rate multiplies as in torch; None if
            the law gives none.
        measured: The range in which the law was measured, in words.
        outside: For each range that the run is outside of, a sentence.
        source: Where the law is published.
        learning_rate_is_given: Whether the learning rate is the user's, not the law's.
        needs_learning_rate: Whether the law gives a weight decay for a learning rate of the user.

    Example:
        >>> found = Suggestion(
        ...     law="mine",
        ...     parameters=1e8,
        ...     tokens=2e9,
        ...     learning_rate=2e-3,
        ...     batch_tokens=131_072.0,
        ...     weight_decay=None,
        ...     measured="parameters 1e+07 to 1e+08",
        ...     outside=(),
        ...     source="",
        ... )
        >>> found.global_batch_size(sequence_length=1024)
        128
        >>> print(found)
        mine for 1e+08 parameters and 2e+09 tokens:
          learning rate: 0.002
          global batch: 1.31e+05 tokens, about 15259 updates
          weight decay: not given by this law
          measured: parameters 1e+07 to 1e+08
    """

    law: str
    parameters: float
    tokens: float
    learning_rate: float | None
    batch_tokens: float
    weight_decay: float | None
    measured: str
    outside: tuple[str, ...] = ()
    source: str = ""
    learning_rate_is_given: bool = False
    needs_learning_rate: bool = False

    def global_batch_size(self, *, sequence_length: int, multiple_of: int = 1) -> int:
        """Returns the batch in samples, for samples of a fixed number of tokens.

        Args:
            sequence_length: Tokens of a sample.
            multiple_of: The result is a multiple of it, such as processes times micro-batch.

        Returns:
            The nearest multiple, at least ``multiple_of``.

        Raises:
            ValueError: If an argument is no positive integer.
        """
        check_count(
            "sequence_length", sequence_length, of="tokens", hint="write an int such as 2048"
        )
        check_count("multiple_of", multiple_of, of="samples")
        return max(1, round(self.batch_tokens / (sequence_length * multiple_of))) * multiple_of

    def __str__(self) -> str:
        """Describes the suggestion in some lines."""
        given = " (given)" if self.learning_rate_is_given else ""
        decay = _number(self.weight_decay)
        if self.needs_learning_rate and self.weight_decay is None:
            decay = "pass learning_rate= for it"
        updates = self.tokens / self.batch_tokens
        lines = [
            f"{self.law} for {self.parameters:.3g} parameters and {self.tokens:.3g} tokens:",
            f"  learning rate: {_number(self.learning_rate)}{given}",
            f"  global batch: {self.batch_tokens:.3g} tokens, about {updates:.0f} updates",
            f"  weight decay: {decay}",
            f"  measured: {self.measured}",
            *(f"  outside: {sentence}" for sentence in self.outside),
        ]
        return "\n".join([*lines, f"  source: {self.source}"] if self.source else lines)


def _number(value: float | None) -> str:
    return "not given by this law" if value is None else f"{value:.3g}"
