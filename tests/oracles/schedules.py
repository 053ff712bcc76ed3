"""Schedules transcribed literally from their papers, in updates t of T.

Names are those of the papers. The module does not import the package.
"""

from __future__ import annotations

import itertools
import math


def rex(t: float, big_t: float) -> float:
    """Chen, Wolfe & Kyrillidis 2022, Sec. 4: the reflected exponential, beta = 1/2."""
    return (1 - t / big_t) / (1 / 2 + 1 / 2 * (1 - t / big_t))


def sgdr(t_cur: float, t_i: float, eta_min: float, eta_max: float) -> float:
    """Loshchilov & Hutter 2017, Sec. 3, Eq. 5."""
    return eta_min + 1 / 2 * (eta_max - eta_min) * (1 + math.cos(t_cur / t_i * math.pi))


def sgdr_run(
    total: int, t_0: int, t_mult: int, eta_min: float, *, cycle_decay: float = 1.0
) -> list[float]:
    """SGDR with restarts, update by update; peaks shrink by timm's ``cycle_decay``."""
    rates, t_cur, t_i, eta_max = [], 0, t_0, 1.0
    for _ in range(total):
        rates.append(sgdr(t_cur, t_i, eta_min, eta_max))
        t_cur += 1
        if t_cur == t_i:
            t_cur, t_i, eta_max = 0, t_i * t_mult, eta_max * cycle_decay
    return rates


def noam(step_num: float, d_model: float, warmup_steps: float) -> float:
    """Vaswani et al. 2017, Sec. 5.3, Eq. 3."""
    return d_model**-0.5 * min(step_num**-0.5, step_num * warmup_steps**-1.5)


def triangular(iterations: int, stepsize: float, base_lr: float, max_lr: float) -> float:
    """Smith 2017, Sec. 3.1, the code of the triangular policy."""
    cycle = math.floor(1 + iterations / (2 * stepsize))
    x = abs(iterations / stepsize - 2 * cycle + 1)
    return base_lr + (max_lr - base_lr) * max(0, 1 - x)


def triangular2(iterations: int, stepsize: float, base_lr: float, max_lr: float) -> float:
    """Smith 2017, Sec. 3.1: the amplitude is halved after each cycle."""
    cycle = math.floor(1 + iterations / (2 * stepsize))
    x = abs(iterations / stepsize - 2 * cycle + 1)
    return base_lr + (max_lr - base_lr) * max(0, 1 - x) / 2 ** (cycle - 1)


def wsd(n: int, total: int, n_warmup: int, n_decay: int, *, shape: str, end: float) -> float:
    """Hägele et al. 2024, Sec. 3: the constant learning rate with cooldown; f(n, N, N_decay).

    The linear and the 1-sqrt forms are the paper's; cosine and exponential are Megatron's.
    """
    if n < n_warmup:
        return n / n_warmup
    if n < total - n_decay:
        return 1.0
    r = (n - (total - n_decay)) / n_decay
    f = {
        "linear": 1 - r,
        "1-sqrt": 1 - math.sqrt(r),
        "cosine": (math.cos(math.pi * r) + 1) / 2,
        "exponential": 2 * math.pow(0.5, r) - 1,
    }[shape]
    return end + f * (1 - end)


def infinite(n: int, n_warmup: int, n_cd: int, eta_const: float) -> float:
    """Ibrahim et al. 2024: warm-up, cosine "cooldown" to the constant, constant; eta_max = 1."""
    if n < n_warmup:
        return n / n_warmup
    if n < n_cd:
        return eta_const + (1 - eta_const) / 2 * (
            1 + math.cos(math.pi * (n - n_warmup) / (n_cd - n_warmup))
        )
    return eta_const


def tri_stage(
    step: int, warmup: int, hold: int, decay: int, *, init_lr_scale: float, final_lr_scale: float
) -> float:
    """Park et al. 2019, Sec. 3.2, with fairseq's scales; peak 1."""
    decay_factor = -math.log(final_lr_scale) / decay
    if step < warmup:
        return init_lr_scale + (1 - init_lr_scale) / warmup * step
    if step < warmup + hold:
        return 1.0
    if step <= warmup + hold + decay:
        return math.exp(-decay_factor * (step - warmup - hold))
    return final_lr_scale


def power(t: float, warmup: float, b: float) -> float:
    """Shen et al. 2024, Sec. 3: a power law in the updates of the run, 1 after warm-up."""
    return (t / warmup) ** b


def polynomial(iteration: float, max_iter: float, exponent: float) -> float:
    """Liu, Rabinovich & Berg 2015, Sec. 3.3: the "poly" policy of Caffe."""
    return (1 - iteration / max_iter) ** exponent


def one_cycle(
    t: float, rise: float, total: float, *, start: float, end: float, shape: str
) -> float:
    """Smith & Topin 2018, Sec. 3; cosine annealing as in fastai."""

    def anneal(a: float, b: float, p: float) -> float:
        return a + (b - a) * (p if shape == "linear" else (1 - math.cos(math.pi * p)) / 2)

    return anneal(start, 1, t / rise) if t < rise else anneal(1, end, (t - rise) / (total - rise))


def seesaw(rates: list[float]) -> tuple[list[float], list[float]]:
    """Meterez et al. 2025, Alg. 1, update by update: a decay by alpha becomes sqrt(alpha), 1/alpha.

    Returns:
        Learning rates and batches, relative to the first.
    """
    rate, batch = rates[0], 1.0
    new_rates, batches = [rate], [batch]
    peak = max(rates)
    for before, after in itertools.pairwise(rates):
        alpha = after / before if before else math.inf
        if alpha < 1 and max(new_rates) >= peak:
            rate, batch = rate * math.sqrt(alpha), batch / alpha
        else:
            rate = after
        new_rates.append(rate)
        batches.append(batch)
    return new_rates, batches
