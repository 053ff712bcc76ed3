"""Fits the laws of learning rate and batch to grids of runs, and predicts other grids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.laws.grid_data import generated_rows, read_rows
from benchmarks.laws.grid_gaps import (
    BAR,
    interpolated_gap,
    joint_law,
    mean_gap,
    nearest_gap,
    plain_law,
    split_figures,
    split_gaps,
)
from benchmarks.laws.page import write_section
from lightning_bigopt import HyperparameterLaw
from lightning_bigopt.planning.published_laws import PUBLISHED_LAWS
from lightning_bigopt.planning.sweep_table import Grid, grids_of

TITLE = "Laws of learning rate and batch"

FITTED = 8
"""Grids, those with the least compute (parameters times tokens), that are fitted."""


def grids(
    path: Path | None,
    predict_path: Path | None,
    *,
    quick: bool = False,
    write: bool = False,
) -> None:
    """Fits laws to the smaller grids, predicts others, and prints the gaps.

    Args:
        path: The file of the grids; None for generated ones.
        predict_path: The file of the grids to predict; None for the larger ones of ``path``.
        quick: Whether to generate few grids, without the splits.
        write: Whether to write the section of the page.
    """
    models = (1e8, 2e8) if quick else (1e8, 2e8, 4e8, 8e8)
    rows = generated_rows(0, models) if path is None else read_rows(path)
    all_grids = grids_of(rows)
    fitted = FITTED if len(all_grids) > FITTED else len(all_grids) - 2
    targets = all_grids[fitted:] if predict_path is None else grids_of(read_rows(predict_path))
    law = joint_law(all_grids[:fitted])
    print(f"fitted to the {fitted} grids with the least compute of {path or 'generated grids'}")
    print(f"learning rate: {formula(law.learning_rate)}, batch: {formula(law.batch_tokens)} tokens")
    for grid in targets:
        print(f"{grid.text}: {nearest_gap(law, grid):.3f} %")
    print(f"interpolated between grid points: {mean_gap(law, targets, interpolated_gap):.3f} %")
    for name, published in PUBLISHED_LAWS.items():
        if published.learning_rate is not None and path is not None:
            print(f"{name}: {mean_gap(published, targets):.3f} %")
    gaps = split_gaps(all_grids, fitted) if predict_path is None and not quick else []
    if gaps:
        print(split_text(gaps, fitted, len(all_grids)))
    print(f"mean gap {mean_gap(law, targets):.3f} %")
    if write:
        write_section(TITLE, section(law, all_grids, targets, gaps))


def formula(law: tuple[float, float, float] | None) -> str:
    """Returns a power law as text."""
    assert law is not None
    return f"{law[0]:.3g} N^{law[1]:.3f} D^{law[2]:.3f}"


def split_text(gaps: Sequence[float], fitted: int, count: int) -> str:
    """Describes the gaps of all splits."""
    mean, middle, percentile, largest, share = split_figures(gaps)
    return (
        f"{len(gaps)} splits into {fitted} fitted and {count - fitted} predicted grids: "
        f"mean {mean}, median {middle}, 90th percentile {percentile}, largest {largest}, "
        f"{share} at most {BAR} %"
    )


def section(
    law: HyperparameterLaw,
    all_grids: Sequence[Grid],
    targets: Sequence[Grid],
    gaps: Sequence[float],
) -> str:
    """Returns the section of the page."""
    fitted = len(all_grids) - len(targets)
    plain = plain_law(all_grids[:fitted])
    laws = {
        f"`HyperparameterLaw.fit`, {fitted} grids": law,
        f"line through the best runs of {fitted} grids": plain,
    }
    laws |= {
        f'`suggest(law="{name}")`': published
        for name, published in PUBLISHED_LAWS.items()
        if published.learning_rate is not None
    }
    lines = [
        f"| {name} | {mean_gap(each, targets):.3f} % | "
        f"{mean_gap(each, targets, interpolated_gap):.3f} % | "
        + (f"{mean_gap(each, all_grids):.3f} % |" if each not in (law, plain) else "|")
        for name, each in laws.items()
    ]
    each_gap = ", ".join(f"{nearest_gap(law, grid):.3f} %" for grid in targets)
    models = [grid.parameters for grid in all_grids]
    tokens = [grid.tokens for grid in all_grids]
    return f"""\
Run with `python benchmarks/loss_law.py --grids FILE --write`; measured on
{time.strftime("%Y-%m-%d")}. The file has {sum(len(grid.losses) for grid in all_grids)} runs in
{len(all_grids)} grids of learning rate and batch, published with Step Law (Li et al. 2025), for
{min(models):.3g} to {max(models):.3g} parameters and {min(tokens):.3g} to {max(tokens):.3g} tokens.

A law is fitted to the {fitted} grids with the least compute, parameters times tokens, and predicts
learning rate and batch of the others. The gap of a grid compares the run nearest to the
prediction, in the logarithms of learning rate and batch, with the best run: relative difference of
the losses. The column "interpolated" takes the loss at the prediction itself, linear between runs.

| law | mean gap, {len(targets)} predicted grids | interpolated | mean gap, {len(all_grids)} grids |
|---|---|---|---|
{chr(10).join(lines)}

The fitted law is {formula(law.learning_rate)} for the learning rate and
{formula(law.batch_tokens)} tokens for the batch; its gaps are {each_gap}.

Four predicted grids may be luck. All {len(gaps)} splits into
{fitted} fitted and {len(targets)} predicted grids:

| fit | mean | median | 90th percentile | largest | at most {BAR} % |
|---|---|---|---|---|---|
{chr(10).join(split_rows(all_grids, fitted, gaps))}

The default `within=0.01` was chosen on these grids; from 0.5 % to 1 % the figures hardly change. A
wider window fits the steep side of high learning rates, too, which shifts the optimum.

### Where the laws fail

- The laws of Step Law come from these and other grids of the same authors, so that its row is no
  prediction. "porian" counts parameters with the output layer, the file without. Its runs had a
  constant learning rate and 20 tokens per parameter, and all of these grids are outside its range.
- All grids have one architecture, tokenizer and schedule. Another group reports that Step Law's
  learning rates are 2.4 to 6.6 times too high for models below 59M parameters (Romanyukov et al.
  2026, arXiv:2609.27581, abstract).
- The exponents of a fit to few sizes are loose: those of the parameters above differ from Step
  Law's, although the predictions are close. `suggest` of a fitted law warns
  outside the range of its grids.
- "power-lines" gives no learning rate, and cannot be compared on grids.
"""


def split_rows(all_grids: Sequence[Grid], fitted: int, gaps: Sequence[float]) -> list[str]:
    """Returns the rows of the table of splits, for several fits."""
    results = {"`within=0.01` (default)": gaps}
    for within in (0.005, 0.02):
        fit = partial(joint_law, within=within)
        results[f"`within={within}`"] = split_gaps(all_grids, fitted, fit)
    results["line through the best runs"] = split_gaps(all_grids, fitted, plain_law)
    return [f"| {name} | {' | '.join(split_figures(each))} |" for name, each in results.items()]
