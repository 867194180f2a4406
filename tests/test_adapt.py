"""Many copies of a lens: what is learned of them, one of them from a few kernels, others out of the prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from training import fit_quickly, make_store, one_line_error, psftrain

from psftrain import load
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
    assert told["expected"] < 0.7 * told["expected_before"]
    before, after = (load(folder / name).psf([[0.37, -0.61]]) for name in ("fit", "seventh"))
    assert not np.allclose(before, after, atol=1e-3)
    assert psftrain("sample", folder / "seventh", "--grid", 2, "--out", folder / "sample.npz").code == 0
    assert psftrain("export", folder / "seventh", "--format", "safetensors").code == 0


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


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("single", ["--store", "measured.zarr", "--copy", "1"], "knows one lens, of which there is nothing to infer"),
        ("fit", ["--store", "measured.zarr"], "holds 8 copies; say which with --copy 0 to 7"),
        ("fit", ["--store", "measured.zarr", "--copy", "8"], "--copy 8: store measured.zarr holds 8, counted from 0"),
        ("fit", ["--store", "nowhere.zarr"], "store nowhere.zarr does not exist"),
        ("nowhere", ["--store", "measured.zarr"], "run nowhere does not exist"),
        ("fit", ["--store", "one.zarr", "--out", "single"], "--out single is not empty; choose another --out"),
    ],
)
def test_what_cannot_be_adapted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: str, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder / "single")
    assert message in one_line_error(psftrain("adapt", run, *words))
    assert contents(folder / "single") == before
    assert not (folder / "fit-adapted").exists()
