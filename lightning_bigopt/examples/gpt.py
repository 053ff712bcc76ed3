"""A small byte-level GPT: a plain LightningModule that does not depend on this package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from lightning_bigopt.checks import check_between, check_count, check_non_negative, shown
from lightning_bigopt.type_checks import check_callable

__all__ = ["BytesGPT", "CausalSelfAttention", "TransformerBlock"]


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention with rotary position embeddings.

    Args:
        width: Number of features; a multiple of ``2 * heads``.
        heads: Number of attention heads.
        length: Maximum length of an input.

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
        """Applies attention; input and output have shape ``(batch, time, width)``."""
        batch, time, width = x.shape
        split = self.expand(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            self._rotate(query), self._rotate(key), value, is_causal=True
        )
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        return projected

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotates each pair of features by an angle proportional to the position."""
        cosine, sine = self.cosine[: x.shape[-2]], self.sine[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: attention and a two-layer perceptron with residual connections.

    Args:
        width: Number of features.
        heads: Number of attention heads.
        length: Maximum length of an input.

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
        """Applies the block; input and output have shape ``(batch, time, width)``."""
        x = x + self.attention(self.attention_norm(x))
        output: Tensor = x + self.narrow(functional.gelu(self.widen(self.perceptron_norm(x))))
        return output


class BytesGPT(LightningModule):
    """A GPT that predicts the next byte; it has 0.4M parameters by default.

    Args:
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of parameters with at least two dimensions; biases and the
            weights of normalization layers have none.
        width: Number of features.
        layers: Number of transformer blocks.
        heads: Number of attention heads.
        length: Maximum length of an input in bytes.
        optimizer: Makes the optimizer of the module, such as MuonAdamW, instead of AdamW with
            ``lr`` and ``weight_decay``; None for that AdamW.

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
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        check_non_negative("lr", lr, hint="write 3e-3")
        check_non_negative("weight_decay", weight_decay, hint="write 0.1")
        for name, size in {
            "width": width,
            "layers": layers,
            "heads": heads,
            "length": length,
        }.items():
            check_count(name, size)
            check_between(name, size, 1, 65_536, ends="[]")
        if width % (2 * heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads = 2 * {heads} = {2 * heads}, got "
                f"{shown(width)}; write {2 * heads * max(1, round(width / (2 * heads)))}"
            )
        if optimizer is not None:
            check_callable(
                "optimizer", optimizer, hint="pass functools.partial(MuonAdamW, lr=3e-3)"
            )
        self.save_hyperparameters(ignore=["optimizer"])  # a checkpoint holds plain values
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.bytes = nn.Embedding(256, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width=width, heads=heads, length=length) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.validation_loss = MeanMetric()
        self._initialize()

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes the logits of the next byte at every position.

        Args:
            inputs: Bytes, int64 of shape ``(batch, time)`` with ``time <= length``.

        Returns:
            Logits of shape ``(batch, time, 256)``.
        """
        logits: Tensor = self.head(self.norm(self.blocks(self.bytes(inputs))))
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        """Computes the mean cross-entropy, in nats per byte, of windows ``(batch, time + 1)``."""
        logits = self(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor) -> Tensor:
        """Computes and logs the loss of a batch of windows."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=True)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        """Adds a batch to the validation loss."""
        self.validation_loss.update(self.loss(batch), weight=len(batch))
        self.log("val_loss", self.validation_loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Makes the given optimizer, or an AdamW with weight decay on the matrices only."""
        if self.optimizer is not None:
            return self.optimizer(self)
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
        """Initializes weights: unit activations at any depth, and a nearly uniform prediction."""
        for name, layer in self.blocks.named_modules():
            if isinstance(layer, nn.Linear):
                # Each block adds two branches to the residual stream; scaling down the last layer
                # of each keeps the variance of their sum independent of the depth (GPT-2).
                ends_branch = name.endswith(("project", "narrow"))
                branches = 2 * len(self.blocks) if ends_branch else 1
                nn.init.normal_(layer.weight, std=(layer.in_features * branches) ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.bytes.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)
