"""Hypothesis strategies: every schedule with random arguments."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_bigopt import schedules as s

factor = st.floats(0.0, 1.0)
decay = st.floats(0.01, 1.0)
share = st.floats(0.01, 0.3)
period = st.floats(0.01, 1.0)
rise = st.sampled_from(["linear", "cosine", "1-sqrt"])
fall = st.sampled_from(["linear", "cosine", "1-sqrt", "exponential"])
recipe = {"warmup": share, "warmup_shape": rise, "start": factor}

constant = st.builds(s.Constant, factor)
warmup_linear = st.builds(s.WarmupLinear, **recipe, end=factor)
warmup_cosine = st.builds(s.WarmupCosine, **recipe, end=factor)
stable = st.builds(s.WarmupStableDecay, **recipe, decay=share, cooldown=fall, end=factor)
infinite = st.builds(
    s.InfiniteSchedule,
    **recipe,
    decay=share,
    plateau=factor,
    cooldown=st.none() | share,
    cooldown_shape=fall,
    end=factor,
)
tri_stage = st.builds(s.TriStage, warmup=share, hold=share, decay=share, start=factor, end=decay)
one_cycle = st.builds(
    s.OneCycle, warmup=share, start=factor, end=factor, shape=st.sampled_from(["cosine", "linear"])
)
points = st.dictionaries(
    st.integers(0, 100).map(lambda percent: f"{percent}%"), factor, min_size=1, max_size=5
)
piecewise = st.builds(s.PiecewiseLinear, points)

falling = st.one_of(
    constant,
    st.builds(s.Linear, end=factor),
    st.builds(s.Cosine, end=factor),
    st.builds(s.Polynomial, power=st.floats(0.1, 4.0), end=factor),
    st.builds(s.Exponential, decay=decay, every=period),
    st.builds(s.Power, st.floats(-2.0, 0.0), timescale=period),
    st.builds(s.InverseSquareRoot, timescale=period),
    st.builds(s.REX, end=factor),
    st.builds(s.Cooldown, shape=fall, end=factor),
)
"""Schedules without a rise or a jump, from 1 (or a constant) down."""

warmed_up = st.one_of(
    st.builds(s.WarmupConstant, **recipe),
    warmup_linear,
    warmup_cosine,
    st.builds(s.WarmupInverseSquareRoot, **recipe, timescale=st.none() | period),
    stable,
    infinite,
    tri_stage,
    one_cycle,
    st.builds(s.Noam, warmup=share),
)
"""Schedules with one rise, then a fall."""

smooth = st.one_of(
    falling,
    warmed_up,
    piecewise,
    st.builds(
        s.Cyclic,
        low=factor,
        up=period,
        down=st.none() | period,
        mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
        cycle_decay=decay,
    ),
)
"""Schedules without a jump."""

stepped = st.one_of(
    st.builds(s.StepDecay, decay=decay, every=period),
    st.builds(s.MultiStep, points),
    st.builds(
        s.CosineWithRestarts,
        first_cycle=period,
        cycle_multiplier=st.floats(1.0, 3.0),
        cycle_decay=decay,
        end=factor,
    ),
)
simple = smooth | stepped


@st.composite
def chains(draw: st.DrawFn, parts: st.SearchStrategy[s.Schedule]) -> s.Schedule:
    timed = draw(st.lists(st.tuples(share, parts), min_size=1, max_size=3))
    return s.Chain([*timed, draw(parts)], seams="jump")


composed = st.one_of(
    st.builds(s.Warmup, share, simple, shape=rise, start=factor),
    chains(simple),
    st.builds(s.Product, st.lists(simple, min_size=1, max_size=3)),
    st.builds(s.Clamp, simple, low=st.floats(0.0, 0.4), high=st.floats(0.4, 1.0)),
    st.builds(s.Seesaw, st.one_of(falling, warmup_linear, warmup_cosine, stable)),
)
anything = simple | composed | st.builds(s.Warmup, share, composed) | chains(composed)
"""Schedules of all kinds, nested up to two levels deep."""

moments = st.floats(0.0, 1.0)
