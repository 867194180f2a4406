"""What the tests of psftrain share: stores of analytic kernels, tiny runs, the command line in-process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import Ran
from numpy.typing import NDArray
from torch import Tensor

from psfgen.config import RenderConfig
from psfgen.errors import report
from psfgen.grid import field_axes
from psfgen.plan import INVOCATION
from psfgen.store import open_store, schema
from psfgen.store.open import format_of, store_class
from psfgen.store.schema import StoreSpec
from psftrain import checkpoint
from psftrain.conditioning import Conditioning, conditioning_of
from psftrain.config import FitConfig, load_fit_config
from psftrain.data import Examples, read_examples
from psftrain.fit import fit
from psftrain.models import MODELS, canonical, expected, field, folds
from psftrain.models.base import CVAE, Gaussian
from psftrain.models.neural import NeuralCVAE
from psftrain.raymap import copies, distances, laplace, search
from psftrain.raymap.stages import Stage
from psftrain.raymap.terms import Reach
from psftrain.solving import is_solved

Array = NDArray[Any]
BARE = Conditioning(field_max=1.0, depth_dioptre=(0.5, 0.5), focus_dioptre=(0.5, 0.5), aspect=1.0, grid=5)
TINY: dict[str, Any] = {
    "steps": 12,
    "batch": 8,
    "log_every": 4,
    "val_every": 8,
    "save_every": 5,
    "warmup": 2,
    "device": "cpu",
    "model.name": "neural_cvae",
    "model.width": 16,
    "model.latent": 3,
    "model.layers": 2,
}

TRAINED = [name for name in MODELS if not is_solved(name)]  # by steps

# --- stores of a lens that is a formula -------------------------------------------------------------------------------


def kernel(
    x: Array, y: Array, depth_dioptre: float, focus_dioptre: float, wavelength: Array, side: int, aspect: float = 1.0
) -> Array:
    """Kernels [*x.shape, W, k, k] of a rotationally symmetric lens: a Gaussian that grows with the field radius,
    more along the field direction than across, is spread by defocus, and drifts outwards with the wavelength.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float) * aspect
    radius, azimuth = np.hypot(x, y)[..., None, None, None], np.arctan2(y, x)[..., None, None, None]
    place = (np.arange(side) - (side - 1) / 2) / (side / 2)
    right, up = place, -place[:, None]  # row 0 is +y
    along = np.cos(azimuth) * right + np.sin(azimuth) * up
    across = -np.sin(azimuth) * right + np.cos(azimuth) * up
    colour = (np.asarray(wavelength) - 0.55)[:, None, None]
    blur = 0.1 * abs(depth_dioptre - focus_dioptre) + 0.2 * colour
    centre = 1.5 * radius * colour
    exponent = ((along - centre) / (0.2 + 0.2 * radius + blur)) ** 2 + (across / (0.2 + 0.05 * radius + blur)) ** 2
    drawn = np.exp(-exponent / 2)
    return np.asarray(drawn / drawn.sum(axis=(-2, -1), keepdims=True))


def binned(kernels: Array, bins: int) -> Array:
    """Sums over bins x bins equal squares; the side must be a multiple."""
    size = kernels.shape[-1] // bins
    return np.asarray(kernels.reshape(*kernels.shape[:-2], bins, size, bins, size).sum(axis=(-3, -1)))


def make_store(
    path: Path,
    *,
    grid: int = 5,
    layout: str = "grid",
    field_max: float = 1.0,
    depth: Sequence[float] = (2000.0,),
    focus: Sequence[float] = (2000.0,),
    wavelength: Sequence[float] = (0.48, 0.55, 0.64),
    kernel_px: int = 10,
    bins: int = 5,
    pitch_um: float = 4.0,
    sensor_mm: tuple[float, float] = (6.0, 6.0),
    lens: str = "analytic",
    lens_text: str = '{"info": "a lens that is a formula"}',
    seed: int = 0,
    dark: Iterable[Any] = (),
    formula: Callable[..., Array] = kernel,
    change: Callable[[str, Array], None] = lambda name, values: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    blocks: Iterable[int] | None = None,
    copies: int | None = None,
    chunks: Mapping[str, int] = MappingProxyType({}),
) -> Path:
    """A store as `psfgen render` leaves it (HDF5 where the path ends in .h5), whose kernels are those of `formula`.

    No light arrives at the places `dark` (indices into focus, depth, row, column, wavelength). `change(name,
    values)` may spoil an array of a block before it is written. `settings`: other keys of the render's config.
    `blocks`: those committed; default all. `copies`: so many specimens, copy c with kernels of all focus distances
    10 % x c farther away in dioptres. `chunks`: sizes by dim, as of a rechunked store.
    """
    assert kernel_px % bins == 0
    config = RenderConfig(
        lens=lens,
        grid=grid,
        layout=layout,  # type: ignore[arg-type]
        field_max=field_max,
        sensor_mm=sensor_mm,
        depth=tuple(depth),
        focus=tuple(focus),
        wavelength=tuple(wavelength),
        kernel_px=kernel_px,
        bins=bins,
        pitch_um=pitch_um,
        seed=seed,
        **settings,
    )
    field_x, field_y = field_axes(grid, layout, field_max, seed)
    coords = schema.coordinates(
        focus_mm=np.array(config.focus),
        depth_mm=np.array(config.depth),
        field_y=field_y,
        field_x=field_x,
        wavelength_um=np.array(config.wavelength),
        kernel_px=kernel_px,
        bins=bins,
        pitch_um=pitch_um,
        copies=copies,
    )
    sha256 = hashlib.sha256(lens_text.encode()).hexdigest()
    document = schema.plain(config.model_dump(exclude=set(INVOCATION)))
    plan = {key: value for key, value in document.items() if key != "lens"}
    plan = {"schema_version": schema.SCHEMA_VERSION, "lens_sha256": sha256, **plan}
    attrs = {
        "schema": schema.SCHEMA_NAME,
        "schema_version": schema.SCHEMA_VERSION,
        "plan": plan,
        "plan_sha256": schema.sha256_of(plan),
        "config": document,
        "lens": {"name": lens, "sha256": sha256, "text": lens_text},
        "engine": config.engine,
        "tracer": config.tracer,
        "device": "cpu",
        "versions": {"psfgen": "test"},
        "seed": seed,
        "pitch_um": pitch_um,
        "reference_um": config.reference_um,
        "field_max": field_max,
        "sensor_mm": sensor_mm,
        "sensor_z_mm": {f"{distance:g}": 50.0 for distance in config.focus},
        "orientation": "kernels are upright: row 0 is scene +y, the last column scene +x",
        "centring": "on the chief ray of reference_um",
        "field": "field = pinhole image position / half sensor side",
        **({"chunks": dict(chunks)} if chunks else {}),
    }
    store = store_class(format_of(path)).create(path, StoreSpec(coords, attrs))
    specimens = [
        _arrays(coords, sensor_mm, list(dark), formula, kernel_px, bins, 1 + copy / 10) for copy in range(copies or 1)
    ]
    for block in range(len(store.blocks)) if blocks is None else blocks:
        place = store.spec.block_at(block)
        for name, values in specimens[place.get("copy", 0)].items():
            part = values.take([place["depth"]], axis=schema.ARRAY_DIMS[name].index("depth"))
            change(name, part)
            part = part if copies is None else part[None]
            store.write(block, name, part)
        store.commit(block, {"rays": 0, "seconds": 0.0, "host": "test", "versions": attrs["versions"]})
    if not store.missing():
        store.finalise()
    return path


def _arrays(
    coords: dict[str, Array],
    sensor_mm: tuple[float, float],
    dark: list[Any],
    formula: Callable[..., Array],
    kernel_px: int,
    bins: int,
    farther: float = 1.0,
) -> dict[str, Array]:
    """Every array of a store by name; light is missing where `dark` says."""
    y, x = np.meshgrid(coords["field_y"], coords["field_x"], indexing="ij")
    aspect = sensor_mm[1] / sensor_mm[0]
    psf = np.stack(
        [
            [
                formula(x, y, depth, farther * focus, coords["wavelength"], kernel_px, aspect)
                for depth in coords["depth_dioptre"]
            ]
            for focus in coords["focus_dioptre"]
        ]
    )
    captured = np.full(psf.shape[:-2], 0.97)
    for index in dark:
        captured[index] = 0
    psf[captured == 0] = np.nan
    radius = np.hypot(x, y)[..., None]
    noise = np.broadcast_to(0.01 * (1 + np.arange(psf.shape[-3])) + 0.01 * radius, captured.shape)
    chief = np.ones(captured.shape[:-1])
    return {
        "psf": psf,
        "psf_binned": binned(psf, bins),
        "throughput": np.full(captured.shape[1:], 0.9),
        "captured": captured,
        "noise": np.where(captured == 0, np.nan, 2 * noise),
        "noise_binned": np.where(captured == 0, np.nan, noise),
        "chief_x_mm": chief * x * sensor_mm[0] / 2,
        "chief_y_mm": chief * y * sensor_mm[1] / 2,
    }


def examples_of(*paths: Path, array: str = "psf_binned") -> tuple[Examples, Conditioning]:
    """The examples of stores, and how their places are encoded."""
    stores = [open_store(path) for path in paths]
    conditioning = conditioning_of(stores)
    return read_examples(stores, conditioning, array), conditioning


# --- runs -------------------------------------------------------------------------------------------------------------


def _settings(changes: dict[str, Any]) -> dict[str, Any]:
    return {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}


def job(store: Path | Sequence[Path], run: Path, **changes: Any) -> FitConfig:
    """A run of a fraction of a second; `model__width=8` sets model.width."""
    stores = [store] if isinstance(store, Path) else store
    places: list[tuple[str, Any]] = [("store", list(map(str, stores))), ("run", str(run))]
    return load_fit_config(None, [*places, *_settings(changes).items()])


def words(store: Path, run: Path, **changes: Any) -> list[str]:
    """The same run as words of a command line."""
    sets = [word for key, value in _settings(changes).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["--store", str(store), "--run", str(run), *sets]


def psftrain(*args: object) -> Ran:
    """The `psftrain` command in this process."""
    from psftrain.cli import cli

    argv, out, err = list(map(str, args)), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = report(lambda: cli(argv, standalone_mode=False, prog_name="psftrain"), argv=argv)
    return Ran(code, out.getvalue(), err.getvalue())


def one_line_error(ran: Ran) -> str:
    """The error of a command that answered with nothing but one line."""
    lines = [line for line in ran.err.splitlines() if line]
    assert ran.out == ""
    assert lines, "no error"
    assert lines[-1].startswith("error: ")
    assert not [line for line in lines if "Traceback" in line or "(unexpected;" in line], ran.err
    return lines[-1]


CLOCKED = {"train/steps_per_s", "train/kernels_per_s", "train/data_share"}  # of a model trained by steps
TIMED = {"time", "train/seconds", *CLOCKED}


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMED} for line in lines]


def best(run: Path) -> dict[str, Any]:
    """The checkpoint that a run is judged by."""
    return checkpoint.load(run / "checkpoints" / "best.pt")


def rewrite_model(run: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights of a run's best checkpoint."""
    state = best(run)
    change(state["model"])
    checkpoint.save(run / "checkpoints" / "best.pt", state)


def equal_states(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal_states, a, b))
    return bool(a == b)


# --- models that are solved -------------------------------------------------------------------------------------------


def solve_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let ray maps be small, and found from few starts in few steps, and tables coarse: a run takes a second or two."""
    patch.setattr(canonical, "FINE", 9)
    patch.setattr(canonical, "COARSE", 5)
    few = Stage(4, Reach(pupil=3, field=4, charge=1), 16, 8, 64, 5)
    finest = Reach(pupil=4, field=6, curl=3, charge=1)
    patch.setattr(search, "STARTS", (few,))
    patch.setattr(copies, "COARSE", few.reach)
    patch.setattr(copies, "ALONE", ((8, 64, 5),))
    patch.setattr(expected, "CASES", 6)
    patch.setattr(copies, "TOGETHER", (copies.Round(finest, 8, 128, 2),))
    for name in ("MOVED", "FREED", "SHARPER", "LAST"):
        patch.setattr(distances, name, replace(few, keep=1))
    for module in (field, folds):
        patch.setattr(module, "WITNESSES", 9)
    patch.setattr(laplace, "STAGE", replace(few, keep=1, rays=128))
    patch.setattr(search, "FINEST", finest)
    patch.setattr(search, "LAST", (replace(few, keep=1, reach=finest, rays=128),))


def fit_quickly(store: Path, run: Path, name: str) -> None:
    """A run of any model in a second, never mind how good."""
    with pytest.MonkeyPatch.context() as patch:
        solve_quickly(patch)
        fit(task(store, run, model__name=name) if is_solved(name) else job(store, run, model__name=name))


def task(store: Path | Sequence[Path], run: Path, **changes: Any) -> FitConfig:
    """A run of the default model, which is solved."""
    stores = [store] if isinstance(store, Path) else store
    places: list[tuple[str, Any]] = [("store", list(map(str, stores))), ("run", str(run)), ("device", "cpu")]
    return load_fit_config(None, [*places, *((key.replace("__", "."), value) for key, value in changes.items())])


# --- models to test with ----------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {}


class Meddling(NeuralCVAE):
    """neural_cvae, but `meddle(n)` is called in the n-th training step of this process (0 is the first) and
    may return a number to multiply the posterior's means with; `model` is the one that is trained.
    """

    meddle: ClassVar[Callable[[int], float | None]] = lambda step: None
    seen: ClassVar[int] = 0
    model: ClassVar[Meddling]

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        found = super().posterior(kernels, condition)
        if not torch.is_grad_enabled():
            return found
        Meddling.model = self
        factor = Meddling.meddle(Meddling.seen)
        Meddling.seen += 1
        return found if factor is None else Gaussian(factor * found.mean, found.logvar)


class Fixed(CVAE):
    """Given Gaussians whatever the input, and kernels that are the softmax of z @ matrix."""

    def __init__(self, posterior: Gaussian, prior: Callable[[Tensor], Gaussian], matrix: Tensor) -> None:
        super().__init__()
        self.latent, self.given, self.prior_of, self.matrix = matrix.shape[0], posterior, prior, matrix

    def posterior(self, kernels: Tensor, condition: Tensor) -> Gaussian:
        return self.given

    def prior(self, condition: Tensor) -> Gaussian:
        return self.prior_of(condition)

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        logits = torch.einsum("bl,lwyx->bwyx", z, self.matrix)
        return logits.flatten(2).softmax(dim=-1).view(logits.shape)
