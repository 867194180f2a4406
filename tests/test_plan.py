"""A plan is what decides the numbers, and nothing else; blocks and shards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, lens, tiny, variant

from psfgen import catalogue
from psfgen.config import RenderConfig
from psfgen.errors import ConfigError, LensError, PlanMismatch
from psfgen.optics.lens import Lens
from psfgen.plan import INVOCATION, Plan, share

OTHER: dict[str, Any] = {
    "grid": 4,
    "layout": "cells",
    "field_max": 0.5,
    "sensor_mm": (20.0, 20.0),
    "fnum": 8.0,
    "depth": "2m",
    "focus": "2m",
    "wavelength": 0.5,
    "reference_um": 0.55,
    "spp": 128,
    "kernel_px": 14,
    "bins": 3,
    "pitch_um": 9.0,
    "engine": "deeplens",
    "bandwidth_um": 0.01,
    "response": "area",
    "seed": 1,
    "tracer": "torch",
    "tolerance": 0.1,
    "spp_max": 2**12,
    "sampling": "sobol",
    "precision": "double",
    "perturb": ({"element": 0, "tilt_deg": (0.1, 0.0)},),
    "copies": 3,
    "tolerances": {"tilt_deg": 0.01},
}
# What must be given besides, for a key to have a meaning.
SPECIMENS: dict[str, Any] = {"copies": 2, "tolerances": {"decentre_mm": 0.01}}
BESIDE: dict[str, dict[str, Any]] = {
    "tolerance": {"spp": None},
    "copies": SPECIMENS,
    "tolerances": SPECIMENS,
    "bandwidth_um": {"engine": "wave"},
    "response": {"engine": "wave"},
}
SAME: dict[str, Any] = {
    "out": "x",
    "format": "hdf5",
    "executor": "dask",
    "workers": 7,
    "memory_mib": 99,
    "device": "auto",
    "slurm": {"partition": "long"},
    "dask": {"scheduler": "tcp://localhost:8786"},
}


def plan(**changes: Any) -> Plan:
    return Plan.of(RenderConfig(**{**TINY, **changes}), lens("triplet"))


@pytest.mark.parametrize("key", OTHER)
def test_what_changes_the_numbers_changes_the_plan(key: str) -> None:
    beside = BESIDE.get(key, {})
    assert plan(**{**beside, key: OTHER[key]}).sha256 != plan(**beside).sha256


@pytest.mark.parametrize("key", SAME)
def test_where_and_how_it_runs_does_not_change_the_plan(key: str) -> None:
    assert plan(**{key: SAME[key]}).sha256 == plan().sha256


def test_every_key_is_one_or_the_other() -> None:
    assert {*OTHER, *SAME, "lens"} == set(RenderConfig.model_fields)
    assert set(INVOCATION) == set(SAME)


def test_a_lens_is_its_prescription_not_its_name(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_text(catalogue.text("triplet"))
    assert Plan.of(tiny(copy), Lens(str(copy))).sha256 == plan().sha256
    bent = variant(tmp_path, "triplet", lambda document: document["surfaces"][0].update(roc=22.1))
    assert Plan.of(tiny(copy), Lens(str(bent))).sha256 != plan().sha256


def test_the_lens_fills_in_what_is_open() -> None:
    condenser = lens("acl12708u")
    filled = Plan.of(RenderConfig(), condenser).config
    assert (filled.pitch_um, filled.field_max) == (5.0, 0.6)
    assert plan(field_max=0.3).config.field_max == 0.3


def test_the_default_job_is_the_documented_one() -> None:
    default = Plan.of(RenderConfig(), lens("acl12708u"))
    shape = {name: len(values) for name, values in default.coords.items()}
    assert shape["depth"] == len(default.blocks) == 8
    assert (shape["focus"], shape["wavelength"], shape["field_x"], shape["kx"], shape["bx"]) == (4, 3, 20, 64, 15)
    assert default.kernels == 8 * 4 * 3 * 400
    assert default.coords["depth"][[0, -1]].tolist() == [400, 20000]
    assert default.config.out == "psfs.zarr"


def test_rays_are_a_number_or_a_tolerance() -> None:
    """The tolerance stands open only until it is known that no number of rays is given."""
    assert plan().config.tolerance is None
    adaptive = plan(spp=None).config
    assert (adaptive.tolerance, adaptive.spp, adaptive.spp_max) == (0.03, None, 2**20)
    assert plan(spp=None, tolerance=0.03).sha256 == plan(spp=None).sha256


def test_the_tracer_is_what_auto_means_here() -> None:
    assert plan().config.tracer == plan(tracer="numba").config.tracer == "numba"
    assert plan().sha256 == plan(tracer="numba").sha256
    assert plan(tracer="deeplens").config.tracer == "deeplens"


def test_blocks_are_depths_of_copies() -> None:
    assert plan().blocks == range(3)
    several = plan(copies=4, tolerances={"tilt_deg": 0.1})
    assert several.blocks == range(4 * 3)
    assert several.spec.block_at(7) == {"copy": 2, "depth": 1}
    assert several.spec.blocks[7] == "copy-0002-depth-0001"
    assert (several.kernels_per_block, several.kernels) == (36, 4 * 3 * 36)
    assert several.nbytes == 4 * plan().nbytes


def test_the_document_is_plain_json() -> None:
    text = json.dumps(plan().document, allow_nan=False)
    assert '"inf"' in text
    assert math.inf in plan().config.depth


def test_a_plan_refuses_what_the_glass_does_not_reach() -> None:
    with pytest.raises(LensError, match="wavelength 3 um is outside the data of glass"):
        plan(wavelength="0.5,3.0")


@pytest.mark.parametrize("key", [key for key in OTHER if key != "engine"])
def test_a_mismatch_names_the_first_key_that_differs(key: str) -> None:
    here = plan(**BESIDE.get(key, {}))
    stored = {"plan": plan(**{**BESIDE.get(key, {}), key: OTHER[key]}).document}
    with pytest.raises(PlanMismatch, match=f"psfs.zarr exists with another plan: {key} is .*--overwrite"):
        here.require_same(stored, "psfs.zarr")
    here.require_same({"plan": json.loads(json.dumps(here.document))}, "psfs.zarr")


def test_a_mismatch_of_the_lens_is_called_lens(tmp_path: Path) -> None:
    stored = {"plan": Plan.of(tiny(tmp_path), lens("singlet")).document}
    with pytest.raises(PlanMismatch, match="another plan: lens is"):
        plan().require_same(stored, "psfs.zarr")


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_shards_part_the_blocks(count: int) -> None:
    shares = [share(range(7), f"{rank}/{count}") for rank in range(count)]
    assert sorted(np.concatenate([list(s) for s in shares]).astype(int).tolist()) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert share(range(7), None) == range(7)


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "1/", "/2", "a/b", "0/0", "1/2/3", "0.5/2"])
def test_a_wrong_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard {text}: write I/N"):
        share(range(4), text)
