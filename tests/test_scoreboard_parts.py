"""The parts of the scoreboard that modules of their own measure: other distances, baked tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import solve_quickly

from psfgen.config import RenderConfig, load_config
from psfgen.errors import FitError
from psftrain import density, fidelity

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bake  # noqa: E402
import bake_section  # noqa: E402
import distances  # noqa: E402
import distances_section  # noqa: E402
import interpolate  # noqa: E402
import results  # noqa: E402
from scored import CELLS, Setting  # noqa: E402

NAMES = sorted(path.stem for path in CELLS.glob("*.yaml"))


# --- which parts there are --------------------------------------------------------------------------------------------


def test_every_part_is_a_module_and_a_section() -> None:
    parts = [part for part in interpolate.PARTS if part != "lenses"]
    assert {"interpolate", *parts} == set(results.SECTIONS)
    assert all((ROOT / "benchmarks" / f"{part}.py").exists() for part in parts)


def test_parts_are_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only those run; an unknown one is told with what there is."""
    ran: list[tuple[str, bool]] = []
    monkeypatch.setattr(bake, "measure", lambda setting, quick: ran.append(("bake", quick)))
    monkeypatch.setattr(interpolate, "single_lenses", lambda given, setting: ran.append(("lenses", given.quick)))
    command = ["interpolate.py", "--quick", "--threads", "1", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--parts", "bake"])
    with pytest.raises(SystemExit) as ended:
        interpolate.main()
    assert (ended.value.code, ran) == (0, [("bake", True)])
    monkeypatch.setattr(sys, "argv", [*command, "--parts", "bake,cake"])
    with pytest.raises(SystemExit):
        interpolate.main()
    assert "unknown part cake; known: lenses, " in capsys.readouterr().err


def test_a_part_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(setting: Setting, quick: bool) -> None:
        raise FitError("broken")

    monkeypatch.setattr(bake, "measure", fail)
    assert interpolate.measured("bake", Setting(tmp_path, 1), quick=True) == ["bake: broken"]


# --- other distances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_lenses_are_those_of_the_cells(name: str) -> None:
    """At eight depths and eight focus distances, evenly spaced in dioptres."""
    ours, cell = (load_config(RenderConfig, folder / f"{name}.yaml", []) for folder in (distances.CONFIGS, CELLS))
    for key in ("lens", "field_max", "wavelength", "pitch_um", "copies", "tolerances"):
        assert getattr(ours, key) == getattr(cell, key), key
    for known in (ours.depth, ours.focus):
        assert len(known) == 8
        assert np.diff(1 / np.array(known), 2) == pytest.approx(np.zeros(6), abs=1e-12)


def test_held_out_distances_lie_midway() -> None:
    known, held = distances.distances_of("phone", quick=False)
    for name in ("depth", "focus"):
        dioptre, between = 1 / np.array(known[name]), 1 / np.array(held[name])
        assert between == pytest.approx((dioptre[1:] + dioptre[:-1]) / 2)
    quick, _ = distances.distances_of("phone", quick=True)
    assert [len(values) for values in quick.values()] == [3, 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both parts of one lens, as quick as can be."""
    with pytest.MonkeyPatch.context() as patch:
        solve_quickly(patch)
        patch.setattr(distances, "QUICK_GRID", 4)
        patch.setattr(bake, "LEAST_S", 0.0)
        patch.setattr(bake, "ROUNDS", 1)
        patch.setattr(density, "DEFAULT", 9)
        patch.setattr(density, "PLACES", 32)
        patch.setattr(fidelity, "PLACES", 64)
        patch.setattr(density, "MOST_BYTES", 2**20)
        setting = Setting(tmp_path_factory.mktemp("parts"), 1, held_side=4, mlp_steps=2)
        for part in (distances, bake):
            part.measure(setting, quick=True)
    return setting.work


def test_what_comes_out_of_other_distances(made: Path) -> None:
    found = json.loads((made / "distances.json").read_text())
    (lens,) = found["cells"]
    assert (lens["cell"], lens["n"], len(lens["depth"]), len(lens["focus"])) == ("condenser", 4 * 16, 3, 3)
    rows = lens["rows"]
    assert {"prior_mean", "bilinear", "rbf_tps", "mlp", "noise_floor"} <= set(rows)
    assert lens["against_bilinear"]["mean"] == pytest.approx(rows["prior_mean"]["mean"] / rows["bilinear"]["mean"])
    assert lens["fit_s"] > 0
    assert {"spearman", "median_ratio"} < set(lens["calibration"])


def test_what_comes_out_of_tables(made: Path) -> None:
    one, several = json.loads((made / "bake.json").read_text())["tables"]
    assert (one["several"], several["several"]) == (False, True)
    assert one["nodes"][:2] == [1, 1]
    assert one["nodes"][2] >= 9
    assert min(several["nodes"][:2]) >= 3
    for table in (one, several):
        judged = table["judged"]
        assert judged["ratio"]["mean"] == pytest.approx(judged["table"]["mean"] / judged["model"]["mean"])
        assert set(table["ms"]["table"]) == {"1", "64", "1024"}
        assert table["memory_bytes"] == 4 * np.prod(table["nodes"]) * np.prod(table["kernel"])


def test_what_is_known_is_not_measured_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "QUICK_GRID", 4)
    monkeypatch.setattr(bake, "ROUNDS", 1)
    setting = Setting(made, 1, held_side=4, mlp_steps=2)
    for name in ("scored.fit", "scored.evaluate", "bake.fit", "bake.compared"):
        monkeypatch.setattr(name, lambda *given: pytest.fail("done again"))
    before = [json.loads((made / f"{part}.json").read_text()) for part in ("distances", "bake")]
    for part in (distances, bake):
        part.measure(setting, quick=True)
    assert [json.loads((made / f"{part}.json").read_text()) for part in ("distances", "bake")] == before


def test_the_page_has_both_sections(made: Path) -> None:
    text = results.page(made)
    for part in ("## Other depths and focus distances", "## Baked tables", "Condenser, several distances"):
        assert part in text
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1, "no broken line"


# --- what the page owns up to -----------------------------------------------------------------------------------------


def lens(name: str, bound: float, fit_s: float = 60.0, spearman: float | None = 0.9) -> dict[str, Any]:
    told = {"n": 100, "spearman": spearman, "median_ratio": None if spearman is None else 1.0}
    return {"cell": name, "against_bilinear": {"mean_bound": bound}, "fit_s": fit_s, "calibration": told}


def test_misses_of_other_distances_are_named() -> None:
    found = [lens("phone", 0.6), lens("condenser", 0.5, fit_s=301), lens("double_gauss", float("nan"), spearman=None)]
    told = distances_section.verdict(found)
    assert told[0].endswith("at most 0.5: MISSED by phone, double_gauss.")
    assert told[1].endswith("at most 5 min: MISSED by condenser.")
    assert told[2].endswith("MISSED by double_gauss.")
    assert all(line.endswith("held by all 1.") for line in distances_section.verdict([lens("phone", 0.5)]))


@pytest.mark.parametrize(("ms", "error", "wins"), [(0.5, 0.1, True), (1.5, 0.1, False), (0.5, 0.3, False)])
def test_it_is_said_where_tracing_wins(ms: float, error: float, wins: bool) -> None:
    rows = {
        "prior_mean": {"ms_per_psf": 1.0},
        "trace": {"ms_per_psf": ms, "mean": error, "prior_mean_there": 0.2},
    }
    told = distances_section.where_tracing_wins([{"cell": "phone", "rows": rows}])
    assert bool(told) == wins
    assert not wins or "better for 1 of 1 (phone): where the lens is known as well as here, trace it." in told[0]


def table(name: str, several: bool, ms: float, ratio: float) -> dict[str, Any]:
    judged = {"ratio": {"mean": ratio}}
    return {"cell": name, "several": several, "ms": {"table": {"1024": ms}}, "judged": judged}


def test_misses_of_tables_are_named() -> None:
    told = bake_section.verdict([table("phone", False, 0.01, 1.03), table("phone", True, 0.02, 1.5)])
    assert told == [
        "- Target: at most 0.01 ms a kernel at 1024: MISSED by phone (0.02).",
        "- Target: mean error at most 1.03 of the model's, one distance: held by all.",
        "- Target: mean error at most 1.03 of the model's, several distances: MISSED by phone (1.5).",
    ]
