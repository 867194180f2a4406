"""Many copies of a lens: what is learned of them, one of them from a few kernels, others out of the prior."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents, fork, wait_for
from scipy.stats import spearmanr
from training import fit_quickly, kernel, make_store, one_line_error, psftrain

from psfgen.store import open_store
from psfgen.store.verify import problems
from psftrain import checkpoint, load
from psftrain.data import COPY, read_examples
from psftrain.metrics import rel_l2
from psftrain.models.expected import Case, features, fitted, pattern, spread, usual_of
from psftrain.models.field import FieldCVAE
from psftrain.models.rays import RayCVAE
from psftrain.run import load_run

LENS: dict[str, Any] = {"wavelength": (0.5, 0.6), "kernel_px": 16, "bins": 8, "focus": (500.0,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight copies that are focused differently, `runs/fit` trained on them, and two stores of the same lens."""
    path = tmp_path_factory.mktemp("copies")
    store = make_store(path / "copies.zarr", grid=4, copies=8, **LENS)
    make_store(path / "measured.zarr", grid=3, copies=8, **LENS)
    make_store(path / "one.zarr", grid=3, **LENS)
    fit_quickly(store, path / "fit", "field_cvae")
    fit_quickly(path / "one.zarr", path / "single", "field_cvae")
    return path


def test_copies_have_latents(folder: Path) -> None:
    model = load_run(folder / "fit").model
    assert 1 <= model.latent <= 32
    condition = torch.tensor([[0.3, 0.2, 0.0, 0.0], [-0.5, 1.0, 0.0, 0.0]])
    prior = model.prior(condition)
    assert torch.equal(prior.mean, torch.zeros(2, model.latent))
    kernels = model.decode(torch.randn(2, model.latent, generator=torch.Generator().manual_seed(0)), condition)
    assert torch.allclose(kernels.sum(dim=(-2, -1)), torch.ones(2, 2), atol=1e-5)


def test_a_copy_from_a_few_kernels(folder: Path) -> None:
    """The error at the kernels falls, elsewhere too, and so does what is expected; the run is one as any other."""
    given = ["adapt", folder / "fit", "--store", folder / "measured.zarr", "--copy", 7, "--out", folder / "seventh"]
    ran = psftrain(*given, "--json")
    assert ran.code == 0
    told = ran.document
    assert told["paths"] == {"run": str(folder / "seventh")}
    assert told["kernels"] == 9
    assert told["error"] < 0.7 * told["error_before"]
    assert told["error"] < told["expected"] < 1.3 * told["error"]
    assert told["expected"] < 0.8 * told["expected_before"]
    before, after = (load(folder / name).psf([[0.37, -0.61]]) for name in ("fit", "seventh"))
    assert not np.allclose(before, after, atol=1e-3)
    assert psftrain("sample", folder / "seventh", "--grid", 2, "--out", folder / "sample.npz").code == 0
    assert psftrain("export", folder / "seventh", "--format", "safetensors").code == 0


def test_the_more_is_measured_the_less_is_left_open(folder: Path) -> None:
    """The spread of likely copies shrinks from none over one to all nine kernels; forgotten, it is as before."""
    trained = load_run(folder / "fit")
    model, store = trained.model, open_store(folder / "measured.zarr")
    assert isinstance(model, FieldCVAE)
    place = model.place(torch.tensor([[0.5, -0.2, 0.0, 0.0], [0.9, 0.9, 0.0, 0.0]]))
    examples = read_examples([store], trained.conditioning, "psf_binned")
    found = [spread(model, place)]
    (own,) = np.nonzero(examples.index[:, COPY] == 3)
    for count in (1, 9):
        model.adapt([store], examples.places.select(np.isin(np.arange(len(examples)), own[:count])))
        assert model.residual.shape == (count,)
        found.append(spread(model, place))
    assert (found[0] > found[1]).all()
    assert (found[1] > found[2]).all()
    model.forget()
    assert torch.equal(spread(model, place), found[0])


def test_expected_errors_rank_as_true_ones(folder: Path) -> None:
    """Over copies measured well and badly; and they are of the right size."""
    fit_quickly(make_store(folder / "many.zarr", grid=4, copies=24, **LENS), folder / "many", "field_cvae")
    trained = load_run(folder / "many")
    model, store = trained.model, open_store(folder / "measured.zarr")
    assert isinstance(model, FieldCVAE)
    examples = read_examples([store], trained.conditioning, "psf_binned")
    hoped, errors = [], []
    for copy, count in enumerate((0, 1, 4, 7, 0, 1, 4, 7)):
        (own,) = np.nonzero(examples.index[:, COPY] == copy)
        seen = np.isin(np.arange(len(examples)), np.random.default_rng(copy).permutation(own)[:count])
        model.forget()
        if count:
            model.adapt([store], examples.places.select(seen))
        rest = torch.from_numpy(own[~seen[own]])
        condition = examples.condition[rest]
        with torch.no_grad():
            found = model.decode(model.prior(condition).mean, condition)
            expected = model.expected_error(condition)
        assert expected is not None
        hoped.append(expected.numpy())
        errors.append(rel_l2(found.numpy(), examples.kernels[rest].numpy()))
    all_hoped, all_errors = np.concatenate(hoped), np.concatenate(errors)
    assert spearmanr(all_hoped, all_errors).statistic > 0.8
    assert 0.5 < np.median(all_hoped / all_errors) < 2


def test_expected_errors_are_smooth_between_the_rings_of_the_field() -> None:
    """The points of a grid lie on few rings, each a little off the trend: between them the trend is expected."""
    side = np.linspace(-1, 1, 8)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    radius, ring = np.unique(np.round(np.hypot(*grid.T), 6), return_inverse=True)
    outwards = torch.linspace(0, 1, 60).double()[:, None] * torch.tensor([[1.0, 0.4]])
    worst = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        off = 0.1 * rng.normal(size=len(radius))[ring.ravel()]
        error = 0.01 * np.exp(np.hypot(*grid.T) + off + 0.4 * rng.normal(size=(30, len(grid))))
        rest = fitted(torch.zeros(error.size), pattern(torch.tensor(grid)).tile(30, 1), torch.tensor(error.ravel()))
        found = pattern(outwards) @ rest[1:].double()
        worst.append(float((found - np.log(0.01) - outwards.norm(dim=1)).abs().max()))
    assert np.median(worst) < 0.3, "1.1 where the cosines are free"


def test_residuals_count_by_what_is_usual_where_they_were_measured() -> None:
    """Copies are off their maps by other factors, and measured at other places of a field with a trend."""
    rng = np.random.default_rng(0)

    def case(factor: float, count: int) -> Case:
        measured, place = (torch.tensor(rng.uniform(-1, 1, (n, 4))).float() for n in (count, 50))
        residual, error = (factor * at[:, :2].norm(dim=1).exp() / 100 for at in (measured, place))
        return Case(measured, residual, place, torch.zeros(50), error)

    cases = [case(factor, int(rng.choice([1, 4, 9]))) for factor in 2 ** rng.normal(size=60)]
    usual = usual_of(cases)
    told = [features(one.place, one.measured, one.residual, usual) for one in cases]
    rest = fitted(torch.zeros(3000), torch.cat(told), torch.cat([one.error for one in cases]))
    hoped = (torch.cat(told) @ rest[1:]).exp()
    np.testing.assert_allclose(hoped, torch.cat([one.error for one in cases]), rtol=0.2)


def test_what_was_measured_is_kept_with_the_model(folder: Path) -> None:
    """A model loaded anew expects the same."""
    trained = load_run(folder / "fit")
    model, store = trained.model, open_store(folder / "measured.zarr")
    assert isinstance(model, FieldCVAE)
    examples = read_examples([store], trained.conditioning, "psf_binned")
    model.adapt([store], examples.places.select(examples.index[:, COPY] == 2))
    again = FieldCVAE(model.config, model.shape, model.conditioning)
    again.load_state_dict(model.state_dict())
    condition = examples.condition[:5]
    found, expected = again.expected_error(condition), model.expected_error(condition)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_drawn_copies_have_the_moments_of_the_prior(folder: Path) -> None:
    """Before a copy is taken they are standard normal; then they vary about it as far as it is not known."""
    trained = load_run(folder / "fit")
    model, store = trained.model, open_store(folder / "measured.zarr")
    assert isinstance(model, FieldCVAE)
    z = model.draw(4000, seed=0)
    assert torch.allclose(z.mean(dim=0), torch.zeros(model.latent), atol=0.08)
    assert torch.allclose(torch.atleast_2d(torch.cov(z.T)), torch.eye(model.latent), atol=0.12)
    examples = read_examples([store], trained.conditioning, "psf_binned")
    known = model.adapt([store], examples.places.select(examples.index[:, COPY] == 1))
    z = model.draw(4000, seed=0)
    width = np.sqrt(np.diag(known.covariance))
    assert np.allclose(z.mean(dim=0), known.mean, atol=0.1 * width.max())
    assert np.allclose(z.std(dim=0), width, rtol=0.1)


def test_the_posterior_of_one_kernel_nears_it(folder: Path) -> None:
    """Kernels of an extreme copy are met better with the latents that they tell than with the mean's."""
    trained = load_run(folder / "fit")
    extreme = trained.model.draw(1, seed=1) * 1.5
    condition = torch.tensor([[0.4, 0.4, 0.0, 0.0]])
    truth = trained.model.decode(extreme, condition)
    found = trained.model.posterior(truth, condition)
    errors = [(trained.model.decode(z, condition) - truth).norm() for z in (found.mean, torch.zeros_like(extreme))]
    assert errors[0] < 0.7 * errors[1]
    assert (found.logvar <= trained.model.prior(condition).logvar + 1e-5).all()


def test_copies_out_of_the_prior(folder: Path, tmp_path: Path) -> None:
    """Each is one lens all over the field; the seed says which."""
    given = ["sample", folder / "fit", "--grid", 3, "--prior", 6]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert psftrain(*given, "--seed", seed, "--out", tmp_path / f"{name}.npz").code == 0
    a, b, c = (np.load(tmp_path / f"{name}.npz")["psf_binned"] for name in "abc")
    assert a.shape == (6, 1, 1, 3, 3, 2, 8, 8)
    assert np.array_equal(a, b)
    assert not np.allclose(a, c)
    assert a.std(axis=0).max() > 1e-3
    points = tmp_path / "points.csv"
    points.write_text("field_x,field_y,depth_mm,focus_mm\n1.2,0,2000,500\n")
    given = ["sample", folder / "fit", "--at", points, "--prior", 2, "--out", tmp_path / "d.npz"]
    assert "is outside the field" in one_line_error(psftrain(*given))
    assert psftrain(*given, "--outside").code == 0


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("single", ["--store", "measured.zarr", "--copy", "1"], "knows one lens, of which there is nothing to infer"),
        ("fit", ["--store", "measured.zarr"], "holds 8 copies; say which with --copy 0 to 7"),
        ("fit", ["--store", "measured.zarr", "--copy", "8"], "--copy 8: store measured.zarr holds 8, counted from 0"),
        ("fit", ["--store", "nowhere.zarr"], "store nowhere.zarr does not exist"),
        ("nowhere", ["--store", "measured.zarr"], "run nowhere does not exist"),
        ("fit", ["--store", "one.zarr", "--out", "single"], "--out single is not empty; choose another --out"),
        ("fit", ["--store", "one.zarr", "--out", "file"], "--out file is no folder; choose another --out"),
    ],
)
def test_what_cannot_be_adapted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: str, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    Path("file").touch()
    before = contents(folder / "single")
    assert message in one_line_error(psftrain("adapt", run, *words))
    assert contents(folder / "single") == before
    assert not (folder / "fit-adapted").exists()


def test_an_adapted_run_speaks_of_its_copy(folder: Path) -> None:
    """It is judged on the measured kernels, and interpolation goes through them."""
    given = ("--store", folder / "one.zarr", "--out", folder / "lone")
    assert psftrain("adapt", folder / "fit", *given).code == 0
    ran = psftrain("eval", folder / "lone", "--json")
    assert ran.document["n"] == 9
    assert ran.document["adapted"]
    assert ran.document["train_store"] == str(folder / "one.zarr")
    assert {"rbf_tps", "bilinear"} <= ran.document["rows"].keys()
    shown = psftrain("show", folder / "lone").out
    assert (
        shown == f"{folder / 'lone'}: one copy, adapted from {folder / 'fit'} to 9 kernels of {folder / 'one.zarr'}\n"
    )


def test_a_copy_of_another_family(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that no copy explains are warned of, in a line, and much is expected; its own are not."""
    assert psftrain(*adapting(folder, tmp_path / "own")).code == 0
    assert not caplog.records

    def aside(*given: Any, **options: Any) -> Any:
        return np.roll(kernel(*given, **options), 5, axis=-1)

    stranger = make_store(tmp_path / "stranger.zarr", grid=3, **LENS, formula=aside)
    ran = psftrain("adapt", folder / "fit", "--store", stranger, "--out", tmp_path / "run", "--json")
    assert ran.code == 0
    (record,) = caplog.records
    assert f"{stranger} is of no such copy as {folder / 'fit'} was trained on" in record.getMessage()
    assert ran.document["expected"] > 0.3 * ran.document["error"]


# --- whole or not at all ----------------------------------------------------------------------------------------------


def adapting(folder: Path, out: Path) -> list[Any]:
    return ["adapt", folder / "fit", "--store", folder / "measured.zarr", "--copy", 7, "--out", out]


def test_an_adapted_run_appears_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a full disk nothing is left, nor of a killed process, and the same command is then done."""
    write = checkpoint.write_whole

    def full(path: Path, data: bytes) -> None:
        if path.name == "best.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    given = adapting(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", full)
        error = one_line_error(psftrain(*given))
    assert (
        f"{tmp_path / 'run'} cannot be written: No space left on device; nothing is left, choose another --out" in error
    )
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert wait_for(fork(lambda: psftrain(*given))) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run.")
    assert psftrain(*given).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    before = contents(tmp_path / "run")
    assert "is not empty; choose another --out" in one_line_error(psftrain(*given))
    assert contents(tmp_path / "run") == before


def test_who_comes_second_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has written the run while this one was at work."""
    save = checkpoint.save

    def faster(path: Path, state: dict[str, Any]) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "theirs").touch()
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", faster)
    error = one_line_error(psftrain(*adapting(folder, tmp_path / "run")))
    assert "has been written by another process meanwhile; choose another --out" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "theirs"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(checkpoint, "save", lambda *_: os.kill(os.getpid(), number))
    ran = psftrain(*adapting(folder, tmp_path / "run"))
    assert ran.code == 75
    assert f"stopped: {number.name}: nothing was written; the same command begins anew" in ran.err
    assert not list(tmp_path.iterdir())


def test_fit_leaves_an_adapted_run_alone(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert psftrain(*adapting(folder, run)).code == 0
    before = contents(run)
    error = one_line_error(psftrain("fit", "--store", folder / "measured.zarr", "--run", run))
    assert f"{run} is what `psftrain adapt` wrote, not a run to go on with; choose another --run" in error
    assert contents(run) == before


# --- dark places ------------------------------------------------------------------------------------------------------


@pytest.fixture
def beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are asked far beyond the field, so that towards its rim no ray falls into the window."""
    place = RayCVAE.place

    def stretched(model: RayCVAE, condition: torch.Tensor) -> Any:
        field, depth, defocus = place(model, condition)
        outer = (field.abs().amax(dim=1, keepdim=True) - 0.6).clamp_min(0)
        return field * 1e4**outer, depth, defocus

    monkeypatch.setattr(RayCVAE, "place", stretched)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("beyond")
def test_dark_places_have_no_kernels(folder: Path, tmp_path: Path) -> None:
    """NaN, as in stores, in samples, tables and exports, and so are their expected errors; means are of the others."""
    run, out = folder / "fit", tmp_path / "sample.npz"
    assert psftrain("sample", run, "--grid", 5, "--out", out).code == 0
    found = np.load(out)
    kernels, expected = found["psf_binned"], found["expected_error"]
    dark = np.isnan(kernels).any(axis=(-3, -2, -1))
    assert dark[..., 0, 0].all()
    assert not dark[..., 2, 2].any()
    assert np.array_equal(np.isnan(expected), dark)
    assert np.allclose(kernels[~dark].sum(axis=(-2, -1)), 1, atol=1e-5)
    assert psftrain("bake", run, "--grid", 5, "--out", tmp_path / "table.zarr").code == 0
    assert not list(problems(open_store(tmp_path / "table.zarr")))
    ran = psftrain("adapt", run, "--store", folder / "measured.zarr", "--copy", 7, "--out", tmp_path / "run", "--json")
    assert all(np.isfinite([ran.document[name] for name in ("error", "error_before", "expected", "expected_before")]))
    assert psftrain("eval", run, "--no-baselines", "--out", tmp_path / "eval").code == 0
    assert psftrain("export", run, "--format", "safetensors", "--out", tmp_path / "export").code == 0


def test_a_dark_witness_tells_nothing(folder: Path) -> None:
    """What is expected near by is what the others tell."""
    model = load_run(folder / "single").model
    assert isinstance(model, FieldCVAE)
    beside = model.witnesses[:2].mean().expand(2)  # in the middle of four, of which the first is dark
    condition = torch.cat([beside, torch.zeros(2)])[None]
    others = model.left_out[:, 1:]
    model.left_out[:, 0] = torch.nan
    found = model.expected_error(condition)
    assert found is not None
    assert others.min().exp() <= found.item() <= others.max().exp()


@pytest.mark.filterwarnings("error")
def test_expectations_without_numbers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any there is no picture of them; with some NaN or 0, there is one of the others."""
    for name, values in (("none", [np.nan] * 9), ("some", [0.0, np.nan, *[0.1] * 7]), ("zero", [0.0] * 9)):
        monkeypatch.setattr(
            FieldCVAE, "expected_error", lambda model, condition, values=values: torch.tensor(values)[: len(condition)]
        )
        given = ["--store", folder / "one.zarr", "--no-baselines", "--out", tmp_path / name]
        assert psftrain("eval", folder / "single", *given).code == 0
        assert (tmp_path / name / "reliability.png").exists() == (name != "none")
