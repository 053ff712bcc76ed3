"""Clipping methods transcribed literally from their papers, one tensor and one line at a time."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor


def norm(tensors: list[Tensor], p: float = 2.0) -> float:
    """Computes the norm of all tensors as one vector, in float64."""
    flat = torch.cat([t.detach().double().reshape(-1).abs() for t in tensors])
    if not flat.numel():
        return 0.0
    if p == math.inf:
        return flat.max().item()
    largest = flat.max().item()
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * (flat / largest).pow(p).sum().item() ** (1 / p)


def agc(weight: Tensor, gradient: Tensor, clip_factor: float, eps: float) -> Tensor:
    """Brock et al. 2021, eq. 3, unit by unit."""
    if weight.ndim <= 1:
        w_norm = max(norm([weight]), eps)
        g_norm = max(norm([gradient]), 1e-6)
        scale = clip_factor * w_norm / g_norm
        return gradient * scale if g_norm > clip_factor * w_norm else gradient.clone()
    units = [
        agc(w.reshape(-1), g.reshape(-1), clip_factor, eps)
        for w, g in zip(weight, gradient, strict=True)
    ]
    if not units:
        return gradient.clone()
    return torch.stack(units).reshape(gradient.shape)


def agc_loop_(
    parameters: list[torch.nn.Parameter], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    """AGC as usually implemented: one parameter at a time."""

    def unitwise_norm(x: Tensor) -> Tensor:
        if x.ndim <= 1:
            return x.norm(2.0)
        return x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)

    with torch.no_grad():
        for p in parameters:
            g = p.grad
            assert g is not None
            max_norm = unitwise_norm(p).clamp(min=eps) * clip_factor
            grad_norm = unitwise_norm(g)
            clipped = g * (max_norm / grad_norm.clamp(min=1e-6))
            g.copy_(torch.where(grad_norm < max_norm, g, clipped))


class AutoClip:
    """Seetharaman et al. 2020, Algorithm 1, over a window; the percentile is torch's."""

    def __init__(self, percentile: float, window: int) -> None:
        self.percentile, self.window, self.history = percentile, window, []

    def coefficient(self, g: float) -> float:
        self.history.append(g)
        recent = torch.tensor(self.history[-self.window :], dtype=torch.float64)
        limit = torch.quantile(recent, self.percentile / 100).item()
        return min(1.0, limit / (g + 1e-6))


class ZClip:
    """Kumar et al. 2025, Algorithm 1, the reciprocal variant."""

    def __init__(self, z: float, alpha: float, warmup: int, max_norm: float | None) -> None:
        self.z, self.alpha, self.warmup, self.max_norm = z, alpha, warmup, max_norm
        self.buffer: list[float] = []
        self.mean = self.var = None

    def coefficient(self, g: float) -> float:
        def clip_to(limit: float) -> float:
            return min(1.0, limit / (g + 1e-6))

        if self.mean is None:
            self.buffer.append(g)
            if len(self.buffer) == self.warmup:
                self.mean = statistics.fmean(self.buffer)
                self.var = statistics.pvariance(self.buffer)
            return 1.0 if self.max_norm is None else clip_to(self.max_norm)
        std = self.var**0.5
        z = (g - self.mean) / (std + 1e-6)
        if z > self.z:
            eta = z / self.z
            effective = self.mean + self.z * std / eta
            limit = effective if self.max_norm is None else min(effective, self.max_norm)
            coefficient = clip_to(limit)
        else:
            effective = g
            coefficient = 1.0 if self.max_norm is None else clip_to(self.max_norm)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * effective
        self.var = self.alpha * self.var + (1 - self.alpha) * (effective - self.mean) ** 2
        return coefficient


class AdaGC:
    """Wang et al. 2025, Algorithm 1."""

    def __init__(self, relative: float, beta: float, warmup: int, max_norm: float) -> None:
        self.relative, self.beta, self.warmup, self.max_norm = relative, beta, warmup, max_norm
        self.t = 0
        self.gamma: dict[str, float] = {}

    def clip(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        self.t += 1
        clipped = {}
        if self.t <= self.warmup:
            scale = min(1.0, self.max_norm / (norm(list(gradients.values())) + 1e-6))
            for name, g in gradients.items():
                clipped[name] = g * scale
                self.gamma[name] = min(self.gamma.get(name, math.inf), norm([clipped[name]]))
            return clipped
        for name, g in gradients.items():
            size = norm([g])
            scale = min(1.0, self.relative * self.gamma[name] / size) if size else 1.0
            clipped[name] = g * scale
            self.gamma[name] = self.beta * self.gamma[name] + (1 - self.beta) * norm(
                [clipped[name]]
            )
        return clipped


class StableAdamW:
    """Wortsman et al. 2023, Algorithm 2, one tensor; bias correction on the moments."""

    def __init__(
        self, weight: Tensor, lr: float, betas: tuple[float, float], eps: float, decay: float
    ) -> None:
        self.w = weight.detach().double().clone()
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros_like(self.w), 0
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.rms: list[float] = []

    def step(self, gradient: Tensor, limit: float = 1.0) -> Tensor:
        g, (b1, b2) = gradient.double(), self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        rms = (g**2 / v.clamp(min=self.eps**2)).mean().sqrt().item()
        self.rms.append(rms)
        eta = self.lr / max(1.0, rms / limit)
        self.w = self.w - eta * self.decay * self.w - eta * m / (v.sqrt() + self.eps)
        return self.w


class SpikeGuard:
    """NormSpike from its formula: a norm must exceed the median, and one of two other limits."""

    def __init__(
        self,
        window: int,
        *,
        armed: int,
        patience: int,
        threshold: float = 6.0,
        ratio: float = 5.0,
        margin: float = 2.0,
    ) -> None:
        self.window, self.armed, self.patience = window, armed, patience
        self.threshold, self.ratio, self.margin = threshold, ratio, margin
        self.accepted: list[float] = []
        self.refused: list[float] = []

    def accepts(self, g: float) -> bool:
        if not math.isfinite(g):
            return False
        x = math.log(g)
        seen = self.accepted[-self.window :]
        if len(seen) >= self.armed:
            steps = [seen[i + 1] - seen[i] for i in range(len(seen) - 1)]
            sigma = (
                1.4826 * statistics.median(abs(step) for step in steps) / math.sqrt(2)
                if steps
                else 0.0
            )
            center = statistics.median(seen[-max(1, self.window // 8) :])
            recent = [math.exp(y) for y in seen[-(self.window // 2) :]]
            recent.remove(max(recent))
            is_far = x > center + self.threshold * sigma or g > self.margin * max(recent)
            if g > self.ratio * math.exp(center) and is_far:
                if len(self.refused) < self.patience:
                    self.refused.append(x)
                    return False
                self.accepted = list(self.refused)
        self.refused = []
        self.accepted.append(x)
        return True
