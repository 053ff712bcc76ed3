"""Published laws of learning rate, batch and weight decay, with the ranges of their sources."""

from __future__ import annotations

from typing import Literal

from lightning_bigopt.checks import check_choice
from lightning_bigopt.planning.hyperparameter_law import HyperparameterLaw
from lightning_bigopt.planning.suggestion import Suggestion

__all__ = ["PUBLISHED_LAWS", "suggest"]

PUBLISHED_LAWS = {
    "step-law": HyperparameterLaw(
        name="step-law",
        learning_rate=(1.79, -0.713, 0.307),
        batch_tokens=(0.58, 0.0, 0.571),
        parameters=(5.9e7, 1.07e9),
        tokens=(4e9, 1e11),
        counts="without embeddings",
        source="Li et al., Step Law, 2025, arXiv:2503.04715",
    ),
    "porian": HyperparameterLaw(
        name="porian",
        learning_rate=(3.7, -0.36, 0.0),
        batch_tokens=(0.00037 * 2048, 0.703, 0.0),
        parameters=(5.2e6, 1.08e8),
        tokens_per_parameter=(20.0, 20.0),
        counts="with the output layer, without the input embedding",
        source="Porian et al., NeurIPS 2024, arXiv:2406.19146",
    ),
    "power-lines": HyperparameterLaw(
        name="power-lines",
        learning_rate=None,
        batch_tokens=(0.0306 * 2048, 0.0, 0.383),
        timescale=(1.084, 0.527, -0.527),
        parameters=(1.11e8, 3.3e9),
        tokens_per_parameter=(20.0, 1280.0),
        source="Bergsma et al., Power Lines, NeurIPS 2025, arXiv:2505.13738",
    ),
}
"""The laws of :func:`suggest`, by name."""


def suggest(
    *,
    parameters: float,
    tokens: float,
    law: Literal["step-law", "porian", "power-lines"] = "step-law",
    learning_rate: float | None = None,
) -> Suggestion:
    r"""Suggests learning rate, batch and weight decay for a language model, by a published law.

    The laws hold for decoder-only transformers trained with AdamW on text, and were measured with
    the tokenizer, architecture and schedule of their authors. Take the result as the center of a
    sweep. For your own sweeps use :meth:`HyperparameterLaw.fit`.

    - ``"step-law"``: :math:`\eta = 1.79\, N^{-0.713} D^{0.307}`, :math:`B = 0.58\, D^{0.571}`
      tokens, for a cosine decay to a fixed, small learning rate; no weight decay.
    - ``"porian"``: :math:`\eta = 3.7\, N^{-0.36}`, :math:`B = 0.7576\, N^{0.703}` tokens, for 20
      tokens per parameter, a constant learning rate and a tuned :math:`\beta_2`; no weight decay.
    - ``"power-lines"``: :math:`B = 62.7\, D^{0.383}` tokens, and the weight decay from
      :math:`B / (\eta \lambda D) = 1.084\, (D / N)^{-0.527}`. The law gives no learning rate: the
      paper uses μP. Pass the peak learning rate of the hidden matrices, after the multiplier of μP.

    Args:
        parameters: Parameters :math:`N` of the model: without embeddings for ``"step-law"``; with
            the output layer and without the input embedding for ``"porian"``.
        tokens: Tokens :math:`D` of the run.
        law: The law.
        learning_rate: The learning rate, only for ``"power-lines"``; without it the result has no
            weight decay.

    Returns:
        The suggestion.

    Raises:
        ValueError: If a number is not positive, the law is unknown, or ``learning_rate`` is passed
            to a law that gives one.

    Warns:
        UserWarning: If the run is outside a range in which the law was measured.

    Example:
        >>> found = suggest(parameters=4e8, tokens=2e10)
        >>> print(found)
        step-law for 4e+08 parameters and 2e+10 tokens:
          learning rate: 0.00191
          global batch: 4.42e+05 tokens, about 45260 updates
          weight decay: not given by this law
          measured: parameters (without embeddings) 5.9e+07 to 1.07e+09, tokens 4e+09 to 1e+11
          source: Li et al., Step Law, 2025, arXiv:2503.04715
        >>> found.global_batch_size(sequence_length=2048, multiple_of=8)
        216

    References:
        Li et al., "Predictable Scale: Part I, Step Law", 2025, arXiv:2503.04715. Porian et al.,
        "Resolving Discrepancies in Compute-Optimal Scaling of Language Models", NeurIPS 2024,
        arXiv:2406.19146. Bergsma et al., "Power Lines", NeurIPS 2025, arXiv:2505.13738.
    """
    check_choice("law", law, tuple(PUBLISHED_LAWS))
    return PUBLISHED_LAWS[law].suggest(
        parameters=parameters, tokens=tokens, learning_rate=learning_rate
    )
