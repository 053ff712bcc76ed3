"""What clipping costs: torch's clip and step against ours, side by side, without Lightning.

    python benchmarks/clipping.py --quick            # under a minute, for a first look
    python benchmarks/clipping.py --write            # the whole table, into docs/benchmarks
    python benchmarks/clipping.py --device cuda      # on an accelerator, with memory bandwidth

Every method clips gradients that are too long by a factor of two and makes an AdamW step. Methods
take turns, round by round, and the figure is the median over rounds of a method's time over the
baseline's time in the same round, so that a machine that slows down slows all of them. Gradients
are put back before each measurement, outside the clock.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

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

Step = Callable[[], object]


def small(tensors: int) -> list[tuple[int, ...]]:
    """Many small tensors: what is measured is the cost of a call."""
    return [(32, 32) if index % 2 == 0 else (32,) for index in range(tensors)]


def transformer(parameters: int, layers: int = 12) -> list[tuple[int, ...]]:
    """The tensors of a decoder of about so many parameters."""
    width = max(64, round((parameters / (12 * layers)) ** 0.5 / 64) * 64)
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
            rounds=max(9, min(300, 60_000 // count) // (6 if quick else 1)),
        )
        for count in counts
    ]
    for size in sizes:
        rounds = max(9, min(120, 500_000_000 // size) // (6 if quick else 1))
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
            "fused step alone": self.fused.step,
            "NormClip, fused": self.ours(NormClip(limit), self.fused),
            "torch clip + foreach step": self.torch_clip(self.foreach),
            "NormClip, foreach": self.ours(NormClip(limit), self.foreach),
            "AutoClip, fused": self.ours(AutoClip(10.0), scalar),
            "ZClip, fused": self.ours(ZClip(max_norm=limit), scalar),
            "AdaGC, fused": self.ours(AdaGC(warmup=1, max_norm=limit), scalar),
            "PerParameterNormClip, fused": self.ours(PerParameterNormClip(self.longest), scalar),
            "ValueClip, fused": self.ours(ValueClip(1.0), scalar),
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


def run(case: Case, device: str, clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    """Median seconds, and the median of the time over the baseline's in the same round."""
    bench = Bench(case, device, clock)
    methods = bench.methods()
    for step in methods.values():
        bench.time(step)
        bench.time(step)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(case.rounds):
        for name, step in methods.items():
            times[name].append(bench.time(step))
    base = times[BASELINE]
    found = {}
    for name, measured in times.items():
        ratios = [mine / theirs for mine, theirs in zip(measured, base, strict=True)]
        found[name] = statistics.median(measured), statistics.median(ratios)
    return found


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


def table(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown: a row for each method, a column for each case."""
    lines = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in next(iter(results.values())):
        cells = [f"{r[name][0] * 1e3:.2f} ms ({r[name][1]:.2f})" for r in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aims(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """What was aimed at and what came out."""
    lines = ["| aim | measured |", "|---|---|"]
    wanted = {"300 small tensors": 0.85, "25M parameters": 0.90, "100M parameters": 0.95}
    for case, result in results.items():
        ratio = result["NormClip, fused"][1]
        bare = result["fused step alone"][0]
        share = (result["NormClip, fused"][0] - bare) / max(result[BASELINE][0] - bare, 1e-12)
        adaptive = max(result[f"{n}, fused"][0] for n in ("AutoClip", "ZClip"))
        agc = result["AGC, clip only"][0] / result["AGC loop, clip only"][0]
        rows = (
            (f"NormClip fused ≤ {wanted.get(case, 1.02):.2f}", ratio),
            ("clipping's own cost ≤ 0.75 of torch's", share),
            ("adaptive rules ≤ 1.03 × NormClip", adaptive / result["NormClip, fused"][0]),
            ("AGC ≤ 0.50 of a loop", agc),
        )
        lines += [f"| {case}: {aim} | {value:.2f} |" for aim, value in rows]
    return "\n".join(lines)


def page(results: dict[str, dict[str, tuple[float, float]]], device: str) -> str:
    return (
        "# What clipping costs\n\n"
        f"Measured with `benchmarks/clipping.py` on {machine(device)}. One row is clip and AdamW "
        "step, unless it says otherwise; in brackets the time over that of "
        "`torch.nn.utils.clip_grad_norm_` and the fused step, the median of pairs measured in "
        "turns. Every gradient was twice as long as allowed.\n\n"
        f"{table(results)}\n\n## Aims\n\n{aims(results)}\n"
    )


def bandwidth(results: dict[str, dict[str, tuple[float, float]]], chosen: list[Case]) -> str:
    """Bytes that must be moved over the time taken, for NormClip with a fused AdamW."""
    lines = []
    for case in chosen:
        # The norm reads the gradient; the kernel reads and writes weight, gradient, two moments.
        moved = case.parameters * 4 * (1 + 4 + 4)
        seconds = results[case.name]["NormClip, fused"][0]
        lines.append(f"{case.name}: {moved / seconds / 1e9:.0f} GB/s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--busy", action="store_true", help="one thread and its processor time: for a busy machine"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.busy else time.perf_counter
    if arguments.busy:
        torch.set_num_threads(1)
    chosen = cases(quick=arguments.quick)
    results = {}
    for case in chosen:
        results[case.name] = run(case, arguments.device, clock)
        gc.collect()
        print(f"\n{case.name} ({case.parameters:,} parameters, {case.rounds} rounds)")
        for name, (seconds, ratio) in results[case.name].items():
            print(f"  {name:30} {seconds * 1e3:10.3f} ms  {ratio:6.3f}")
    print("\n" + aims(results))
    if arguments.device == "cuda":
        print("\n" + bandwidth(results, chosen))
    if arguments.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(results, arguments.device))
        print(f"\nwritten to {PAGE}")


if __name__ == "__main__":
    main()
