"""Published laws against the formulas of the papers, and figures of the authors' own runs."""

from __future__ import annotations

import math
import re
import warnings

import pytest

from lightning_bigopt import HyperparameterLaw, Suggestion, suggest


@pytest.mark.parametrize(("parameters", "tokens"), [(6e7, 4e9), (4.29e8, 4e10), (1e9, 1e11)])
def test_step_law_is_the_formula_of_the_paper(parameters, tokens):
    found = suggest(parameters=parameters, tokens=tokens)
    rate = math.log(1.79) - 0.713 * math.log(parameters) + 0.307 * math.log(tokens)
    assert math.log(found.learning_rate) == pytest.approx(rate)
    assert math.log(found.batch_tokens) == pytest.approx(math.log(0.58) + 0.571 * math.log(tokens))
    assert found.weight_decay is None
    assert found.outside == ()


@pytest.mark.parametrize(
    ("parameters", "batch", "rate"),
    # Sequences of 2048 tokens and learning rates of the tuned runs in the authors' repository.
    [(5_173_248, 20, 1.30e-2), (28_672_000, 64, 7.40e-3), (108_462_080, 160, 4.70e-3)],
)
def test_porian_is_near_the_values_of_the_authors_runs(parameters, batch, rate):
    found = suggest(parameters=parameters, tokens=20 * parameters, law="porian")
    assert found.global_batch_size(sequence_length=2048) == pytest.approx(batch, rel=0.1)
    assert found.learning_rate == pytest.approx(rate, rel=0.1)
    assert found.outside == ()


def test_power_lines_gives_the_batch_and_the_timescale_of_the_paper():
    parameters, ratio, rate = 1e9, 40.0, 2e-3
    tokens = ratio * parameters
    found = suggest(parameters=parameters, tokens=tokens, law="power-lines", learning_rate=rate)
    assert found.batch_tokens == pytest.approx(2048 * 0.0306 * tokens**0.383)
    timescale = found.batch_tokens / (rate * found.weight_decay * tokens)
    assert timescale == pytest.approx(1.084 * ratio**-0.527)
    assert found.learning_rate == rate


def test_power_lines_without_a_learning_rate_has_no_weight_decay():
    found = suggest(parameters=1e9, tokens=4e10, law="power-lines")
    assert (found.learning_rate, found.weight_decay) == (None, None)
    assert "learning rate: not given by this law" in str(found)
    assert "weight decay: pass learning_rate= for it" in str(found)


def test_a_learning_rate_of_the_user_is_marked():
    found = suggest(parameters=1e9, tokens=4e10, law="power-lines", learning_rate=0.01)
    assert "learning rate: 0.01 (given)\n" in str(found)
    assert "(given)" not in str(suggest(parameters=1e9, tokens=4e10))


def test_a_run_outside_the_range_warns_with_range_and_factor():
    text = r"tokens 4e\+11 is a factor of 4 above 4e\+09 to 1e\+11"
    with pytest.warns(UserWarning, match=text):
        found = suggest(parameters=1e9, tokens=4e11)
    assert len(found.outside) == 1
    with pytest.warns(UserWarning, match=r"parameters 1e\+07 is a factor of 5\.9 below 5\.9e\+07"):
        suggest(parameters=1e7, tokens=4e10)


def test_porian_warns_about_another_ratio_of_tokens():
    with pytest.warns(UserWarning, match="tokens per parameter 100 is a factor of 5 above 20"):
        suggest(parameters=1e7, tokens=1e9, law="porian")


def test_a_run_inside_the_range_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suggest(parameters=1e9, tokens=4e10)
        suggest(parameters=1e7, tokens=2.02e8, law="porian")  # a ratio that is rounded to 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"law": "steplaw"}, "law must be 'step-law', 'porian' or 'power-lines', got 'steplaw'"),
        ({"tokens": 0}, "tokens must be positive and finite, got 0"),
        ({"parameters": math.nan}, "parameters must be positive and finite, got nan"),
        ({"learning_rate": 1e-3}, "learning_rate must be None with the law 'step-law', got 0.001"),
        ({"law": "power-lines", "learning_rate": -1.0}, "learning_rate must be positive"),
    ],
)
def test_wrong_arguments_of_suggest(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        suggest(**{"parameters": 1e9, "tokens": 2e10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": (1.0, 2.0)}, "learning_rate must be a coefficient and the exponents"),
        ({"batch_tokens": None}, "batch_tokens must be a coefficient and the exponents"),
        ({"batch_tokens": (-1.0, 0.0, 0.0)}, "batch_tokens[0] must be positive"),
        ({"timescale": (1.0, math.inf, 0.0)}, "timescale[1] must be finite, got inf"),
        ({"parameters": 1e8}, "parameters must be the smallest and the largest value measured"),
        ({"tokens": (2.0, 1.0)}, "tokens must be ascending, got (2.0, 1.0)"),
    ],
)
def test_wrong_arguments_of_a_law(arguments, message):
    valid = {
        "name": "mine",
        "learning_rate": (1.0, -0.5, 0.1),
        "batch_tokens": (1.0, 0.0, 0.5),
        "parameters": (1e6, 1e9),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        HyperparameterLaw(**{**valid, **arguments})


def test_lists_as_in_yaml_are_accepted():
    law = HyperparameterLaw(
        name="mine", learning_rate=None, batch_tokens=[1.0, 0.0, 0.5], parameters=[1e6, 1e9]
    )
    assert law.batch_tokens == (1.0, 0.0, 0.5)
    assert law.parameters == (1e6, 1e9)


@pytest.mark.parametrize(
    ("tokens", "multiple", "samples"),
    [(100_000.0, 1, 98), (100_000.0, 32, 96), (100.0, 1, 1), (100.0, 32, 32), (1536.0, 1, 2)],
)
def test_the_batch_in_samples_is_the_nearest_multiple(tokens, multiple, samples):
    found = Suggestion(
        law="mine",
        parameters=1e6,
        tokens=1e8,
        learning_rate=1e-3,
        batch_tokens=tokens,
        weight_decay=0.1,
        measured="",
    )
    assert found.global_batch_size(sequence_length=1024, multiple_of=multiple) == samples
