"""A model and real text to try the package on, without a download."""

from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

__all__ = ["BytesGPT", "SourceText"]
