"""Fits of the laws of learning rate and batch, against tables generated from known laws."""

from __future__ import annotations

import csv
import itertools
import math
import random
import re
import warnings

import numpy as np
import pytest
from scipy.optimize import least_squares

from lightning_bigopt import HyperparameterLaw
from lightning_bigopt.planning.sweep_table import grids_of

RATE = (20.0, -0.8, 0.25)
BATCH = (4.0, 0.1, 0.5)
MODELS = (1e7, 3e7, 1e8)
TOKENS = (1e9, 4e9, 1.6e10)
STEPS = [2.0 ** (k / 2) for k in range(-4, 5)]


def center(law, parameters, tokens):
    return law[0] * parameters ** law[1] * tokens ** law[2]


def table(*, noise=0.0, seed=0, models=MODELS, tokens=TOKENS, rate=RATE, batch=BATCH, offset=1.1):
    """Generates a grid for each model and tokens; its center is ``offset`` off the optimum."""
    generator = random.Random(seed)
    rows = []
    for n, d in itertools.product(models, tokens):
        lr, b = center(rate, n, d), center(batch, n, d)
        floor = 1.7 + 300 / n**0.34 + 300 / d**0.28
        for i, j in itertools.product(STEPS, STEPS):
            x, y = math.log(i * offset), math.log(j / offset)
            bowl = 0.02 * x * x - 0.015 * x * y + 0.02 * y * y
            rows.append(
                {
                    "parameters": n,
                    "tokens": d,
                    "learning_rate": lr * i * offset,
                    "batch_tokens": b * j / offset,
                    "loss": floor * math.exp(bowl + generator.gauss(0.0, noise)),
                }
            )
    return rows


def fitted(rows, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return HyperparameterLaw.fit(rows, **arguments)


def test_a_table_without_noise_gives_the_law_back():
    law = fitted(table())
    assert law.learning_rate == pytest.approx(RATE, rel=1e-6)
    assert law.batch_tokens == pytest.approx(BATCH, rel=1e-6)
    assert (law.parameters, law.tokens) == ((1e7, 1e8), (1e9, 1.6e10))


def test_exponents_are_within_the_spread_of_seeds_and_unbiased():
    laws = [fitted(table(noise=5e-4, seed=seed), within=0.02) for seed in range(40)]
    for known, name in ((RATE, "learning_rate"), (BATCH, "batch_tokens")):
        values = np.array([getattr(law, name) for law in laws])
        values[:, 0] = np.log(values[:, 0])
        error = values.mean(axis=0) - np.array([math.log(known[0]), *known[1:]])
        assert (np.abs(error) < 3.5 * values.std(axis=0) / math.sqrt(len(laws))).all()
        assert (values[:, 1:].std(axis=0) < 0.02).all()


def test_the_fit_is_that_of_scipy_with_centers_as_unknowns():
    rows = table(noise=5e-4, seed=3)
    law = fitted(rows)
    groups = [
        [row for row in rows if (row["parameters"], row["tokens"]) == pair]
        for pair in itertools.product(MODELS, TOKENS)
    ]
    points = []
    for g, group in enumerate(groups):
        best = min(row["loss"] for row in group)
        points += [
            (g, row, math.log(row["loss"] / best)) for row in group if row["loss"] <= 1.01 * best
        ]

    def residuals(unknown):
        rate, batch, shape, levels = unknown[:3], unknown[3:6], unknown[6:9], unknown[9:]
        found = []
        for g, row, excess in points:
            scale = np.array(
                [1.0, math.log(row["parameters"] / 3e7), math.log(row["tokens"] / 4e9)]
            )
            x = math.log(row["learning_rate"]) - rate @ scale
            y = math.log(row["batch_tokens"]) - batch @ scale
            bowl = shape[0] * x * x + shape[1] * x * y + shape[2] * y * y
            found.append(levels[g] + bowl - excess)
        return np.array(found)

    start = [math.log(center(RATE, 3e7, 4e9)), *RATE[1:], math.log(center(BATCH, 3e7, 4e9))]
    start += [*BATCH[1:], 0.02, 0.0, 0.02, *[0.0] * len(groups)]
    solved = least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    assert law.learning_rate[1:] == pytest.approx(solved[1:3], abs=1e-5)
    assert law.batch_tokens[1:] == pytest.approx(solved[4:6], abs=1e-5)
    assert math.log(center(law.learning_rate, 3e7, 4e9)) == pytest.approx(solved[0], abs=1e-5)


def test_diverged_runs_do_not_move_the_optimum():
    rows = table()
    spoiled = [
        {
            **row,
            "loss": 9.0
            if row["learning_rate"] > 2.5 * center(RATE, row["parameters"], row["tokens"])
            else row["loss"],
        }
        for row in rows
    ]
    assert fitted(spoiled).learning_rate == pytest.approx(RATE, rel=1e-6)


def test_units_of_the_columns_only_scale_the_coefficient():
    rows = [
        {**row, "tokens": row["tokens"] / 1e9, "batch_tokens": row["batch_tokens"] / 2048}
        for row in table(noise=5e-4)
    ]
    law, scaled = fitted(table(noise=5e-4)), fitted(rows)
    assert scaled.batch_tokens[1:] == pytest.approx(law.batch_tokens[1:], abs=1e-9)
    assert center(scaled.batch_tokens, 1e8, 4.0) * 2048 == pytest.approx(
        center(law.batch_tokens, 1e8, 4e9)
    )


def test_columns_and_rows_in_any_order_give_the_same_law():
    rows = table(noise=5e-4)
    shuffled = random.Random(1).sample(rows, len(rows))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    law = fitted(rows)
    for other in (fitted(shuffled), fitted({**columns, "comment": ["x"] * len(rows)})):
        assert other.learning_rate == pytest.approx(law.learning_rate, rel=1e-9)


@pytest.mark.parametrize(
    ("constant", "exponents"), [("models", (0.0, 0.25)), ("tokens", (-0.8, 0.0))]
)
def test_a_quantity_that_does_not_vary_has_the_exponent_zero(constant, exponents):
    law = fitted(table(**{constant: (2e9,)}))
    assert law.learning_rate[1:] == pytest.approx(exponents, abs=1e-9)
    with pytest.warns(UserWarning, match="is a factor of"):
        law.suggest(parameters=1.5e9, tokens=1.5e10 if constant == "tokens" else 1e9)


def test_a_fitted_law_suggests_inside_and_warns_outside_its_range():
    law = fitted(table(), name="ours", source="sweeps of May")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = law.suggest(parameters=5e7, tokens=8e9)
    assert found.learning_rate == pytest.approx(center(RATE, 5e7, 8e9))
    assert (found.law, found.source, found.weight_decay) == ("ours", "sweeps of May", None)
    with pytest.warns(UserWarning, match="parameters 1e\\+09 is a factor of 10 above"):
        law.suggest(parameters=1e9, tokens=8e9)


def test_an_optimum_at_the_edge_warns():
    rows = [
        row
        for row in table()
        if (row["parameters"], row["tokens"]) != (1e8, 1e9)
        or row["learning_rate"] > 1.5 * center(RATE, row["parameters"], row["tokens"])
    ]
    with pytest.warns(
        UserWarning, match="with 1e.08 parameters and 1e.09 tokens has the lowest le"
    ):
        HyperparameterLaw.fit(rows)


def test_a_grid_with_one_run_near_the_best_warns():
    rows = [row for row in table() if (row["parameters"], row["tokens"]) != (1e7, 1e9)]
    for factor, loss in ((0.1, 9.0), (1.0, 3.0), (10.0, 9.0)):
        for other, more in ((0.1, 1.0), (1.0, 0.0), (10.0, 1.0)):
            rows.append(
                {
                    "parameters": 1e7,
                    "tokens": 1e9,
                    "learning_rate": 1e-3 * factor,
                    "batch_tokens": 1e5 * other,
                    "loss": loss + more,
                }
            )
    with pytest.warns(UserWarning, match=r"has one run within 1\.00% of its best loss"):
        law = HyperparameterLaw.fit(rows)
    assert law.learning_rate == pytest.approx(RATE, rel=1e-6)


def test_as_many_sweeps_as_coefficients_warn():
    rows = [
        row
        for row in table()
        if (row["parameters"], row["tokens"]) in {(1e7, 1e9), (1e8, 1e9), (1e7, 1.6e10)}
    ]
    with pytest.warns(UserWarning, match="3 sweeps determine 3 coefficients exactly"):
        HyperparameterLaw.fit(rows)


GOOD = table()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "table must be a list of runs, got no rows"),
        ("file.csv", "table must be a list of rows or a mapping of columns, got 'file.csv'"),
        (3, "table must be a list of rows or a mapping of columns, got 3"),
        ([1, 2], "table[0] must be a mapping of column names to values, got 1"),
        ([{"parameters": 1e6, "tokens": 1e8}], "learning_rate, batch_tokens, loss; rename"),
        ({"parameters": [1e6], "tokens": [1e8]}, "got none named learning_rate"),
        ([{**GOOD[0], "loss": math.nan}], "loss of row 0 must be positive and finite, got nan"),
        ([GOOD[0], {**GOOD[1], "tokens": 0.0}], "tokens of row 1 must be positive and finite"),
        ([{**GOOD[0], "loss": "low"}], "loss of row 0 must be a positive and finite number, got"),
        ([{**GOOD[0], "loss": "nan"}], "loss of row 0 must be positive and finite, got nan"),
        (
            [{**row, "batch_tokens": 1e4 + 1e4 * (i % 2)} for i, row in enumerate(GOOD)],
            "with at most 2 different batch_tokens; each sweep needs at least three batches",
        ),
        (GOOD[:81], "table must be at least 2 sweeps with different parameters or tokens, got 1"),
        (
            GOOD[:1] + GOOD[81:82] + GOOD[-1:],
            "table must be runs that determine a bowl, got 3 sweeps with at most 1",
        ),
        (
            [row for n in (1e7, 1e8, 1e9) for row in table(models=(n,), tokens=(20 * n,))],
            "parameters and tokens change independently",
        ),
    ],
)
def test_bad_tables_raise(rows, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=re.escape(message)):
            HyperparameterLaw.fit(rows)


def test_rows_of_a_csv_file_are_read(tmp_path):
    path = tmp_path / "sweeps.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, GOOD[0].keys())
        writer.writeheader()
        writer.writerows(GOOD)
    with path.open(newline="") as file:
        law = fitted(csv.DictReader(file))
    assert law == fitted(GOOD)


def test_whole_updates_do_not_divide_a_sweep():
    # Tokens as they are trained: whole updates, at most 1 % below those of the plan.
    rows = [
        {**row, "tokens": row["tokens"] * (0.99 if index % 9 % 2 else 1.0)}
        for index, row in enumerate(GOOD)
    ]
    grids = grids_of(rows)
    assert [len(grid.losses) for grid in grids] == [81] * 9
    first = [row["tokens"] for row in rows if row["parameters"] == 1e7 and row["tokens"] < 2e9]
    assert grids[0].tokens == pytest.approx(np.mean(first), rel=1e-12)
    assert fitted(rows).learning_rate[1:] == pytest.approx(RATE[1:], rel=1e-6)


def test_tokens_that_differ_by_more_than_two_percent_are_other_sweeps():
    rows = [{**GOOD[0], "tokens": 1e9 * factor} for factor in (1.0, 1.019, 1.03, 1.049)]
    assert [len(grid.losses) for grid in grids_of(rows)] == [2, 2]
    other = [{**row, "parameters": 2e7} for row in rows[:1]]
    assert len(grids_of(rows[:1] + other)) == 2


def test_losses_without_a_minimum_raise():
    rows = [{**row, "loss": 3 - 0.01 * math.log(row["learning_rate"] / 1e-3) ** 2} for row in GOOD]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="whose losses have a minimum in learning rate and"):
            HyperparameterLaw.fit(rows, within=1.0)


def test_columns_of_different_lengths_raise():
    columns = {name: [row[name] for row in GOOD] for name in GOOD[0]}
    columns["loss"].pop()
    with pytest.raises(ValueError, match="columns of the same length, got parameters 729"):
        HyperparameterLaw.fit(columns)


def test_within_must_be_positive():
    with pytest.raises(ValueError, match="within must be positive and finite, got 0"):
        HyperparameterLaw.fit(GOOD, within=0)
