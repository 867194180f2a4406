"""What a run that goes wrong is told: the numbers, and settings that can be typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training import job

from psftrain.advice import collapse, overfit
from psftrain.config import load_fit_config


def settings_in(text: str) -> list[str]:
    return [found.rstrip("),").strip("'") for found in re.findall(r"--set (\S+)", text)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["loss.beta=1e-05", "loss.anneal=[0.1,0.5]", "loss.kl=0.05"]),
        ({"loss__anneal": [0.0, 0.2]}, ["loss.beta=1e-05", "loss.kl=0.05"]),
        ({"loss__anneal": [0.0, 0.2], "loss__kl": 0.1}, ["loss.beta=1e-05"]),
        ({"loss__beta": 2.0, "loss__recon": "mse"}, ["loss.beta=0.02", "loss.anneal=[0.1,0.5]", "loss.kl=0.05", None]),
    ],
)
def test_a_collapse_names_what_has_not_been_tried(changes: dict[str, Any], expected: list[str | None]) -> None:
    text = collapse(0.0123, 8, job(Path("s"), Path("r"), **changes).loss)
    assert text.startswith("the posterior has collapsed: KL 0.012 nats, 0 of 8 latent dimensions active")
    assert settings_in(text) == [setting or "loss.recon=rel_l2" for setting in expected]
    assert load_fit_config(None, settings_in(text)), "each can be given as it stands"


def test_an_overfit_names_both_errors_and_the_way_out() -> None:
    text = overfit(0.02, 0.31, job(Path("s"), Path("r"), model__width=96))
    assert "errs 31.0% on the validation points and 2.0% on the training points" in text
    assert "a denser grid" in text
    assert settings_in(text) == ["model.width=48", "model.octaves=0"]
    assert load_fit_config(None, settings_in(text)).model.width == 48
