"""Parameters of a Multi-Power Law, near to those published for language models."""

from __future__ import annotations

LAW = {
    "floor": 3.0,
    "scale": 0.5,
    "alpha": 0.5,
    "drop": 400.0,
    "drop_speed": 2.0,
    "beta": 0.6,
    "gamma": 0.65,
}
