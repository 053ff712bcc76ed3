"""What clipping costs: torch's clip and step against ours, side by side, and in a Trainer.

    python benchmarks/clipping.py --quick            # under a minute, for a first look
    python benchmarks/clipping.py --write            # the whole table, into docs/benchmarks
    python benchmarks/clipping.py --busy --write     # the same where other work is going on
    python benchmarks/clipping.py --device cuda      # on an accelerator, with memory bandwidth

Every method clips gradients that are too long by a factor of two and makes an AdamW step. Methods
take turns, in an order drawn anew for each round, and the figure is the median over rounds of a
method's time over another's in the same round, so that a machine that slows down slows all of
them. Gradients are put back before each measurement, outside the clock.
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
OURS = "NormClip, fused"
FREE_OF_SYNCHRONISATION = (OURS, "ValueClip, fused", "AGC, fused")

Step = Callable[[], object]
Times = dict[str, list[float]]


def small(tensors: int) -> list[tuple[int, ...]]:
    """Many small tensors: what is measured is the cost of a call."""
    return [(32, 32) if index % 2 == 0 else (32,) for index in range(tensors)]


def transformer(parameters: int, layers: int = 12) -> list[tuple[int, ...]]:
    """The tensors of a decoder of about so many parameters."""
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
        """What ``Trainer(gradient_clip_val=)`` calls in 32-bit precision."""
        plugin = Precision()

        def step() -> None:
            plugin.clip_gradients(optimizer, self.limit)
            optimizer.step()

        return step

    def ours(self, rule: ClippingRule, optimizer: AdamW) -> Step:
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
        """Name → step; the first is what the others are compared with."""
        scalar, limit = self.fused, self.limit
        return {
            BASELINE: self.torch_clip(self.fused),
            LIGHTNING: self.lightning_clip(self.fused),
            "fused step alone": self.fused.step,
            OURS: self.ours(NormClip(limit), self.fused),
            "torch clip + foreach step": self.torch_clip(self.foreach),
            "NormClip, foreach": self.ours(NormClip(limit), self.foreach),
            "AutoClip, fused": self.ours(AutoClip(10.0), scalar),
            "ZClip, fused": self.ours(ZClip(max_norm=limit), scalar),
            "AdaGC, fused": self.ours(AdaGC(warmup=1, max_norm=limit), scalar),
            "PerParameterNormClip, fused": self.ours(PerParameterNormClip(self.longest), scalar),
            "ValueClip, fused": self.ours(ValueClip(1.0), scalar),
            "AGC, fused": self.ours(AGC(0.01), scalar),
            "Groups of two, fused": self.ours(
                Groups({"layer0.*": NormClip(1.0), "*": NormClip(limit)}), scalar
            ),
            "UpdateClip, fused": self.ours(UpdateClip(0.1), scalar),
            "MaxUpdateRatio, fused": self.ours(MaxUpdateRatio(1e-12), scalar),
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
    """Seconds of every method in every round."""
    bench = Bench(case, device, clock)
    methods = bench.methods()
    for step in methods.values():
        bench.time(step)
        bench.time(step)
    times: Times = {name: [] for name in methods}
    for _ in range(case.rounds):
        for name in drawn(list(methods)):  # what runs behind a long step finds another cache
            times[name].append(bench.time(methods[name]))
    return times


def drawn(names: list[str]) -> list[str]:
    """The names in an order drawn anew."""
    return [names[index] for index in torch.randperm(len(names)).tolist()]


def ratio(times: Times, name: str, other: str) -> float:
    """The median of one method's time over another's in the same round."""
    pairs = zip(times[name], times[other], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def own_cost(times: Times) -> float:
    """What our clipping adds to the bare step over what torch's adds."""
    bare, ours, torchs = (
        statistics.median(times[name]) for name in ("fused step alone", OURS, BASELINE)
    )
    return (ours - bare) / max(torchs - bare, 1e-12)


class Tower(L.LightningModule):
    """Many small layers, whose forward and backward are done away with: the rest is the loop."""

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
    """Seconds a batch of a whole Trainer, the median of each fit; fits take turns."""
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
    """The machine in general terms."""
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
        f"{os.cpu_count()} cores ({names[0]}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def table(results: dict[str, Times], baseline: str) -> str:
    """Markdown: a row for each method, a column for each case."""
    lines = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in next(iter(results.values())):
        cells = [
            f"{statistics.median(times[name]) * 1e3:.2f} ms ({ratio(times, name, baseline):.2f})"
            for times in results.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aims(results: dict[str, Times]) -> str:
    """What was aimed at and what came out."""
    lines = ["| aim | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    wanted = {"300 small tensors": 0.85, "25M parameters": 0.90, "100M parameters": 0.95}
    rows: dict[str, Callable[[str, Times], tuple[float, float]]] = {
        "NormClip fused over torch's clip + fused step": lambda case, t: (
            ratio(t, OURS, BASELINE),
            wanted.get(case, 1.02),
        ),
        "clipping's own cost over torch's": lambda _, t: (own_cost(t), 0.75),
        "AutoClip over NormClip": lambda _, t: (ratio(t, "AutoClip, fused", OURS), 1.03),
        "ZClip over NormClip": lambda _, t: (ratio(t, "ZClip, fused", OURS), 1.03),
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
        f"# What clipping costs\n\nMeasured with `benchmarks/clipping.py` on {machine(device)}; "
        f"{how}. One row is clip and AdamW step, unless it says otherwise; in brackets the time "
        "over that of `torch.nn.utils.clip_grad_norm_` and the fused step, the median of pairs "
        "measured in turns, in an order drawn for each round. Every gradient was twice as long as "
        f"allowed. Rounds: {rounds}.\n\n{table(results, BASELINE)}\n\n## Aims\n\n{aims(results)}\n"
    )
    if fits:
        text += (
            "\n## In a Trainer\n\nOne batch of a fit, the time between two training steps: a "
            "model of small tensors whose loss is their sum, so that nearly all of it is "
            "Lightning's loop, backward and the fused step. In brackets the time over that with "
            f"`gradient_clip_val`. Fits took turns.\n\n{table(fits, 'gradient_clip_val')}\n"
        )
    return text


def copy_speed(device: str) -> float:
    """Bytes a second that a plain copy reads and writes: the bandwidth that there is."""
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
    """Bytes that must be moved over the time taken, for NormClip with a fused AdamW."""
    lines = [f"a plain copy: {speed / 1e9:.0f} GB/s"]
    for case in chosen:
        # The norm reads the gradient; the kernel reads and writes weight, gradient, two moments.
        moved = case.parameters * 4 * (1 + 4 + 4)
        rate = moved / statistics.median(results[case.name][OURS])
        lines.append(f"{case.name}: {rate / 1e9:.0f} GB/s, {rate / speed:.0%} of a copy's")
    return "\n".join(lines)


def check_no_synchronization(case: Case) -> str:
    """Runs the rules that promise it where a synchronization raises."""
    methods = Bench(case, "cuda", time.perf_counter).methods()
    for name in FREE_OF_SYNCHRONISATION:
        methods[name]()  # allocations and lazy initialization
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            methods[name]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"no synchronization: {', '.join(FREE_OF_SYNCHRONISATION)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--busy", action="store_true", help="one thread and its processor time: for a busy machine"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the rounds, where time is short"
    )
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
            "processor time of one thread, while other work was going on"
            if arguments.busy
            else "elapsed time"
        )
        target.write_text(page(results, fits, chosen, how, arguments.device))
        print(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
