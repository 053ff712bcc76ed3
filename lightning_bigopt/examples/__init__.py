"""An example model and an example text dataset that need no download."""

from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

__all__ = ["BytesGPT", "SourceText"]
