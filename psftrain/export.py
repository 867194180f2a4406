"""A trained model for other programs: safetensors, ONNX and torch.export, each checked before it is written."""

from __future__ import annotations

import io
import os
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from psfgen import __version__
from psfgen.errors import ConfigError, FitError, RunMismatch, nearest
from psfgen.store.schema import json_text, plain
from psftrain.conditioning import conditioning_document
from psftrain.models.solved import SolvedCVAE
from psftrain.predict import PsfModel
from psftrain.run import DOCUMENT, WEIGHTS, Trained, trained_from

TOLERANCE = 1e-5  # by which an exported kernel, which sums to 1, may differ from the model's
CHECKED = 256  # random places at which that is seen
OPSET = 20
INPUTS = ("field", "depth_mm", "focus_mm")

Places = tuple[Tensor, Tensor, Tensor]
Ask = Callable[[Places], NDArray[np.float32]]


@dataclass(frozen=True)
class Format:
    """A file's name, `write` (the model as bytes), `read` (the bytes as a function of places), and what both need."""

    name: str
    write: Callable[[PsfModel], bytes]
    read: Callable[[bytes, dict[str, Any]], Ask]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """What was written, by format (and `config`), and by how much each differs from the model at most."""

    paths: dict[str, Path]
    differences: dict[str, float]


def export(trained: Trained, formats: Iterable[str], out: Path) -> Exported:
    """Write a model in some formats (default: all) and its config.json into a folder; a former export is replaced.

    What was written is read again and asked at random places first. Raises ConfigError for an unknown format and
    for one whose packages are not installed, RunMismatch for a run that holds no model, FitError where it answers
    otherwise than the model, or where `out` cannot be written.
    """
    if isinstance(trained.model, SolvedCVAE) and not trained.model.solved:
        raise RunMismatch(
            f"run {trained.path} was checked, not solved (steps 0): it holds no model to export; fit another --run"
        )
    chosen = {name: _format(name) for name in formats or FORMATS}
    model = PsfModel(trained)
    document = describe(model)
    files = {"config": (DOCUMENT, (json_text(document) + "\n").encode())}
    places = check_places(model)
    differences = {}
    with torch.no_grad():
        truth = model.network(*places).numpy()
        for name, form in chosen.items():
            data = form.write(model)
            differences[name] = _difference(form.read(data, document)(places), truth)
            if not differences[name] <= TOLERANCE:
                raise FitError(
                    f"{form.name} differs from the model of {trained.path} by {differences[name]:.2g}, more than "
                    f"{TOLERANCE:g}; nothing was written"
                )
            files[name] = (form.name, data)
    return Exported({name: _land(out / file, data) for name, (file, data) in files.items()}, differences)


def _difference(found: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """By how much kernels differ at most; inf where others are dark (NaN), NaN where there are none."""
    if np.isnan(truth).all():
        return np.nan
    if not np.array_equal(np.isnan(found), np.isnan(truth)):
        return np.inf
    return float(np.nan_to_num(np.abs(found - truth), nan=0.0).max())


def describe(model: PsfModel) -> dict[str, Any]:
    """config.json: what the model is, what goes in, and what comes out, in units."""
    trained = model.trained
    field_max, (depth, focus) = model.field_max, model.network.scales
    down, across = ("by", "bx") if trained.config.data.array == "psf_binned" else ("ky", "kx")
    return {
        "schema": 1,
        "psftrain": __version__,
        "torch": torch.__version__,
        "model": trained.config.model.name,
        "step": trained.step,
        "inputs": {
            "field": {
                "shape": ["N", 2],
                "units": "half sensor sides",
                "range": [-field_max, field_max],
                "meaning": "pinhole image position (field_x to the right, field_y up) / half sensor side",
            },
            "depth_mm": _distance("object distance from the first surface vertex", model.depth_mm),
            "focus_mm": _distance("distance the lens is focused at", model.focus_mm),
        },
        "condition": {
            "meaning": "what the networks take, in this order; the exported graphs compute it themselves",
            "field_x": f"field_x / {field_max!r}",
            "field_y": f"field_y / {field_max!r}",
            "depth": f"(1000 / depth_mm - {depth[0]!r}) * {depth[1]!r}",
            "focus": f"(1000 / focus_mm - {focus[0]!r}) * {focus[1]!r}",
        },
        "output": {
            "name": "kernels",
            "shape": ["N", len(model.wavelength_um), len(model.y_um), len(model.x_um)],
            "dims": ["N", "wavelength", down, across],
            "meaning": "each channel is non-negative and sums to 1, or is NaN in the dark; upright, centred on the "
            "chief ray of reference_um",
            "wavelength_um": model.wavelength_um,
            "reference_um": trained.fingerprint["reference_um"],
            "pitch_um": model.pitch_um,
            f"{down}_um": model.y_um,
            f"{across}_um": model.x_um,
        },
        "config": plain(trained.config.model_dump()),
        "conditioning": conditioning_document(trained.conditioning),
        "fingerprint": trained.fingerprint,
        "plan_sha256": trained.plans,
    }


def _distance(meaning: str, range_mm: tuple[float, float]) -> dict[str, Any]:
    return {"shape": ["N"], "units": "mm, inf allowed", "range": range_mm, "meaning": meaning}


def check_places(model: PsfModel) -> Places:
    """Random places all over what was trained on, evenly in dioptres, with its ends and the axis."""
    rng = np.random.default_rng(0)
    share = np.concatenate([np.zeros((1, 4)), np.ones((1, 4)), np.full((1, 4), 0.5), rng.random((CHECKED, 4))])
    field = model.field_max * (2 * share[:, :2] - 1)
    spans = (model.trained.conditioning.depth_dioptre, model.trained.conditioning.focus_dioptre)
    with np.errstate(divide="ignore"):
        distances = [1000 / (low + (high - low) * share[:, 2 + i]) for i, (low, high) in enumerate(spans)]
    found = [torch.from_numpy(values.astype(np.float32)) for values in (field, *distances)]
    return found[0], found[1], found[2]


def _write_safetensors(model: PsfModel) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in model.trained.model.state_dict().items()}
    return safetensors.torch.save(tensors, {"format": "pt"})


def _read_safetensors(data: bytes, document: dict[str, Any]) -> Ask:
    network = PsfModel(trained_from(Path(WEIGHTS), plain(document), safetensors.torch.load(data))).network
    return lambda places: np.asarray(network(*places))


def _write_torch(model: PsfModel) -> bytes:
    program = torch.export.export(model.network, _example(), dynamic_shapes=_any_number())
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _read_torch(data: bytes, document: dict[str, Any]) -> Ask:
    program = torch.export.load(io.BytesIO(data)).module()
    return lambda places: np.asarray(program(*places))


def _write_onnx(model: PsfModel) -> bytes:
    from onnxscript import opset20 as op

    def hypot(u: Any, v: Any) -> Any:  # which ONNX does not have
        return op.Sqrt(op.Add(op.Mul(u, u), op.Mul(v, v)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name: N will not be used")  # it is, for all inputs
        program = torch.onnx.export(
            model.network,
            _example(),
            dynamic_shapes=_any_number(),
            input_names=list(INPUTS),
            output_names=["kernels"],
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.hypot.default: hypot},
            external_data=False,
            verbose=False,
            dynamo=True,
        )
    assert program is not None
    for node in program.model.graph:  # where each stands in the source: paths of this machine
        node.metadata_props.clear()
    data: bytes = program.model_proto.SerializeToString()
    return data


def _read_onnx(data: bytes, document: dict[str, Any]) -> Ask:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def ask(places: Places) -> NDArray[np.float32]:
        given = {name: values.numpy() for name, values in zip(INPUTS, places, strict=True)}
        return np.asarray(session.run(None, given)[0])

    return ask


def _example() -> Places:
    return torch.zeros(3, 2), torch.full((3,), 1000.0), torch.full((3,), 1000.0)


def _any_number() -> dict[str, dict[int, Any]]:
    count = torch.export.Dim("N")
    return {name: {0: count} for name in INPUTS}


FORMATS = {
    "safetensors": Format(WEIGHTS, _write_safetensors, _read_safetensors),
    "onnx": Format("prior_mean.onnx", _write_onnx, _read_onnx, ("onnx", "onnxruntime", "onnxscript")),
    "torch": Format("prior_mean.pt2", _write_torch, _read_torch),
}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"--format {name}: unknown format{nearest(name, FORMATS)}; known: {', '.join(FORMATS)}")
    missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
    if missing:
        others = " ".join(f"--format {other}" for other in FORMATS if other != name)
        raise ConfigError(
            f"--format {name} needs {', '.join(missing)}: pip install {' '.join(missing)}; or leave it out ({others})"
        )
    return FORMATS[name]


def _land(path: Path, data: bytes) -> Path:
    """Write a file so that readers see the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FitError(f"export {path} cannot be written: {error.strerror}; choose another --out") from None
    return path
