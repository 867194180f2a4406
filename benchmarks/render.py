"""How fast PSF grids are rendered, and how right: everything side by side in one run, on one core.

    python benchmarks/render.py [--lens NAME]... [--quick] [--device cuda] [--json FILE]

Times are process CPU seconds of one thread, medians over repeats in which the alternatives take turns; on a GPU,
wall seconds. Imports, compilation and the loading of lenses are left out and printed apart.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
began_imports = time.perf_counter()
import numpy as np  # noqa: E402
import torch  # noqa: E402

from psfgen import catalogue  # noqa: E402
from psfgen.block import Block  # noqa: E402
from psfgen.config import Move, RenderConfig  # noqa: E402
from psfgen.engines.geometric import GeometricEngine  # noqa: E402
from psfgen.optics import pupil  # noqa: E402
from psfgen.optics.blocks import trace_rays  # noqa: E402
from psfgen.optics.lens import Lens, _read  # noqa: E402
from psfgen.optics.trace import SETTLED_MM, trace_table, variant  # noqa: E402
from psfgen.render import load  # noqa: E402
from psfgen.specimens import Specimens  # noqa: E402

IMPORT_S = time.perf_counter() - began_imports
TRACE_RAYS = 2**16
JOB: dict[str, Any] = {
    "depth": "1.5m",
    "focus": "0.5m:20m:8",
    "wavelength": (0.45, 0.55, 0.65),
    "field_max": 1.0,
    "kernel_px": 64,
}
JOB_LENSES = ("acl12708u", "double_gauss", "phone")
RANDOM_RAYS = 100_000
CALLS = 6  # of DeepLens in each turn
LADDER = tuple(2 * round(2 ** (eighth / 8 - 1)) for eighth in range(72, 140))
# Samples at which the window holds most of nearly all kernels: without light in the window nothing is compared.
PITCH_UM = {"acl12708u": 5.0, "double_gauss": 20.0, "phone": 1.0}
AS_BUILT = (
    Move(element=0, decentre_mm=(0.03, -0.02), tilt_deg=(0.03, 0.05)),
    Move(element=2, decentre_mm=(-0.02, 0.04), tilt_deg=(-0.04, 0.02)),
)


def spent(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that `work` takes: of CPU time, or of wall time on a GPU."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(works: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each, all taking turns; each has been run once before."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(spent(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def deeplens_of(lens: Lens, dtype: torch.dtype) -> Any:
    """The lens as DeepLens has it, in a dtype of its own."""
    geo = _read(lens.text, ".json", lens.reference_um, torch.device("cpu"))
    geo.astype(dtype)
    return geo


# --- tracing alone ----------------------------------------------------------------------------------------------------


def optiland_of(lens: Lens, wavelength_um: float) -> Any:
    """The lens in optiland, with DeepLens's refractive indices."""
    from optiland.materials import IdealMaterial
    from optiland.optic import Optic

    optic = Optic()
    optic.surfaces.add(index=0, thickness=np.inf)
    for number, surface in enumerate(lens.geo.surfaces, start=1):
        glass = IdealMaterial(n=float(surface.mat2.ior(torch.tensor(wavelength_um, dtype=torch.float64))), k=0)
        c = float(getattr(surface, "c", 0.0))
        options: dict[str, Any] = {"radius": 1 / c if c else np.inf, "conic": float(getattr(surface, "k", 0.0))}
        if getattr(surface, "ai", None) is not None:
            even = [0.0 if surface.ai2 is None else float(surface.ai2)]
            even += [float(getattr(surface, f"ai{2 * (i + 2)}")) for i in range(surface.ai_degree)]
            options |= {"surface_type": "even_asphere", "coefficients": even}
        optic.surfaces.add(
            index=number,
            thickness=float(surface.d_next),
            material=glass,
            is_stop=number - 1 == lens.stop_index,
            **options,
        )
    optic.surfaces.add(index=len(lens.geo.surfaces) + 1)
    optic.set_aperture("EPD", 2 * lens.pupil_r_mm)
    optic.set_field_type("angle")
    optic.add_field(y=0)
    optic.add_wavelength(wavelength_um, is_primary=True)
    return optic


def tracing(name: str, repeats: int) -> dict[str, float]:
    """Mray/s of each tracer through a lens, from a point off the axis, nothing but tracing."""
    from deeplens.light import Ray

    wavelength_um = 0.55
    lens = Lens(name)
    field = torch.tensor([0.5, 0.3], dtype=torch.float64) * lens.field_max
    o, d = pupil.aim(lens, field, 2000.0, lens.pupil_r_mm * pupil.spiral(TRACE_RAYS))
    o = o - d * (o[:, 2:] / d[:, 2:])  # in the plane of the first vertex
    surfaces = variant(lens, wavelength_um, clip=True, to_stop=False)
    o32, d32 = o.float(), d.float()
    flat_o, flat_d, valid = o32.T.contiguous().numpy(), d32.T.contiguous().numpy(), np.empty(TRACE_RAYS, np.bool_)
    works: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.float64):
        geo = deeplens_of(lens, dtype)
        ray = Ray(o.to(dtype) - 5 * d.to(dtype), d.to(dtype), wavelength_um)
        works[f"deeplens {str(dtype).removeprefix('torch.')}"] = lambda geo=geo, ray=ray: geo.trace(ray.clone())

    def torch_eager() -> None:
        for at in range(0, TRACE_RAYS, 2**14):
            trace_table(surfaces, list(o32[at : at + 2**14].unbind(-1)), list(d32[at : at + 2**14].unbind(-1)))

    works["torch eager"] = torch_eager
    table, settled = surfaces.shape.astype(np.float32), SETTLED_MM[torch.float32]
    works["numba"] = lambda: trace_rays(
        flat_o.copy(), flat_d.copy(), valid, surfaces.kind, surfaces.flags, table, np.float32(settled)
    )
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optiland.rays import RealRays

        optic = optiland_of(lens, wavelength_um)
        x, y, z = (o - 0.01 * d).numpy().T
        ones = np.ones_like(x)
        directions = d.numpy().T
        works["optiland"] = lambda: optic.surfaces.trace(
            RealRays(x.copy(), y.copy(), z.copy(), *(v.copy() for v in directions), ones, wavelength_um * ones)
        )
    with torch.no_grad():
        return {what: TRACE_RAYS / seconds / 1e6 for what, seconds in in_turn(works, repeats).items()}


# --- the whole job ----------------------------------------------------------------------------------------------------


class Job:
    """20 x 20 field points over the full field, 8 focus distances, 3 wavelengths: 9600 kernels of 64 x 64."""

    def __init__(self, name: str, spp: int, tracer: str, moves: tuple[Move, ...] = (), device: str = "cpu") -> None:
        pitch_um = PITCH_UM.get(name)
        config = RenderConfig(lens=name, spp=spp, tracer=tracer, perturb=moves, device=device, pitch_um=pitch_um, **JOB)
        self.lens, self.plan = load(config, device)
        self.engine = Specimens(self.lens, self.plan).engine(0)
        size = [len(self.plan.coords[dim]) for dim in ("focus", "field_y", "field_x", "wavelength")]
        self.points = size[1] * size[2]
        self.psf = np.empty((size[0], self.points, size[3], config.kernel_px, config.kernel_px), np.float32)
        self.binned = np.empty((*self.psf.shape[:3], config.bins, config.bins), np.float32)

    def run(self) -> np.ndarray:
        """All kernels [F, P, W, k, k], with their noise, binned too; everything but storing them."""
        block = Block(self.engine, self.plan, 0)
        at = np.arange(self.points)
        for _ in block.trace(map, 1, at, slice(0, len(self.psf)), self.psf, self.binned):
            pass
        return self.psf


def unit_sum(halves: np.ndarray) -> np.ndarray:
    total = halves.sum(-3, dtype=np.float64)
    weight = total.sum((-2, -1), keepdims=True)
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def errors(engine: GeometricEngine, field_xy: torch.Tensor, depth_mm: float, references: int) -> dict[Any, float]:
    """Worst relative L2 error of the kernels at `field_xy`: of 100k random rays, and of each rung of the ladder.

    The reference is the mean of `references` spirals of a million rays each.
    """
    total: Any = 0.0
    points = engine.points

    def kernels(unit_xy: torch.Tensor) -> np.ndarray:
        engine.points = lambda count: engine.tracer.points(unit_xy)
        engine.config = engine.config.model_copy(update={"spp": len(unit_xy)})
        return np.stack(
            [engine.deposit(engine.aim(field_xy[i : i + 1], depth_mm)).halves[0] for i in range(len(field_xy))]
        )

    for n in range(references):
        total = total + kernels(pupil.spiral(2**20, 0.1 + 2 * n)).astype(np.float64)
    reference = unit_sum(total)

    def worst(halves: np.ndarray) -> float:
        difference = np.linalg.norm(unit_sum(halves) - reference, axis=(-2, -1))
        return float(np.nanmax(difference / np.linalg.norm(reference, axis=(-2, -1))))

    rng = np.random.default_rng(0)
    r, angle = np.sqrt(rng.random(RANDOM_RAYS)), 2 * np.pi * rng.random(RANDOM_RAYS)
    random = torch.from_numpy(np.stack([r * np.cos(angle), r * np.sin(angle)], -1))
    found: dict[Any, float] = {}
    with patch.object(pupil, "OPEN_ENOUGH", 0.0):  # DeepLens's rays go through the whole disc
        found["random"] = worst(kernels(random))
    for spp in LADDER:
        found[spp] = worst(kernels(pupil.spiral(spp, 0.7)))
        if found[spp] <= found["random"]:
            break
    engine.points = points
    return found


def deeplens_calls(lens: Lens, pitch_mm: float) -> Callable[[], object]:
    """CALLS calls of `GeoLens.psf` of 100k rays, at other places of the job each time, which cost differently."""
    geo = deeplens_of(lens, torch.float32)
    geo.pixel_size = pitch_mm
    rng = np.random.default_rng(1)
    field = np.linspace(-1, 1, 20)
    turn = iter(range(10**9))

    def calls() -> None:
        for _ in range(CALLS):
            x, y = rng.choice(field, 2)
            wavelength = JOB["wavelength"][next(turn) % 3]
            point = torch.tensor([x, y, -1500.0], dtype=torch.float32)
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                geo.psf(points=point, ks=64, wvln=wavelength, spp=RANDOM_RAYS, model="geometric", recenter=True)

    return calls


def whole_job(name: str, *, moves: tuple[Move, ...], repeats: int, references: int, device: str) -> dict[str, Any]:
    """Times of the job by DeepLens's loop and by ours, at matched error."""
    probe = Job(name, LADDER[0], "numba", moves)
    xs = np.linspace(0.0, 1.0, 4) ** 0.7
    field = torch.tensor([(x, y) for i, x in enumerate(xs) for y in xs[: i + 1]], dtype=torch.float64)
    assert isinstance(probe.engine, GeometricEngine)
    error = errors(probe.engine, field, 1500.0, references)
    spp = next(reversed([key for key in error if key != "random"]))
    works: dict[str, Callable[[], object]] = {"deeplens": deeplens_calls(probe.lens, probe.plan.config.pitch_um / 1000)}
    works["numba"] = Job(name, spp, "numba", moves).run
    works["torch eager"] = Job(name, spp, "torch", moves).run
    seconds = in_turn(works, repeats)
    kernels = probe.points * probe.psf.shape[0] * probe.psf.shape[2]
    seconds["deeplens"] *= kernels / CALLS
    if device != "cpu":
        seconds["torch " + device] = in_turn({"gpu": Job(name, spp, "torch", moves, device).run}, repeats, device)[
            "gpu"
        ]
    return {"spp": spp, "error": error[spp], "error_random": error["random"], "kernels": kernels, "seconds": seconds}


def reference_engine(name: str) -> float:
    """Milliseconds per kernel of `--engine deeplens`, which calls psf() twice a kernel, in float64."""
    lens, plan = load(RenderConfig(lens=name, spp=RANDOM_RAYS, engine="deeplens", device="cpu", **JOB), "cpu")
    engine = Specimens(lens, plan).engine(0)
    field = torch.tensor([[0.4, 0.2]], dtype=torch.float64)
    return 1000 * spent(lambda: engine.deposit(engine.aim(field, 1500.0, slice(0, 1)))) / len(plan.config.wavelength)


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lens", action="append", help="lenses of the whole job")
    parser.add_argument("--device", default="cpu", help="cuda adds the torch tracer on a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a smaller reference")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats, references = (3, 1) if options.quick else (9, 4)
    print(f"imports {IMPORT_S:.1f} s, {os.cpu_count()} cores, torch {torch.__version__}")
    figures: dict[str, Any] = {"import_s": IMPORT_S, "tracing": {}, "job": {}}

    print("\nTracing alone, Mray/s (times DeepLens in float32)")
    compiling = time.perf_counter()
    Job("singlet", 512, "numba").run()
    print(f"compilation, or reading it from the cache: {time.perf_counter() - compiling:.1f} s")
    for name in catalogue.names():
        rates = tracing(name, repeats)
        figures["tracing"][name] = rates
        base = rates["deeplens float32"]
        row = "  ".join(f"{what} {rate:.2f} ({rate / base:.1f}x)" for what, rate in rates.items())
        print(f"{name:<14}{row}", flush=True)
    for what in ("torch eager", "numba"):
        ratios = [rates[what] / rates["deeplens float32"] for rates in figures["tracing"].values()]
        print(f"{what}: geometric mean {geometric_mean(ratios):.1f}x, least {min(ratios):.1f}x")

    print("\nThe job: 20 x 20 over the full field, 8 focus distances, 3 wavelengths; seconds (times DeepLens)")
    jobs = [(name, ()) for name in options.lens or JOB_LENSES]
    jobs += [("double_gauss", AS_BUILT)] if not options.lens else []
    for name, moves in jobs:
        found = whole_job(name, moves=moves, repeats=repeats, references=references, device=options.device)
        label = name + (" as built" if moves else "")
        figures["job"][label] = found
        base = found["seconds"]["deeplens"]
        row = "  ".join(f"{what} {s:.3f} ({base / s:.0f}x)" for what, s in found["seconds"].items())
        print(
            f"{label:<22}{row}\n{'':<22}{found['spp']} rays: worst error {found['error']:.4f}, "
            f"of {RANDOM_RAYS} random rays {found['error_random']:.4f}; "
            f"numba {1e6 * found['seconds']['numba'] / found['kernels']:.1f} us a kernel",
            flush=True,
        )
    design = [f for label, f in figures["job"].items() if not label.endswith("as built")]
    for what in ("numba", "torch eager"):
        ratios = [f["seconds"]["deeplens"] / f["seconds"][what] for f in design]
        print(f"{what}: geometric mean {geometric_mean(ratios):.0f}x, least {min(ratios):.0f}x")
    print(f"--engine deeplens, {JOB_LENSES[1]}: {reference_engine(JOB_LENSES[1]):.0f} ms a kernel")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process {peak:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
