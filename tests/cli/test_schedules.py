"""``bigopt schedules`` lists, describes and draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bigopt import Chain, Constant, Cosine, MultiStep, Warmup, WarmupStableDecay
from lightning_bigopt import schedules as all_schedules
from lightning_bigopt.cli import __main__ as cli
from lightning_bigopt.cli.expressions import parse_schedule

PNG = b"\x89PNG\r\n\x1a\n"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["schedules", *arguments]) == 0
    return capsys.readouterr().out


def test_every_schedule_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]):
    lines = output(capsys).splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert set(listed) == set(all_schedules.__all__) - {"Schedule"}
    for text in listed.values():
        assert text.endswith((".", ":"))
        assert "`" not in text
        assert ":class:" not in text


def test_schedule_is_described_by_its_factors(capsys: pytest.CaptureFixture[str]):
    shown = output(
        capsys, "WarmupStableDecay(warmup='10%', cooldown='linear')", "--max-steps", "50"
    )
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
    assert rows["update"] == [str(5 * tenth) for tenth in range(11)]
    assert [float(cell) for cell in rows["factor"]] == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0]
    assert "warmup='10%'" in shown
    assert "boundaries: warmup ends 5, cooldown starts 40" in shown


def test_blocks_follow_the_curve(capsys: pytest.CaptureFixture[str]):
    curve = output(capsys, "Linear").splitlines()[2][2:]
    assert len(curve) == 64
    assert curve[0] == "█"
    assert curve[-1] == " "
    assert sorted(curve, reverse=True) == list(curve)
    assert set(output(capsys, "Constant(level=0.0)").splitlines()[2]) == {" "}


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_several_schedules_are_drawn_in_one_picture(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / f"two.{ending}"
    shown = output(capsys, "Cosine(end=0.1)", "OneCycle", "--picture", str(path))
    assert f"picture: {path}" in shown
    head = path.read_bytes()[:8]
    assert head.startswith({"png": PNG, "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    if ending == "svg":
        assert "Cosine(start=1.0, end=0.1)" in path.read_text()
        assert "OneCycle(" in path.read_text()


def test_unknown_file_ending_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["schedules", "Cosine", "--picture", str(tmp_path / "cosine.doc")]) == 1
    assert "bigopt: error: Format 'doc' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("WarmupStableDecay", WarmupStableDecay()),
        (" Cosine( end = 1e-1 ) ", Cosine(end=0.1)),
        ("Warmup('5%', Constant)", Warmup("5%", Constant())),
        (
            "MultiStep(milestones={'30%': 0.3, 500: 0.1})",
            MultiStep(milestones={"30%": 0.3, 500: 0.1}),
        ),
        (
            "Chain([('20%', Constant(level=0.5)), Cosine()])",
            Chain([("20%", Constant(level=0.5)), Cosine()]),
        ),
    ],
)
def test_expression_gives_the_same_schedule_as_python(text: str, schedule: object):
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Cosin", "schedule must be one of those that bigopt schedules lists, got 'Cosin'"),
        ("Schedule", "got 'Schedule'"),
        ("Cosine(", "schedule must be made of schedules and literals, got 'Cosine\\('"),
        ("3", "schedule must be made of schedules and literals, got '3'"),
        ("Cosine(end=open('x'))", "literals, got \"open\\('x'\\)\""),
        ("Cosine(**{'end': 1})", "must be made of schedules and literals"),
        ("Cosine(end=-1.0)", "end must be non-negative and finite, got -1.0"),
        ("Cosine(final=0.1)", r"Cosine must be written as Cosine\(start=1.0, end=0.0\), got"),
        ("Product", r"Product must be written as Product\(schedules\), got"),
        ("WarmupCosine(warmup='5 updates')", "warmup must have one of the units"),
    ],
)
def test_invalid_expression_prints_one_line_with_a_remedy(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)
    assert cli.main(["schedules", text]) == 1
    assert capsys.readouterr().err.startswith("bigopt: error: ")


def test_picture_without_a_schedule_raises(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["schedules", "--picture", "all.png"]) == 1
    assert "picture must come with the schedules to draw" in capsys.readouterr().err
