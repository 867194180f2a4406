"""A trained model from Python: three lines, whatever numbers come in, and nothing beyond what was trained."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training import TRAINED, best, fit_quickly, job, make_store

import psftrain
from psfgen.errors import ConfigError, RunMismatch
from psftrain import checkpoint
from psftrain.fit import fit
from psftrain.models import MODELS
from psftrain.predict import PriorMean, PsfModel
from psftrain.run import load_run
from psftrain.sample import sample

Array = NDArray[Any]
CORNERS = [[-0.8, -0.8], [0.8, -0.8], [0.0, 0.0], [0.3, 0.8]]


@pytest.fixture(scope="module", params=MODELS)
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at one depth, infinity, and one focus."""
    folder = tmp_path_factory.mktemp("single")
    store = make_store(folder / "s.zarr", depth=(math.inf,), field_max=0.8)
    fit_quickly(store, folder / "run", request.param)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained over 1 m to infinity at focus distances of 1.5 m to 4 m, up to field 0.8 of a wide sensor."""
    folder = tmp_path_factory.mktemp("load")
    store = make_store(
        folder / "s.zarr", depth=(1000.0, math.inf), focus=(1500.0, 4000.0), field_max=0.8, sensor_mm=(8.0, 6.0)
    )
    fit(job(store, folder / "run"))
    return folder / "run"


# --- the same kernels, however they are asked for ---------------------------------------------------------------------


def test_three_lines(run: Path) -> None:
    kernels = psftrain.load(run).psf(field=[0.3, -0.2], depth_mm=2000, focus_mm=2000)
    assert kernels.shape == (3, 5, 5)
    assert kernels.dtype == np.float32
    assert kernels.min() >= 0
    assert kernels.sum(axis=(-2, -1)) == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_place_is_encoded_as_in_training(run: Path) -> None:
    """What `Conditioning.encode` makes of it, decoded by hand."""
    trained, rng = load_run(run), np.random.default_rng(0)
    field, depth = rng.uniform(-0.8, 0.8, (20, 2)), 1000 / rng.uniform(0, 1, 20)
    focus = 1000 / rng.uniform(0.25, 1 / 1.5, 20)
    condition = torch.from_numpy(trained.conditioning.encode(*field.T, 1000 / depth, 1000 / focus))
    with torch.no_grad():
        expected = trained.model.decode(trained.model.prior(condition).mean, condition).numpy()
    np.testing.assert_allclose(psftrain.load(run).psf(field, depth, focus), expected, atol=1e-6)


def test_narrow_ranges_are_scaled_without_loss(run: Path) -> None:
    """Distances that differ in the seventh digit: they are scaled before they are rounded to float32."""
    trained = load_run(run)
    span = (2.5, 2.5 * (1 + 1e-6))
    narrow = type(trained.conditioning)(0.8, span, (0.5, 0.5), 0.75, 5)
    given: list[Array] = []

    class Spy(PriorMean):
        def __init__(self) -> None:
            super().__init__(trained.model, narrow)
            trained.model.prior_net.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].numpy()))  # type: ignore[operator]

    depth = 1000 / np.linspace(*span, 5)
    with torch.no_grad():
        Spy()(torch.zeros(5, 2, dtype=torch.float64), torch.from_numpy(depth), torch.full((5,), 2000.0))
    assert given[0][:, 2] == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=1e-4)


def test_the_axes_of_the_field_and_of_the_distances_lead(run: Path) -> None:
    model = psftrain.load(run)
    field = np.stack(np.meshgrid(np.linspace(-0.8, 0.8, 4), np.linspace(-0.8, 0.8, 3)), axis=-1)  # [3, 4, 2]
    depth, focus = np.array([1000.0, 3000.0, math.inf])[:, None], 2000.0
    found = model.psf(field, depth, focus)
    assert found.shape == (3, 4, 3, 5, 5)
    assert found[2, 1] == pytest.approx(model.psf(field[2, 1], math.inf, 2000), abs=1e-6)
    stack = model.psf(field[0, 0], [1000, 2000, "inf"], [[1500], [4000]])
    assert stack.shape == (2, 3, 3, 5, 5)
    assert stack[1, 2] == pytest.approx(model.psf(field[0, 0], math.inf, 4000), abs=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        list,
        np.asarray,
        lambda v: np.asarray(v, dtype=np.float64)[::1],
        lambda v: np.asfortranarray(v),
        lambda v: torch.tensor(v),
        lambda v: torch.tensor(v, dtype=torch.float64, requires_grad=True),
    ],
    ids=["list", "numpy", "float64", "columns first", "torch", "a tensor with a gradient"],
)
def test_lists_arrays_and_tensors(run: Path, form: Any) -> None:
    model = psftrain.load(run)
    depth, focus = [1000.0, 2000.0, 4000.0, math.inf], [1500.0, 2000.0, 3000.0, 4000.0]
    found = model.psf(form(CORNERS), form(depth), form(focus))
    assert isinstance(found, np.ndarray)
    expected = np.stack([model.psf(*place) for place in zip(CORNERS, depth, focus, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_batches_do_not_show(run: Path) -> None:
    model, rng = psftrain.load(run), np.random.default_rng(1)
    field, depth = rng.uniform(-0.8, 0.8, (7, 3, 2)), 1000 / rng.uniform(0, 1, (7, 3))
    whole = model.psf(field, depth, 2000)
    for batch in (1, 2, 20, 21, 5000):
        np.testing.assert_allclose(model.psf(field, depth, 2000, batch=batch), whole, atol=1e-6)


@pytest.mark.parametrize("batch", [None, 4])
def test_no_points_give_no_kernels(run: Path, batch: int | None) -> None:
    assert psftrain.load(run).psf(np.zeros((0, 2)), 2000, 2000, batch=batch).shape == (0, 3, 5, 5)
    assert psftrain.load(run).psf(np.zeros((4, 0, 2)), 2000, 2000, batch=batch).shape == (4, 0, 3, 5, 5)


def test_what_did_not_vary_need_not_be_said(single: Path) -> None:
    """For both models."""
    model = psftrain.load(single)
    found = model.psf(CORNERS)
    assert found.shape == (4, 3, 5, 5)
    assert found.sum(axis=(-2, -1)) == pytest.approx(np.ones((4, 3)), abs=1e-5)
    for given in ({"depth_mm": math.inf}, {"focus_mm": 2000}, {"depth_mm": math.inf, "focus_mm": [2000] * 4}):
        assert np.array_equal(model.psf(CORNERS, **given), found)
    points = np.column_stack([CORNERS, np.full(4, math.inf), np.full(4, 2000.0)])
    assert np.array_equal(sample(PsfModel(load_run(single)), points), found)


def test_full_size_kernels(tmp_path: Path) -> None:
    fit(job(make_store(tmp_path / "s.zarr", grid=3), tmp_path / "run", steps=1, data__array="psf"))
    model = psftrain.load(tmp_path / "run")
    assert model.psf([0, 0]).shape == (3, 10, 10)
    assert model.pitch_um == 4.0
    assert model.x_um == pytest.approx((np.arange(10) - 4.5) * 4)


@pytest.mark.parametrize("single", TRAINED, indirect=True)
def test_the_averaged_weights_are_used_where_there_are_any(single: Path, tmp_path: Path) -> None:
    state = best(single)
    state["ema"] = {name: value + 0.01 for name, value in state["model"].items()}
    checkpoint.save(tmp_path / "checkpoints" / "best.pt", state)
    averaged = psftrain.load(tmp_path).trained.model.state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in state["ema"].items())


# --- what the numbers mean --------------------------------------------------------------------------------------------


def test_what_a_user_needs_to_know(run: Path) -> None:
    model = psftrain.load(str(run))
    assert model.wavelength_um.tolist() == [0.48, 0.55, 0.64]
    assert model.pitch_um == 8.0, "of a bin: 10 samples of 4 um in 5 bins"
    assert model.x_um == pytest.approx([-16, -8, 0, 8, 16])
    assert model.y_um == pytest.approx([16, 8, 0, -8, -16]), "row 0 is scene +y"
    assert model.field_max == pytest.approx(0.8)
    assert model.depth_mm == (1000, math.inf)
    assert model.focus_mm == pytest.approx((1500, 4000))
    for word in (
        str(run),
        "0.48, 0.55, 0.64 um",
        "5 x 5 bins of 8 um",
        "depth 1000 to inf mm",
        "focus 1500 to 4000 mm",
    ):
        assert word in repr(model)


def test_it_computes_where_it_is_told(run: Path) -> None:
    assert psftrain.load(run, device="cpu").device == torch.device("cpu")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_kernels(run: Path) -> None:
    here, there = psftrain.load(run), psftrain.load(run, device="cuda")
    np.testing.assert_allclose(there.psf(CORNERS, math.inf, 2000), here.psf(CORNERS, math.inf, 2000), atol=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([0.81, 0], 2000, 2000), RunMismatch, "field 0.81 is outside the field trained on, up to 0.8"),
        (([[0, 0], [0, -0.9]], 2000, 2000), RunMismatch, "field 0.9 is outside"),
        (([math.nan, 0], 2000, 2000), RunMismatch, "field nan is outside"),
        (([0, math.inf], 2000, 2000), RunMismatch, "field inf is outside"),
        (([0, 0], 900, 2000), RunMismatch, "depth 900 mm is outside the range trained on, 1000 mm to inf"),
        (([0, 0], [2000, 0], 2000), RunMismatch, "depth 0 mm is outside"),
        (([0, 0], -2000, 2000), RunMismatch, "depth -2000 mm is outside"),
        (([0, 0], 2000, math.inf), RunMismatch, "focus inf is outside the range trained on, 1500 mm to 4000 mm"),
        (([0, 0], 2000, 1400), RunMismatch, "focus 1400 mm is outside"),
        (([0, 0], math.nan, 2000), ConfigError, "depth_mm holds NaN"),
        (([0, 0], 2000, [1500, math.nan]), ConfigError, "focus_mm holds NaN"),
        (([0, 0],), ConfigError, "trained on a range of depth_mm, 1000 to inf; say which"),
        (([0, 0], 2000), ConfigError, "trained on a range of focus_mm, 1500 to 4000; say which"),
        (([0, 0, 0], 2000, 2000), ConfigError, r"field has the shape \[3\]; give \[..., 2\]"),
        ((0.5, 2000, 2000), ConfigError, r"field has the shape \[\]"),
        (([[0, 0]] * 3, [2000] * 2, 2000), ConfigError, r"shapes \[3, 2\], \[2\], \[\] do not go together"),
        ((["left", "top"], 2000, 2000), ConfigError, "field is no array of numbers"),
        (([0, 0], "2m", 2000), ConfigError, "depth_mm is no array of numbers"),
        (([[0, 0], [0]], 2000, 2000), ConfigError, "field is no array of numbers"),
    ],
)
def test_wrong_places_are_refused(run: Path, given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        psftrain.load(run).psf(*given)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_holds_something(run: Path, batch: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 point"):
        psftrain.load(run).psf([0, 0], 2000, 2000, batch=batch)


def test_the_rim_of_the_field_is_inside(run: Path) -> None:
    model = PsfModel(load_run(run))
    assert model.psf([[0.8, -0.8], [-0.8, 0.8]], [1000, math.inf], [1500, 4000]).shape == (2, 3, 5, 5)


@pytest.mark.parametrize(("name", "told"), [("none", "does not exist; `psftrain fit"), (".", "is no run of psftrain")])
def test_a_run_that_is_none(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(RunMismatch, match=told):
        psftrain.load(tmp_path / name)


def test_a_device_that_is_not_here(run: Path) -> None:
    with pytest.raises(ConfigError, match="device cuda:99 is not here"):
        psftrain.load(run, device="cuda:99")


@pytest.mark.parametrize("key", ["config", "conditioning", "fingerprint", "model"])
@pytest.mark.parametrize("value", [5, {}, {"another": 1}], ids=str)
def test_a_checkpoint_of_another_kind_is_refused_in_one_line(run: Path, tmp_path: Path, key: str, value: Any) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    checkpoint.save(path, {**checkpoint.load(path), key: value})
    with pytest.raises(RunMismatch, match="checkpoint "):
        psftrain.load(tmp_path / "run")
