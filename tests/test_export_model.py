"""A model for other programs: every file answers as the model does, from physical units, for any number of points."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch
import yaml
from conftest import contents
from numpy.typing import NDArray
from training import best, equal_states, job, make_store, one_line_error, psftrain, rewrite_model

import psftrain as api
from psfgen.errors import RunMismatch
from psftrain import export as exporting
from psftrain.fit import fit

Array = NDArray[Any]
Ask = Callable[..., Array]
FILES = {
    "config": "config.json",
    "safetensors": "model.safetensors",
    "onnx": "prior_mean.onnx",
    "torch": "prior_mean.pt2",
}
DOCS = Path(__file__).parent.parent / "docs" / "export.md"


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """neural_cvae over 1 m to infinity and two focus distances of a wide sensor, exported."""
    folder = tmp_path_factory.mktemp("ranges")
    store = make_store(
        folder / "s.zarr", depth=(1000.0, math.inf), focus=(1500.0, 4000.0), field_max=0.8, sensor_mm=(8.0, 6.0)
    )
    fit(job(store, folder / "run", model__octaves=2))
    assert psftrain("export", folder / "run").code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """seed_cvae at one depth and one focus, exported."""
    folder = tmp_path_factory.mktemp("seed")
    fit(job(make_store(folder / "s.zarr"), folder / "run", model__name="seed_cvae"))
    assert psftrain("export", folder / "run").code == 0
    return folder / "run"


@pytest.fixture(params=["ranges", "seed"])
def run(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def places(run: Path, count: int) -> tuple[Array, Array, Array]:
    """Random places all over what was trained on, in float32, with the axis and the farthest distances first."""
    model, rng = api.load(run), np.random.default_rng(count)
    field = rng.uniform(-1, 1, (count, 2)) * model.field_max
    field[:1] = 0
    distances = []
    for near, far in (model.depth_mm, model.focus_mm):
        values = 1000 / rng.uniform(1000 / far, 1000 / near, count)
        values[:1] = far
        distances.append(values.astype(np.float32))
    return field.astype(np.float32), distances[0], distances[1]


def onnx_of(run: Path) -> Ask:
    session = onnxruntime.InferenceSession(run / "export" / FILES["onnx"], providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    assert names == ["field", "depth_mm", "focus_mm"]
    return lambda *given: np.asarray(session.run(None, dict(zip(names, given, strict=True)))[0])


def torch_of(run: Path) -> Ask:
    program = torch.export.load(run / "export" / FILES["torch"]).module()
    return lambda *given: np.asarray(program(*map(torch.from_numpy, given)).detach())


def safetensors_of(run: Path) -> Ask:
    return api.load(run / "export").psf


READERS = {"onnx": onnx_of, "torch": torch_of, "safetensors": safetensors_of}

# --- the files answer as the model does -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", READERS)
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_every_file_answers_as_the_model_does(run: Path, format: str, count: int) -> None:
    """Within 1e-5, for any number of points, at infinity and on the axis too; the focus that never varied is heard."""
    given = places(run, count)
    found = READERS[format](run)(*given)
    assert found.shape == (count, 3, 5, 5)
    assert found.dtype == np.float32
    assert np.abs(found - api.load(run).psf(*given)).max() < 1e-5


def test_the_kernels_depend_on_every_input(ranges: Path) -> None:
    """So that agreement means something."""
    ask = onnx_of(ranges)
    field, depth, focus = np.zeros((2, 2), "f4"), np.full(2, 1000, "f4"), np.full(2, 1500, "f4")
    base = ask(field, depth, focus)
    assert np.array_equal(base[0], base[1])
    for changed in (
        (np.array([[0.7, 0], [0, 0.7]], "f4"), depth, focus),
        (field, np.full(2, np.inf, "f4"), focus),
        (field, depth, np.full(2, 4000, "f4")),
    ):
        assert np.abs(ask(*changed) - base).max() > 1e-4


def test_the_onnx_file_says_what_it_takes(run: Path) -> None:
    """A checked model of one file, its inputs and its output named with a free number of points, and no local paths."""
    path = run / "export" / FILES["onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"field": ["N", 2], "depth_mm": ["N"], "focus_mm": ["N"], "kernels": ["N", 3, 5, 5]}
    assert str(Path(exporting.__file__).parent).encode() not in path.read_bytes()
    assert not list(path.parent.glob("*.data"))


def test_the_weights_are_those_of_the_best_checkpoint(run: Path) -> None:
    tensors = safetensors.numpy.load_file(run / "export" / FILES["safetensors"])
    state = best(run)["model"]
    assert equal_states({name: torch.from_numpy(values) for name, values in tensors.items()}, dict(state))


def test_an_export_is_loaded_as_a_run_is(ranges: Path, tmp_path: Path) -> None:
    """Moved elsewhere, without its run and its store."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ranges / "export" / name).read_bytes())
    here, there = api.load(ranges), api.load(tmp_path)
    given = places(ranges, 20)
    assert np.array_equal(there.psf(*given), here.psf(*given))
    assert (there.depth_mm, there.focus_mm, there.pitch_um) == (here.depth_mm, here.focus_mm, here.pitch_um)
    ran = psftrain("sample", tmp_path, "--grid", 2, "--depth", "inf", "--focus", "2m", "--out", tmp_path / "a.npz")
    assert ran.code == 0, ran.err


def test_config_json_says_everything_in_units(ranges: Path) -> None:
    document = json.loads((ranges / "export" / "config.json").read_text())
    assert document["model"] == "neural_cvae"
    assert document["step"] == 12
    assert document["config"] == yaml.safe_load((ranges / "config.yaml").read_text())
    assert document["fingerprint"] == best(ranges)["fingerprint"]
    inputs, output = document["inputs"], document["output"]
    assert list(inputs) == ["field", "depth_mm", "focus_mm"]
    assert inputs["field"]["range"] == pytest.approx([-0.8, 0.8])
    assert inputs["depth_mm"]["range"] == [1000, "inf"]
    assert inputs["focus_mm"]["range"] == pytest.approx([1500, 4000])
    assert output["shape"] == ["N", 3, 5, 5]
    assert output["dims"] == ["N", "wavelength", "by", "bx"]
    assert output["wavelength_um"] == [0.48, 0.55, 0.64]
    assert output["pitch_um"] == 8.0
    assert output["bx_um"] == [-16, -8, 0, 8, 16]
    assert output["by_um"] == [16, 8, 0, -8, -16]


def test_the_formulas_of_the_condition_are_those_of_training(run: Path) -> None:
    """Evaluated as they stand in config.json."""
    condition = json.loads((run / "export" / "config.json").read_text())["condition"]
    field, depth, focus = (np.float64(values) for values in places(run, 9))
    names = {"field_x": field[:, 0], "field_y": field[:, 1], "depth_mm": depth, "focus_mm": focus}
    found = [eval(condition[name], {}, names) for name in ("field_x", "field_y", "depth", "focus")]
    expected = api.load(run).trained.conditioning.encode(*field.T, 1000 / depth, 1000 / focus)
    assert np.stack(found, axis=-1) == pytest.approx(expected, abs=1e-6)


def test_full_size_kernels(tmp_path: Path) -> None:
    fit(job(make_store(tmp_path / "s.zarr", grid=3), tmp_path / "run", steps=1, data__array="psf"))
    assert psftrain("export", tmp_path / "run").code == 0
    assert onnx_of(tmp_path / "run")(*places(tmp_path / "run", 4)).shape == (4, 3, 10, 10)
    output = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["output"]
    assert output["dims"] == ["N", "wavelength", "ky", "kx"]
    assert output["kx_um"] == pytest.approx((np.arange(10) - 4.5) * 4)


# --- the command ------------------------------------------------------------------------------------------------------


def test_all_formats_and_their_largest_differences(run: Path, tmp_path: Path) -> None:
    ran = psftrain("export", run, "--out", tmp_path / "new" / "folder", "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert (document["schema"], document["command"], document["ok"]) == (1, "export", True)
    assert document["paths"] == {name: str(tmp_path / "new" / "folder" / file) for name, file in FILES.items()}
    assert set(contents(tmp_path / "new" / "folder")) == set(FILES.values())
    assert document["differences"].keys() == {"safetensors", "onnx", "torch"}
    assert document["differences"]["safetensors"] == 0
    assert all(0 <= difference < 1e-5 for difference in document["differences"].values())


@pytest.mark.parametrize("formats", [["torch"], ["safetensors", "onnx"]])
def test_chosen_formats(seed: Path, tmp_path: Path, formats: list[str]) -> None:
    words = [word for name in formats for word in ("--format", name)]
    ran = psftrain("export", seed, *words, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert set(contents(tmp_path)) == {"config.json", *(FILES[name] for name in formats)}
    for line, name in zip(ran.out.splitlines(), ("config", *formats), strict=True):
        assert line.startswith(f"{tmp_path / FILES[name]}: ")
    assert re.search(r"differs from the model by at most \d", ran.out)


def test_a_former_export_is_replaced(seed: Path, tmp_path: Path) -> None:
    for name in FILES.values():
        (tmp_path / name).write_text("old")
    assert psftrain("export", seed, "--out", tmp_path).code == 0
    assert contents(tmp_path).keys() == set(FILES.values())
    assert b"old" not in contents(tmp_path).values()


def test_the_run_stays_as_it_was(seed: Path, tmp_path: Path) -> None:
    before = contents(seed)
    assert psftrain("export", seed, "--out", tmp_path).code == 0
    assert contents(seed) == before


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_format(seed: Path, tmp_path: Path) -> None:
    ran = psftrain("export", seed, "--format", "onyx", "--out", tmp_path / "a")
    assert ran.code == 2
    error = one_line_error(ran)
    assert "unknown format 'onyx'" in error or "--format onyx: unknown format; did you mean 'onnx'?" in error
    assert "known: safetensors, onnx, torch" in error
    assert not contents(tmp_path)


@pytest.mark.parametrize("missing", [["onnx"], ["onnxruntime"], ["onnxscript", "onnxruntime"]])
def test_packages_that_are_not_there(
    seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    """One line with the command that installs them and the way without; the other formats need none of them."""
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name in missing else object())
    ran = psftrain("export", seed, "--out", tmp_path)
    assert ran.code == 2
    error = one_line_error(ran)
    assert re.search(r"--format onnx needs .*: pip install ", error)
    assert all(name in error.partition("pip install ")[2] for name in missing)
    assert error.endswith("or leave it out (--format safetensors --format torch)")
    assert not contents(tmp_path)
    assert psftrain("export", seed, "--format", "safetensors", "--format", "torch", "--out", tmp_path).code == 0


@pytest.mark.parametrize("name", ["safetensors", "onnx", "torch"])
def test_a_file_that_answers_otherwise_is_never_written(
    seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    form = exporting.FORMATS[name]

    def spoilt(data: bytes, document: dict[str, Any]) -> Ask:
        ask = form.read(data, document)
        return lambda places: ask(places) + np.float32(2e-5)

    monkeypatch.setitem(exporting.FORMATS, name, exporting.Format(form.name, form.write, spoilt))
    ran = psftrain("export", seed, "--out", tmp_path)
    assert ran.code == 1
    assert f"{form.name} differs from the model" in one_line_error(ran)
    assert not contents(tmp_path)


def test_a_model_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    fit(job(make_store(tmp_path / "s.zarr", grid=3), tmp_path / "run", steps=1))

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["from_pixel.bias"][:] = math.nan

    rewrite_model(tmp_path / "run", spoil)
    ran = psftrain("export", tmp_path / "run")
    assert ran.code == 1
    assert "differs from the model" in one_line_error(ran)
    assert not (tmp_path / "run" / "export").exists()


def test_a_place_that_cannot_be_written(seed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ran = psftrain("export", seed, "--format", "safetensors", "--out", tmp_path / "file" / "a")
    assert ran.code == 1
    assert "cannot be written" in one_line_error(ran)


def test_a_run_that_is_none(tmp_path: Path) -> None:
    ran = psftrain("export", tmp_path)
    assert ran.code == 2
    assert "is no run of psftrain" in one_line_error(ran)
    assert not contents(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _drop(path: Path) -> None:
    document = json.loads(path.read_text())
    del document["conditioning"]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("model.safetensors", _cut, "no export of psftrain that can be read"),
        ("config.json", _cut, "config.json cannot be read"),
        ("config.json", Path.unlink, "config.json cannot be read"),
        ("config.json", _drop, "no export of psftrain that can be read .*conditioning"),
    ],
)
def test_a_broken_export_is_refused(
    seed: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((seed / "export" / file).read_bytes())
    spoil(tmp_path / name)
    with pytest.raises(RunMismatch, match=message):
        api.load(tmp_path)


# --- the documented examples ------------------------------------------------------------------------------------------


def _snippets(path: Path) -> Iterable[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_documented_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a run of the name and the ranges that they speak of."""
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "psfs.zarr", grid=3, depth=(400.0, math.inf), focus=(400.0, 20000.0), field_max=0.6)
    fit(job(store, Path("runs/fit")))
    assert psftrain("export", "runs/fit").code == 0
    assert psftrain("bake", "runs/fit", "--grid", 3).code == 0
    examples = [*_snippets(DOCS), *(text for text in _snippets(DOCS.parent.parent / "README.md") if "psftrain" in text)]
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, str(DOCS), "exec"), {})
