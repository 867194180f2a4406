"""What docs/training.md says is so: every key with its default, every command, every scalar."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from fitting import tensorboard
from training import make_store, psftrain, solve_quickly

from psftrain.config import FitConfig, load_fit_config
from psftrain.losses import DIFFERENCES, RECONSTRUCTIONS
from psftrain.models import MODELS, defaults
from psftrain.run import _flat

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SHORT = ["steps=12", "batch=8", "warmup=2", "log_every=4", "val_every=4", "save_every=6", "device=cpu"]


def rows(title: str) -> list[list[str]]:
    """The rows of every table whose first column is called so."""
    found: list[list[str]] = []
    for table in re.findall(rf"^\| {title} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        found += [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()]
    return found


def keys_of(document: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key; the weights of the reconstruction are one value."""
    recon = document["loss"].pop("recon")
    return {**_flat(document), "loss.recon": recon}


def test_every_key_is_documented_with_its_default() -> None:
    documented = {row[0].strip("` "): row[1].strip("` ") for row in rows("key")}
    defaults = keys_of(FitConfig().model_dump())
    assert documented.keys() == defaults.keys()
    for key, text in documented.items():
        assert keys_of(load_fit_config(None, [f"{key}={text}"]).model_dump())[key] == defaults[key], key


@pytest.mark.parametrize(("file", "name"), [("field.yaml", "field_cvae"), ("canonical.yaml", "canonical")])
def test_a_solved_model_takes_one_step(file: str, name: str) -> None:
    """Its file names what else it heeds."""
    assert defaults(name) == {"steps": 1}
    assert "- **`steps`** is 1." in TEXT
    document = yaml.safe_load((ROOT / "configs" / "fit" / file).read_text())
    data = {f"data.{key}" for key in ("array", "val", "val_depth", "val_focus")}
    assert set(_flat(document)) == {"seed", "model.name", *data}
    assert "It heeds `store`, `val`, `run`, `seed` (of the random starts), `data.*` and `steps`" in TEXT


def test_every_key_is_documented_once() -> None:
    names = [row[0] for row in rows("key")]
    assert len(names) == len(set(names))


def test_the_file_of_the_defaults_names_every_key() -> None:
    """But where things are. The defaults in the tables are those of training by steps."""
    document = yaml.safe_load((ROOT / "configs" / "fit" / "neural.yaml").read_text())
    assert keys_of(document).keys() == keys_of(FitConfig().model_dump()).keys() - {"store", "run", "val", "init"}


@pytest.mark.parametrize(
    ("title", "names"),
    [
        (r"`loss\.recon`", RECONSTRUCTIONS),
        (r"`loss\.smooth_on`", DIFFERENCES),
        (r"`schedule`", ["cosine", "restarts", "constant"]),
        (r"`data\.mode`", ["resident", "memmap", "stream"]),
    ],
)
def test_every_choice_is_documented(title: str, names: Any) -> None:
    assert {name for row in rows(title) for name in re.findall(r"`(\w+)`", row[0])} == set(names)


def test_every_model_is_documented() -> None:
    assert all(f"- **`{name}`**" in TEXT for name in MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the documented commands were run one after the other, quickly."""
    folder = tmp_path_factory.mktemp("docs")
    for name, changes in (("psfs", {}), ("a", {}), ("b", {"lens_text": "{}"}), ("other-points", {"layout": "cells"})):
        make_store(folder / f"{name}.zarr", **{"grid": 8, **changes})  # type: ignore[arg-type]
    (folder / "configs").symlink_to(ROOT / "configs")
    commands = [line for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 6
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        solve_quickly(patch)
        for command in commands:
            program, *words = shlex.split(command, comments=True)
            assert program == "psftrain"
            by_steps = "neural" in command
            ran = psftrain(*words, *(f"--set={text}" for text in (SHORT if by_steps else ["device=cpu"])))
            assert ran.code == 0, (command, ran.err)
    return folder


def test_every_command_runs(folder: Path) -> None:
    by_steps = {"long", "two", "early", "adapted"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"fit", "judged", "withheld", "dry", *by_steps}


def test_every_scalar_and_picture_is_documented(folder: Path) -> None:
    """And every documented one is there, but those of a GPU."""
    documented = {name for row in rows("scalar") for name in re.findall(r"`([\w/.]+)`", row[0])}
    logged = set[str]()
    for run in ("two", "judged"):
        tags = tensorboard(folder / "runs" / run).Tags()
        logged |= set(tags["scalars"])
        assert all(f"`{name}`" in TEXT for name in tags["images"])
    assert logged - {"misfit/0.48um", "misfit/0.64um"} == documented - {"gpu/memory_gib"}


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link


def test_lines_fit() -> None:
    """Those of a table may be as long as they need to be."""
    assert [line for line in TEXT.splitlines() if len(line) > 130 and not line.startswith("|")] == []
