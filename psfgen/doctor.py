"""What this machine has, whether a small render agrees with theory, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, whether it is well, and the advice where it is not."""

    name: str
    ok: bool
    needed: bool
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything psfgen and psftrain use; takes some seconds, because DeepLens is really run."""
    return [*_packages(), *_device(), *_tools(), _render_check()]


def _packages() -> Iterator[Finding]:
    python = platform.python_version()
    right = python.startswith("3.12.")
    yield Finding("python", right, True, python, "" if right else "DeepLens needs Python 3.12")
    for name in ("deeplens-core", "torch", "zarr", "numpy", "scipy", "xarray", "tensorboard"):
        try:
            yield Finding(name, True, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, True, "not installed", f"pip install {name}")


def _device() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", True, True, f"{cores} cores, {torch.get_num_threads()} torch threads")
    if torch.cuda.is_available():
        yield Finding("gpu", True, False, torch.cuda.get_device_name(0))
    else:
        yield Finding(
            "gpu", False, False, "none", "nothing; a CUDA GPU makes training faster, and --device cuda uses it"
        )


def _tools() -> Iterator[Finding]:
    for name, why in (("g++", "torch.compile"), ("sbatch", "SLURM array jobs")):
        path = shutil.which(name)
        yield Finding(name, path is not None, False, path or "not found", f"install it only for {why}")


def _render_check() -> Finding:
    """A small render of an ideal thin lens: the defocus disc against the thin-lens equation."""
    import json
    import tempfile
    from pathlib import Path

    import numpy as np
    import torch

    from psfgen.config import RenderConfig
    from psfgen.engines.geometric import GeometricEngine
    from psfgen.optics.splat import normalise
    from psfgen.render import load

    focal_mm, radius_mm, focus_mm, depth_mm, pitch_um = 50.0, 12.5, 20_000.0, 2_000.0, 20.0
    prescription = {
        "sensor_size": [20.0, 20.0],
        "surfaces": [
            {"type": "Stop", "r": radius_mm, "is_aperture": True, "d_next": 0.0},
            {"type": "ThinLens", "r": radius_mm, "f": focal_mm, "d_next": focal_mm, "mat2": "air"},
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thin.json"
        path.write_text(json.dumps(prescription), encoding="utf-8")
        job = RenderConfig(lens=str(path), depth=(depth_mm,), focus=(focus_mm,), pitch_um=pitch_um, spp=4096)
        lens, plan = load(job, "cpu")
    engine = GeometricEngine(lens, plan)
    found = engine.deposit(engine.aim(torch.zeros(1, 2, dtype=torch.float64), depth_mm))
    kernel = normalise(found.halves, job.bins).psf[0, 0, 0]
    x_um, y_um = np.meshgrid(plan.coords["kx"], plan.coords["ky"])
    splat_um2 = 2 * pitch_um**2 / 6  # what the bilinear splat itself adds to the second moment
    measured_um = float(np.sqrt(2 * ((kernel * (x_um**2 + y_um**2)).sum() - splat_um2)))
    image_mm, sensor_mm = (1 / (1 / focal_mm - 1 / distance) for distance in (depth_mm, focus_mm))
    expected_um = 1000 * radius_mm * abs(sensor_mm / image_mm - 1)
    ok = abs(measured_um / expected_um - 1) < 1e-3
    text = f"defocus disc of a thin lens: {measured_um:.2f} um, theory {expected_um:.2f} um"
    return Finding("render", ok, True, text, "the installed deeplens-core traces differently: install 2.5.6")
