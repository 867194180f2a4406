"""Bad input to `psftrain fit`: one clear line, its exit code, and nothing half-written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Disk, contents
from fitting import last, plan_meddling, run_json, two_depths
from training import best, equal_states, job, logged, make_store, one_line_error, psftrain, words

from psfgen.errors import FitError
from psfgen.store import schema
from psftrain import checkpoint
from psftrain.fit import fit
from psftrain.step import Stepper


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores good and bad, and of things that are none, not to be changed."""
    folder = tmp_path_factory.mktemp("bad")

    def spoil(array: str, value: float) -> Callable[[str, np.ndarray], None]:
        def change(name: str, values: np.ndarray) -> None:
            if name == array:
                values[0, 0, 1, 1] = value

        return change

    good = two_depths(folder / "good.zarr")
    shutil.copytree(good, folder / "again.zarr")
    make_store(folder / "incomplete.zarr", depth=(500.0, 900.0), blocks=[1])
    make_store(folder / "dark.zarr", dark=[np.s_[...]])
    make_store(folder / "nan.zarr", change=spoil("psf_binned", math.nan))
    make_store(folder / "nan-noise.zarr", change=spoil("noise_binned", math.nan))
    make_store(folder / "lens.zarr", lens_text='{"info": "another lens"}')
    make_store(folder / "near.zarr", depth=(200.0,))
    make_store(folder / "pitch.zarr", pitch_um=5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SCHEMA_VERSION", "9.1")
        make_store(folder / "schema.zarr")
    (folder / "notes.txt").write_text("x")
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("x")
    fit(job(good, folder / "trained", steps=2))
    fit(job(make_store(folder / "fewer.zarr", wavelength=(0.5,)), folder / "trained-on-fewer", steps=2))
    return folder


@dataclass(frozen=True)
class Bad:
    """What is asked for: stores by name, options whose values in {} are names in the folder, settings."""

    code: int
    message: str
    store: Sequence[str] = ("good.zarr",)
    options: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)


INCOMPLETE = "incomplete.zarr is incomplete: 1 of 2 blocks are missing; run the same `psfgen render` again"
NOT_TRAINED = "is no run; name one that `psftrain fit` has trained, or its export"
CASES = {
    # --- stores
    "no store": Bad(1, "none.zarr does not exist; `psfgen render --out", ["none.zarr"]),
    "a text file": Bad(1, "notes.txt is no psfgen store", ["notes.txt"]),
    "a folder": Bad(1, "folder is no psfgen store", ["folder"]),
    "blocks missing": Bad(3, INCOMPLETE, ["incomplete.zarr"]),
    "another schema": Bad(1, "has schema psfgen version 9.1; this psfgen reads psfgen version 1.x", ["schema.zarr"]),
    "all vignetted": Bad(1, "every kernel of {dark.zarr} is without light; render a smaller field", ["dark.zarr"]),
    "NaN in light": Bad(1, "has NaN where light arrives; `psfgen verify {nan.zarr}` shows what", ["nan.zarr"]),
    "NaN in noise": Bad(1, "nan-noise.zarr has NaN where light arrives", ["nan-noise.zarr"]),
    "given twice": Bad(2, "are the same render; give it once", ["good.zarr", "good.zarr"]),
    "given twice, as a copy": Bad(2, "again.zarr are the same render; give it once", ["good.zarr", "again.zarr"]),
    "another pitch beside it": Bad(2, "pitch_um is 5.0, but 4.0 there", ["good.zarr", "pitch.zarr"]),
    "the second is missing": Bad(1, "none.zarr does not exist", ["good.zarr", "none.zarr"]),
    # --- validation
    "val twice": Bad(2, "val and data.val exclude each other", (), ["--val", "{near.zarr}"], {"data__val": 0.2}),
    "val and depths": Bad(
        2, "val and data.val_depth exclude each other", (), ["--val", "{near.zarr}"], {"data__val_depth": 1}
    ),
    "val of another lens": Bad(2, "lens.zarr: lens_sha256 is ", (), ["--val", "{lens.zarr}"]),
    "val of another pitch": Bad(2, "pitch_um is 5.0, but 4.0 was trained on", (), ["--val", "{pitch.zarr}"]),
    "val outside the range": Bad(
        2, "depth 200 mm is outside the range trained on, 1000 mm to inf; render", (), ["--val", "{near.zarr}"]
    ),
    "val is trained on": Bad(2, "good.zarr is trained on; give a store of other points", (), ["--val", "{good.zarr}"]),
    "val is missing": Bad(1, "none.zarr does not exist", (), ["--val", "{none.zarr}"]),
    "val is incomplete": Bad(3, INCOMPLETE, (), ["--val", "{incomplete.zarr}"]),
    "val without light": Bad(1, "every kernel of {dark.zarr} is without light", (), ["--val", "{dark.zarr}"]),
    "val with NaN": Bad(1, "nan.zarr has NaN where light arrives", (), ["--val", "{nan.zarr}"]),
    "a share of nothing": Bad(1, "data.val 0.01 withholds no point of so small a grid", settings={"data__val": 0.01}),
    "no depth between": Bad(
        2, "data.val_depth 1: the stores have 0 interior depth values to withhold", settings={"data__val_depth": 1}
    ),
    "no focus between": Bad(2, "data.val_focus 3: the stores have 0 interior focus", settings={"data__val_focus": 3}),
    "patience for nothing": Bad(
        2, "patience needs points to validate on; give --val STORE or --set data.val=0.05", settings={"patience": 2}
    ),
    # --- the weights to start from
    "init is nowhere": Bad(2, f"init {{none}} {NOT_TRAINED}", (), ["--init", "{none}"]),
    "init is a file": Bad(2, f"init {{notes.txt}} {NOT_TRAINED}", (), ["--init", "{notes.txt}"]),
    "init is no run": Bad(2, f"init {{folder}} {NOT_TRAINED}", (), ["--init", "{folder}"]),
    "init of another width": Bad(
        2,
        "init {trained}: its network has model.width 16, this one 8; give both the same",
        (),
        ["--init", "{trained}"],
        {"model__width": 8},
    ),
    "init for other kernels": Bad(
        2,
        "init {trained-on-fewer}: its network is for other kernels or another grid of field points",
        (),
        ["--init", "{trained-on-fewer}"],
    ),
    # --- settings
    "a batch too large": Bad(2, "batch 50 is larger than the 49 examples; --set batch=49", settings={"batch": 50}),
    "a batch in unequal parts": Bad(
        2,
        "batch 8 does not fall into 3 equal parts (1 process x accumulate 3); --set batch=6",
        settings={"accumulate": 3},
    ),
    "a model misspelt": Bad(
        2, "unknown model 'field_cve'; did you mean 'field_cvae'?; known:", settings={"model__name": "field_cve"}
    ),
    "a loss misspelt": Bad(
        2,
        "loss.recon.rel_l3: input should be 'mse', 'rel_l2', 'nll', 'mae', 'smooth_l1' or 'huber', got 'rel_l3'; "
        "did you mean 'rel_l2'?",
        settings={"loss__recon": "rel_l3"},
    ),
    "a smoothness misspelt": Bad(2, "did you mean 'kernels'?", settings={"loss__smooth_on": "kernel"}),
    "a mode misspelt": Bad(2, "got 'strem'; did you mean 'stream'?", settings={"data__mode": "strem"}),
    "a precision misspelt": Bad(
        2, "precision: input should be 'float32', 'bf16' or 'float64', got 'bf17'", settings={"precision": "bf17"}
    ),
    "a ramp that ends first": Bad(
        2, "loss.anneal: give [start, end], shares of the steps such as", settings={"loss__anneal": [0.5, 0.1]}
    ),
    "half a ramp": Bad(2, "loss.anneal: give [start, end], shares of the", settings={"loss__anneal": [0.5]}),
    "a number for a ramp": Bad(2, "loss.anneal: give [start, end], shares of the", settings={"loss__anneal": 0.5}),
    "a ramp in steps": Bad(2, "loss.anneal: give [start, end], shares of the", settings={"loss__anneal": [10, 500]}),
    "a GPU that is not here": Bad(2, "device cuda:9 is not here (", settings={"device": "cuda:9"}),
    "a device misspelt": Bad(2, "device: give auto, cpu, cuda or cuda:i, got 'gpu'", settings={"device": "gpu"}),
    "an average of nothing": Bad(2, "ema: input should be less than 1, got 1", settings={"ema": 1.0}),
    "neighbours of a stream": Bad(
        2,
        "loss.smooth_on posterior_mean needs the kernels of neighbours, which data.mode stream does not hold; use "
        "loss.smooth_on prior_mean or data.mode memmap",
        settings={"loss__smooth_on": "posterior_mean", "data__mode": "stream"},
    ),
    "a seed too large": Bad(2, "seed: input should be less than 9223372036854775808", settings={"seed": 2**63}),
    "a weight too large": Bad(2, "loss.beta: input should be less than or equal to", settings={"loss__beta": 1e300}),
    "steps without end": Bad(2, "steps: input should be less than 100000000", settings={"steps": 10**400}),
    "too many restarts": Bad(2, "restarts: input should be less than or equal to 20", settings={"restarts": 2000}),
    "a width too large": Bad(2, "model.width: input should be less than or equal to", settings={"model__width": 2**62}),
    "a key misspelt": Bad(2, "unknown key 'data.cahce'; did you mean 'cache'?", settings={"data__cahce": 1}),
    "a model for one depth": Bad(2, "takes one focus and one depth", settings={"model__name": "seed_cvae"}),
}


@pytest.mark.parametrize("what", CASES)
def test_is_answered_in_one_line_and_nothing_is_written(stores: Path, tmp_path: Path, what: str) -> None:
    case = CASES[what]
    names = [path.name for path in stores.iterdir()] + ["none"]

    def filled(text: str) -> str:
        for name in names:
            text = text.replace(f"{{{name}}}", str(stores / name))
        return text.replace("{none.zarr}", str(stores / "none.zarr"))

    first, *others = [str(stores / name) for name in case.store or ("good.zarr",)]
    command = ["fit", *words(Path(first), tmp_path / "run", **case.settings), *map(filled, case.options)]
    ran = psftrain(*command, *(word for other in others for word in ("--store", other)))
    assert (ran.code, filled(case.message) in one_line_error(ran)) == (case.code, True), ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err.splitlines()) == 1, "nothing but the line"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_corrupt_chunk_is_found(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", grid=4)
    (chunk,) = (file for file in (path / "psf_binned" / "c").rglob("*") if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    ran = psftrain("fit", *words(path, tmp_path / "run"))
    assert ran.code == 1
    assert "corrupt" in one_line_error(ran)
    assert not (tmp_path / "run").exists()


# --- a run directory that cannot be used ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["run", "run/deeper"])
def test_a_place_that_cannot_be_written_is_a_clear_error(stores: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "run").write_text("a file")
    ran = psftrain("fit", *words(stores / "good.zarr", tmp_path / where))
    assert ran.code == {"run": 2, "run/deeper": 1}[where]
    assert "choose another --run" in one_line_error(ran)


def test_a_read_only_disk_is_a_clear_error(stores: Path, disk: Disk) -> None:
    disk.remount("ro")
    ran = psftrain("fit", *words(stores / "good.zarr", disk.path / "run"))
    assert ran.code == 1
    assert "run cannot be written: Read-only file system; choose another --run" in one_line_error(ran)


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer tells it too
@pytest.mark.parametrize("room_kib", [8, 16, 40, 100, 160, 256, 300])
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(stores: Path, disk: Disk, room_kib: int) -> None:
    """Wherever that happens, in the log or in a checkpoint of some 53 KiB: what stands there is whole, and with space
    the same command ends with the weights of a run that was never disturbed.
    """
    command = ["fit", *words(stores / "good.zarr", disk.path / "run", steps=40)]
    undisturbed = disk.path.parent / "undisturbed"
    fit(job(stores / "good.zarr", undisturbed, steps=40))
    disk.remount(f"size={room_kib}k")
    ran = psftrain(*command)
    assert (ran.code, ran.out) == (1, "")
    line = ran.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "cannot be written: No space left on device; what was saved before is kept, the same command goes on" in line
    left = contents(disk.path / "run")
    assert not [name for name in left if name.endswith(".tmp")], "no half checkpoint takes up the space"
    for name in left:
        if name.endswith(".pt"):
            checkpoint.load(disk.path / "run" / name)
    disk.remount("size=64m")
    ran = psftrain(*command)
    assert ran.code == 0, ran.err
    for name in ("model", "optimizer", "step"):
        assert equal_states(last(disk.path / "run")[name], last(undisturbed)[name])
    assert logged(disk.path / "run") == logged(undisturbed)


# --- a loss that is no number -----------------------------------------------------------------------------------------


def test_an_absurd_rate_is_answered_with_the_step(stores: Path, tmp_path: Path) -> None:
    ran = psftrain("fit", *words(stores / "good.zarr", tmp_path / "run", lr=1e30, warmup=0, log_every=1))
    assert ran.code == 1
    assert "the loss is no longer finite at step 2;" in one_line_error(ran)
    assert "try a lower lr in another --run" in one_line_error(ran)


@pytest.mark.usefixtures("meddling")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("log_every", [1, 2, 50])
def test_the_step_is_named_and_the_checkpoint_before_is_kept(
    stores: Path, tmp_path: Path, log_every: int, precision: str
) -> None:
    """However rarely a run logs: it is the first bad step, and what is saved is never what has gone wrong."""
    plan_meddling(lambda step: math.nan if step == 7 else None)
    changes = {"model__name": "meddling", "steps": 40, "log_every": log_every, "keep": 1, "precision": precision}
    with pytest.raises(FitError, match="the loss is no longer finite at step 8;"):
        fit(job(stores / "good.zarr", tmp_path / "run", **changes))
    assert checkpoint.steps(tmp_path / "run") == [5]
    state = last(tmp_path / "run")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert equal_states(best(tmp_path / "run")["model"], state["model"])
    assert run_json(tmp_path / "run")["status"] != "finished"
    assert log_every == 50 or all(math.isfinite(line["loss/total"]) for line in logged(tmp_path / "run"))


@pytest.mark.usefixtures("meddling")
def test_the_step_is_named_in_a_part_and_after_going_on(stores: Path, tmp_path: Path) -> None:
    """Steps are counted from the run's beginning, parts of a batch are not steps."""
    config = job(stores / "good.zarr", tmp_path / "run", model__name="meddling", steps=40, accumulate=2, log_every=50)
    for _ in range(2):  # the second time from the checkpoint of step 5
        start = max([*checkpoint.steps(tmp_path / "run"), 0])
        plan_meddling(lambda part, start=start: math.nan if part == 2 * (8 - start) + 1 else None)  # type: ignore[misc]
        with pytest.raises(FitError, match="the loss is no longer finite at step 9;"):
            fit(config)


def test_weights_that_a_gradient_broke_are_not_saved(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step was finite, the next one is not taken before the checkpoint."""
    take, taken = Stepper.__call__, 0

    def breaking(self: Stepper, parts: Any) -> Any:
        nonlocal taken
        terms, taken = take(self, parts), taken + 1
        if taken == 10:
            with torch.no_grad():
                self.parameters[0].view(-1)[0] = math.nan
        return terms

    monkeypatch.setattr(Stepper, "__call__", breaking)
    with pytest.raises(FitError, match="the weights are no longer finite at step 10; what was saved before is kept"):
        fit(job(stores / "good.zarr", tmp_path / "run", steps=40, log_every=50))
    assert checkpoint.steps(tmp_path / "run") == [5]
    assert best(tmp_path / "run")["step"] == 5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "numpy"],
)
def test_memory_that_does_not_suffice_is_told(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Stepper, "__call__", fail)
    ran = psftrain("fit", *words(stores / "good.zarr", tmp_path / "run"))
    assert ran.code == 1
    assert "error: the memory of cpu is too small for this run; what was saved before is kept, try --set " in ran.err
    assert "unexpected" not in ran.err
