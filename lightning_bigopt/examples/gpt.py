"""A small byte-level GPT, written as any LightningModule: nothing in it knows of this package."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

__all__ = ["BytesGPT", "CausalSelfAttention", "TransformerBlock"]


class CausalSelfAttention(nn.Module):
    """Attention of every position to itself and those before it, with rotary positions.

    Args:
        width: Features of a position; a multiple of ``2 * heads``.
        heads: Attention heads.
        length: Longest input.

    Example:
        >>> CausalSelfAttention(width=8, heads=2, length=5)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])

    References:
        Su et al., "RoFormer", 2021, Sec. 3.4.2.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, *, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.expand = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        pairs = width // heads // 2
        frequencies = 10_000.0 ** (-torch.arange(pairs) / pairs)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes positions: ``(batch, time, width)`` to the same shape."""
        batch, time, width = x.shape
        split = self.expand(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            self._rotate(query), self._rotate(key), value, is_causal=True
        )
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        return projected

    def _rotate(self, x: Tensor) -> Tensor:
        """Turns each pair of features by an angle that grows with the position."""
        cosine, sine = self.cosine[: x.shape[-2]], self.sine[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each normalized before and added to its input.

    Args:
        width: Features of a position.
        heads: Attention heads.
        length: Longest input.

    Example:
        >>> TransformerBlock(width=8, heads=2, length=5)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, *, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width=width, heads=heads, length=length)
        self.perceptron_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Refines positions: ``(batch, time, width)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        refined: Tensor = x + self.narrow(functional.gelu(self.widen(self.perceptron_norm(x))))
        return refined


class BytesGPT(LightningModule):
    """A GPT that predicts the next byte; 0.4M parameters as it stands.

    Args:
        lr: Peak learning rate of AdamW.
        weight_decay: Decay of the matrices; biases, gains and nothing else go without.
        width: Features of a position.
        layers: Transformer blocks.
        heads: Attention heads.
        length: Longest input in bytes.

    Example:
        >>> model = BytesGPT()
        >>> model(torch.zeros(2, 64, dtype=torch.long)).shape
        torch.Size([2, 64, 256])
        >>> sum(parameter.numel() for parameter in model.parameters())
        383712
    """

    def __init__(
        self,
        *,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
        length: int = 64,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of 2 * heads={2 * heads}, got {width!r}")
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.bytes = nn.Embedding(256, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width=width, heads=heads, length=length) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.validation_loss = MeanMetric()
        self._initialize()

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores the next byte at every position.

        Args:
            inputs: Bytes, int64 of shape ``(batch, time)`` with ``time <= length``.

        Returns:
            Logits of shape ``(batch, time, 256)``.
        """
        logits: Tensor = self.head(self.norm(self.blocks(self.bytes(inputs))))
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats a byte of windows ``(batch, time + 1)``."""
        logits = self(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor) -> Tensor:
        """Trains on a batch of windows."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=True)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        """Adds a batch to the validation loss."""
        self.validation_loss.update(self.loss(batch), weight=len(batch))
        self.log("val_loss", self.validation_loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with weight decay on the matrices only."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {
                "name": "decay",
                "params": [p for p in parameters if p.ndim >= 2],
                "weight_decay": self.weight_decay,
            },
            {
                "name": "no_decay",
                "params": [p for p in parameters if p.ndim < 2],
                "weight_decay": 0.0,
            },
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True)

    def _initialize(self) -> None:
        """Keeps activations near one at any depth, and the first guess near uniform."""
        for name, layer in self.blocks.named_modules():
            if isinstance(layer, nn.Linear):
                ends_branch = name.endswith(("project", "narrow"))
                branches = 2 * len(self.blocks) if ends_branch else 1
                nn.init.normal_(layer.weight, std=(layer.in_features * branches) ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.bytes.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)
