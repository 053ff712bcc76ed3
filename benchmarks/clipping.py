"""Measures the cost of clipping, compared with torch's clip and step, alone and in a Trainer.

    python benchmarks/clipping.py --quick            # under a minute, for a first look
    python benchmarks/clipping.py --write            # the whole table, into docs/benchmarks
    python benchmarks/clipping.py --busy --write     # the same on a machine with other work
    python benchmarks/clipping.py --device cuda      # on an accelerator, with memory bandwidth

Every method clips gradients that are too long by a factor of two and makes an AdamW step. Methods
take turns in random order. A ratio is the median over rounds of the time of one method divided by
that of another in the same round, so that a slower machine affects all methods alike. Gradients
are restored before each measurement, outside the measured time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_bigopt import GradientClipping
from lightning_bigopt.gradients import (
    AGC,
    AdaGC,
    AutoClip,
    ClippingRule,
    Groups,
    MaxUpdateRatio,
    NormClip,
    PerParameterNormClip,
    UpdateClip,
    ValueClip,
    ZClip,
    clip_gradients_,
    measure,
)

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "clipping.md"
BASELINE = "torch clip + fused step"

LIGHTNING = "Lightning's gradient_clip_val + fused step"
NORM_CLIP = "NormClip, fused"
FREE_OF_SYNCHRONIZATION = (NORM_CLIP, "ValueClip, fused", "AGC, fused")

Step = Callable[[], object]
Times = dict[str, list[float]]


def small(tensors: int) -> list[tuple[int, ...]]:
    """Returns many small shapes, with which the cost of calls dominates."""
    return [(32, 32) if index % 2 == 0 else (32,) for index in range(tensors)]


def transformer(parameters: int, layers: int = 12) -> list[tuple[int, ...]]:
    """Returns the shapes of a decoder with about this number of parameters."""
    width = round((parameters / (12 * layers)) ** 0.5 / 16) * 16
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [*(block + [(width,)] * 4) * layers, (width,), (width,)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model."""

    name: str
    shapes: list[tuple[int, ...]]
    rounds: int

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def cases(*, quick: bool) -> list[Case]:
    counts = (10, 300) if quick else (10, 100, 300, 3_000, 10_000)
    sizes = (1_000_000,) if quick else (1_000_000, 25_000_000, 100_000_000)
    found = [
        Case(
            name=f"{count:,} small tensors",
            shapes=small(count),
            rounds=max(9, min(1_000, 60_000 // count) // (6 if quick else 1)),
        )
        for count in counts
    ]
    for size in sizes:
        rounds = max(9, min(150, 400_000_000 // size) // (6 if quick else 1))
        found.append(
            Case(name=f"{size // 10**6}M parameters", shapes=transformer(size), rounds=rounds)
        )
    return found


class Bench:
    """Parameters and gradients of one case, and the methods that are measured on them."""

    def __init__(self, case: Case, device: str, clock: Callable[[], float]) -> None:
        torch.manual_seed(0)
        self.device = device
        self.clock = clock
        self.parameters = [nn.Parameter(torch.randn(s, device=device)) for s in case.shapes]
        self.saved = [torch.randn_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.saved, strict=True):
            parameter.grad = gradient.clone()
        self.named = [(f"layer{i}.weight", p) for i, p in enumerate(self.parameters)]
        norms = measure(self.named)
        self.limit = norms.value / 2
        self.longest = norms.per_tensor.max().item() / 2
        settings = {"lr": 1e-9, "weight_decay": 0.0}
        self.fused = AdamW(self.parameters, fused=True, **settings)
        self.foreach = AdamW(self.parameters, foreach=True, **settings)

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def restore(self) -> None:
        torch._foreach_copy_(self.gradients, self.saved)

    def torch_clip(self, optimizer: AdamW, *, foreach: bool | None = None) -> Step:
        def step() -> None:
            nn.utils.clip_grad_norm_(self.parameters, self.limit, foreach=foreach)
            optimizer.step()

        return step

    def lightning_clip(self, optimizer: AdamW) -> Step:
        """Returns the step that ``Trainer(gradient_clip_val=)`` makes in 32-bit precision."""
        plugin = Precision()

        def step() -> None:
            plugin.clip_gradients(optimizer, self.limit)
            optimizer.step()

        return step

    def clip_by_rule(self, rule: ClippingRule, optimizer: AdamW) -> Step:
        state = rule.initial_state()

        def step() -> None:
            clip_gradients_(self.named, rule, state=state, optimizer=optimizer)
            optimizer.step()

        return step

    def agc_loop(self) -> None:
        """AGC as it is usually written, one parameter at a time; clipping only."""
        with torch.no_grad():
            for parameter in self.parameters:
                gradient = parameter.grad
                assert gradient is not None
                dims = tuple(range(1, gradient.ndim))
                weights, sizes = (
                    (x.norm(2, dim=dims, keepdim=True) if dims else x.norm(2))
                    for x in (parameter, gradient)
                )
                limits = weights.clamp(min=1e-3) * 0.01
                clipped = gradient * (limits / sizes.clamp(min=1e-6))
                gradient.copy_(torch.where(sizes < limits, gradient, clipped))

    def methods(self) -> dict[str, Step]:
        """Returns the steps by name; the first is the baseline."""
        scalar, limit = self.fused, self.limit
        return {
            BASELINE: self.torch_clip(self.fused),
            LIGHTNING: self.lightning_clip(self.fused),
            "fused step alone": self.fused.step,
            NORM_CLIP: self.clip_by_rule(NormClip(limit), self.fused),
            "torch clip + foreach step": self.torch_clip(self.foreach),
            "NormClip, foreach": self.clip_by_rule(NormClip(limit), self.foreach),
            "AutoClip, fused": self.clip_by_rule(AutoClip(10.0), scalar),
            "ZClip, fused": self.clip_by_rule(ZClip(max_norm=limit), scalar),
            "AdaGC, fused": self.clip_by_rule(AdaGC(warmup=1, max_norm=limit), scalar),
            "PerParameterNormClip, fused": self.clip_by_rule(
                PerParameterNormClip(self.longest), scalar
            ),
            "ValueClip, fused": self.clip_by_rule(ValueClip(1.0), scalar),
            "AGC, fused": self.clip_by_rule(AGC(0.01), scalar),
            "Groups of two, fused": self.clip_by_rule(
                Groups({"layer0.*": NormClip(1.0), "*": NormClip(limit)}), scalar
            ),
            "UpdateClip, fused": self.clip_by_rule(UpdateClip(0.1), scalar),
            "MaxUpdateRatio, fused": self.clip_by_rule(MaxUpdateRatio(1e-12), scalar),
            "AGC loop, clip only": self.agc_loop,
            "AGC, clip only": lambda: clip_gradients_(self.named, AGC(0.01)),
        }

    def time(self, step: Step) -> float:
        self.restore()
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = self.clock()
        step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock() - start


def run(case: Case, device: str, clock: Callable[[], float]) -> Times:
    """Returns the seconds of every method in every round."""
    bench = Bench(case, device, clock)
    methods = bench.methods()
    for step in methods.values():
        bench.time(step)
        bench.time(step)
    times: Times = {name: [] for name in methods}
    for _ in range(case.rounds):
        for name in drawn(list(methods)):  # the previous step affects the cache
            times[name].append(bench.time(methods[name]))
    return times


def drawn(names: list[str]) -> list[str]:
    """Returns the names in random order."""
    return [names[index] for index in torch.randperm(len(names)).tolist()]


def ratio(times: Times, name: str, other: str) -> float:
    """Returns the median of the ratio of two methods' times in the same round."""
    pairs = zip(times[name], times[other], strict=True)
    return statistics.median(one / two for one, two in pairs)


def own_cost(times: Times) -> float:
    """Returns the time that NormClip adds to the bare step, relative to torch's clipping."""
    bare, norm_clip, torch_clip = (
        statistics.median(times[name]) for name in ("fused step alone", NORM_CLIP, BASELINE)
    )
    return (norm_clip - bare) / max(torch_clip - bare, 1e-12)


class Tower(L.LightningModule):
    """Many small tensors with a trivial loss: most of the time is Lightning's loop."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(shape) for shape in small(tensors))
        self.clock: Callable[[], float] = time.perf_counter
        self.starts: list[float] = []

    def training_step(self, batch: object) -> Tensor:
        self.starts.append(self.clock())
        return torch.stack([layer.sum() for layer in self.layers]).sum()

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.parameters(), lr=1e-9, fused=True)


TRAINERS: dict[str, Callable[[], dict[str, object]]] = {
    "gradient_clip_val": lambda: {"gradient_clip_val": 1.0},
    "no clipping": dict,
    "GradientClipping(NormClip)": lambda: {"callbacks": [GradientClipping(NormClip(1.0))]},
    "GradientClipping(ZClip)": lambda: {"callbacks": [GradientClipping(ZClip())]},
}


def in_a_trainer(tensors: int, clock: Callable[[], float], *, fits: int, steps: int) -> Times:
    """Returns the median seconds per batch of each fit of a Trainer; fits take turns."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: Times = {name: [] for name in TRAINERS}
    for _ in range(fits):
        for name in drawn(list(TRAINERS)):
            model = Tower(tensors)
            model.clock = clock
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # few workers, no logger
                trainer = L.Trainer(
                    accelerator="cpu",
                    max_steps=steps,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    **TRAINERS[name](),  # type: ignore[arg-type]
                )
                trainer.fit(model, torch.utils.data.DataLoader(list(range(steps))))
            between = [b - a for a, b in itertools.pairwise(model.starts)]
            times[name].append(statistics.median(between))
    return times


def machine(device: str) -> str:
    """Describes the machine."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )
    return (
        f"{os.cpu_count()} cores ({names[0]}), {_threads()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def _threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def table(results: dict[str, Times], baseline: str) -> str:
    """Formats a row for each method and a column for each case in Markdown."""
    lines = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in next(iter(results.values())):
        cells = [
            f"{statistics.median(times[name]) * 1e3:.2f} ms ({ratio(times, name, baseline):.2f})"
            for times in results.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aims(results: dict[str, Times]) -> str:
    """Formats the aims and the measured ratios in Markdown."""
    lines = ["| aim | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    wanted = {"300 small tensors": 0.85, "25M parameters": 0.90, "100M parameters": 0.95}
    rows: dict[str, Callable[[str, Times], tuple[float, float]]] = {
        "NormClip fused over torch's clip + fused step": lambda case, t: (
            ratio(t, NORM_CLIP, BASELINE),
            wanted.get(case, 1.02),
        ),
        "clipping's own cost over torch's": lambda _, t: (own_cost(t), 0.75),
        "AutoClip over NormClip": lambda _, t: (ratio(t, "AutoClip, fused", NORM_CLIP), 1.03),
        "ZClip over NormClip": lambda _, t: (ratio(t, "ZClip, fused", NORM_CLIP), 1.03),
        "AGC over a loop, clip only": lambda _, t: (
            ratio(t, "AGC, clip only", "AGC loop, clip only"),
            0.50,
        ),
    }
    for name, of in rows.items():
        cells = []
        for case, times in results.items():
            value, aim = of(case, times)
            met = round(value, 2) <= aim
            cells.append(f"{value:.2f} ({'at most' if met else '**not**'} {aim:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(
    results: dict[str, Times], fits: dict[str, Times], chosen: list[Case], how: str, device: str
) -> str:
    rounds = ", ".join(f"{case.rounds:,} ({case.name})" for case in chosen)
    text = (
        f"# The cost of clipping\n\nMeasured with `benchmarks/clipping.py` on {machine(device)}; "
        f"{how}. Each row is the time of clipping and an AdamW step, unless it says otherwise. The "
        "number in parentheses is the ratio to `torch.nn.utils.clip_grad_norm_` with the fused "
        "step: the median over pairs measured in turns, in random order in each round. Every "
        f"gradient was twice as long as the threshold. Rounds: {rounds}.\n\n"
        f"{table(results, BASELINE)}\n\n## Aims\n\n{aims(results)}\n"
    )
    if fits:
        text += (
            "\n## In a Trainer\n\nThe time between two training steps of a fit. The model consists "
            "of small tensors and its loss is their sum, so almost all of the time is Lightning's "
            "loop, the backward pass and the fused step. The number in parentheses is the ratio to "
            f"`gradient_clip_val`. Fits took turns.\n\n{table(fits, 'gradient_clip_val')}\n"
        )
    return text


def copy_speed(device: str) -> float:
    """Returns the memory bandwidth of a plain copy in bytes per second."""
    source = torch.empty(1 << (28 if device == "cuda" else 22), device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(9):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def bandwidth(results: dict[str, Times], chosen: list[Case], speed: float) -> str:
    """Returns the memory bandwidth of NormClip with a fused AdamW, as text."""
    lines = [f"a plain copy: {speed / 1e9:.0f} GB/s"]
    for case in chosen:
        # The norm reads the gradient; the kernel reads and writes weight, gradient, two moments.
        moved = case.parameters * 4 * (1 + 4 + 4)
        rate = moved / statistics.median(results[case.name][NORM_CLIP])
        lines.append(f"{case.name}: {rate / 1e9:.0f} GB/s, {rate / speed:.0%} of a copy's")
    return "\n".join(lines)


def check_no_synchronization(case: Case) -> str:
    """Checks that rules documented as free of synchronization do not synchronize."""
    methods = Bench(case, "cuda", time.perf_counter).methods()
    for name in FREE_OF_SYNCHRONIZATION:
        methods[name]()  # allocations and lazy initialization
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            methods[name]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"no synchronization: {', '.join(FREE_OF_SYNCHRONIZATION)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--busy", action="store_true", help="one thread and its processor time: for a busy machine"
    )
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the rounds to run")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.busy else time.perf_counter
    if arguments.busy:
        torch.set_num_threads(1)
    chosen = [
        replace(case, rounds=max(5, round(case.rounds * arguments.share)))
        for case in cases(quick=arguments.quick)
    ]
    results: dict[str, Times] = {}
    fits: dict[str, Times] = {}
    for case in chosen:
        results[case.name] = times = run(case, arguments.device, clock)
        gc.collect()
        print(f"\n{case.name} ({case.parameters:,} parameters, {case.rounds} rounds)")
        for name, measured in times.items():
            seconds, over = statistics.median(measured), ratio(times, name, BASELINE)
            print(f"  {name:42} {seconds * 1e3:10.3f} ms  {over:6.3f}", flush=True)
    if arguments.device == "cuda":
        print("\n" + bandwidth(results, chosen, copy_speed("cuda")))
        print(check_no_synchronization(chosen[0]))
    else:
        for count in (10, 300):
            rounds = 2 if arguments.quick else max(3, round(7 * arguments.share))
            fits[f"{count} small tensors"] = in_a_trainer(
                count, clock, fits=rounds, steps=150 if count == 10 else 60
            )
        print("\n" + table(fits, "gradient_clip_val"))
    print("\n" + aims(results))
    if arguments.write:
        target = PAGE if arguments.device == "cpu" else PAGE.with_stem("clipping_cuda")
        how = (
            "processor time of one thread, while the machine did other work"
            if arguments.busy
            else "elapsed time"
        )
        target.write_text(page(results, fits, chosen, how, arguments.device))
        print(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
