"""The `psfgen` command: parse, call, print. No physics."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from psfgen import __version__
from psfgen.errors import ConfigError, progress, report

if TYPE_CHECKING:
    from psfgen.store import Store

Command = Callable[..., Any]
FILES = {"perturb": list, "tolerances": dict}  # options that name a YAML file, and what it holds


def main() -> None:
    """Entry point of the console script."""
    sys.exit(report(lambda: cli(standalone_mode=False, prog_name="psfgen")))


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Ray-trace the point-spread functions of a lens over field, depth, focus and wavelength.

    \b
    psfgen render --grid 20      trace the default lens into psfs.zarr
    psfgen show psfs.zarr        draw what came out
    psftrain fit                 train a model on it

    Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 incomplete, 75 stopped with the work saved.
    """  # noqa: D301  (click reads the escape)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def common(command: Command) -> Command:
    """The options every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)
    return click.option("-v", "--verbose", is_flag=True, help="Show where an error comes from, and where time went.")(
        command
    )


def config_options(command: Command) -> Command:
    """`render`'s options: each is the config key of the same name."""
    for flag, kwargs in reversed(
        [
            ("--lens", {"metavar": "NAME|FILE", "help": "A name from `psfgen lenses`, or a .json, .zmx or .seq file."}),
            ("--grid", {"type": int, "help": "Field points a side. [20]"}),
            ("--layout", {"metavar": "grid|cells|random", "help": "Nodes, cell centres or random field points."}),
            ("--field-max", {"type": float, "help": "Half side of the field, in half sensor sides."}),
            ("--sensor-mm", {"metavar": "W,H", "help": "Sensor size."}),
            ("--fnum", {"type": float, "help": "Stop the lens down to this F-number."}),
            ("--depth", {"metavar": "D", "help": "Object distances: 0.4m:20m:8, 1m,2m,inf ..."}),
            ("--focus", {"metavar": "D", "help": "Focus distances, written likewise."}),
            ("--wavelength", {"metavar": "L", "help": "Wavelengths in um. [0.45,0.55,0.65]"}),
            ("--reference-um", {"type": float, "help": "Wavelength of EFL, focus and chief ray. [0.5876]"}),
            ("--tolerance", {"type": float, "help": "Relative L2 error that a kernel's noise may reach. [0.03]"}),
            ("--spp", {"type": int, "help": "Rays per kernel, the same for all, instead of a tolerance."}),
            ("--kernel-px", {"type": int, "help": "Samples a side of a kernel. [64]"}),
            ("--bins", {"type": int, "help": "Bins a side of the binned kernel. [15]"}),
            ("--pitch-um", {"type": float, "help": "Sample spacing at the sensor."}),
            ("--engine", {"metavar": "NAME", "help": "geometric, or deeplens (its own psf(), for comparison)."}),
            ("--tracer", {"metavar": "NAME", "help": "auto, numba (CPU), torch (GPU) or deeplens."}),
            ("--perturb", {"metavar": "FILE", "help": "YAML list of how the lens as built departs from its design."}),
            ("--copies", {"type": int, "help": "Render so many random specimens of the lens."}),
            ("--tolerances", {"metavar": "FILE", "help": "YAML of the standard deviations that the copies have."}),
            ("--seed", {"type": int, "help": "Turns the pupil points; draws layout random. [0]"}),
            ("--device", {"metavar": "D", "help": "auto, cpu, cuda or cuda:i."}),
            ("--workers", {"type": int, "help": "Processes. [one with a thread a core, or what the tracer needs]"}),
            ("--memory-mib", {"type": int, "help": "Most memory above the imports. [512]"}),
            ("--out", {"metavar": "STORE", "help": "The store. [psfs.zarr]"}),
            ("--format", {"metavar": "NAME", "help": "Format of the store. [zarr]"}),
            ("--executor", {"metavar": "NAME", "help": "Where the blocks run. [local]"}),
        ]
    ):
        command = click.option(flag, **kwargs)(command)  # type: ignore[arg-type]
    return command


@cli.command()
@click.argument("config", required=False, type=click.Path())
@config_options
@click.option("--shard", metavar="I/N", help="Render every N-th block only, from the I-th (0-based).")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any config key; the value is YAML.")
@click.option("--dry-run", is_flag=True, help="Say what would be rendered, and stop.")
@click.option("--overwrite", is_flag=True, help="Start anew where the store exists.")
@common
def render(
    config: str | None,
    shard: str | None,
    sets: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    verbose: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Trace PSF grids into a store; run it again to finish what is missing.

    CONFIG is a YAML file of the same keys; options win over --set, --set over CONFIG.
    """
    began = time.monotonic()
    from psfgen.config import RenderConfig, load_config

    given = {key: value for key, value in flags.items() if value is not None}
    given |= {key: _held(key, given[key], kind) for key, kind in FILES.items() if key in given}
    for one, other in (("spp", "tolerance"), ("tolerance", "spp")):  # a flag takes the other's place in CONFIG
        if one in given:
            given.setdefault(other, None)
    job = load_config(RenderConfig, config, [*sets, *given.items()])

    from psfgen import render as rendering
    from psfgen.shortfalls import shortfalls
    from psfgen.store.schema import plain

    if dry_run:
        return _dry_run(job, shard, as_json)
    bars: list[Any] = []

    started: list[float] = []

    def start(plan: Any, kernels: int) -> None:
        started.append(time.monotonic())
        if kernels:
            bars.append(progress(kernels, f"render {plan.lens_name}", "psf"))

    try:
        store = rendering.render(
            job, shard=shard, overwrite=overwrite, on_start=start, on_kernels=lambda n: bars[0].update(n)
        )
    finally:
        for bar in bars:
            bar.close()
    missing = len(store.missing())
    warnings = list(shortfalls(store)) if not missing else []
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if verbose and bars:
        click.echo(_timing(store, began, started[0]), err=True)
    did = f"{bars[0].n} kernels traced" if bars else "nothing to do"
    left = f"; {missing} of {len(store.blocks)} blocks still missing" if missing else ""
    _answer(
        "render",
        {
            "paths": {"store": str(store.path)},
            "complete": not missing,
            "plan_sha256": store.attrs["plan_sha256"],
            "config": plain(store.attrs["config"]),
            "warnings": warnings,
        },
        f"{store.path}: {did}{left}",
        as_json,
    )
    return 0


def _held(flag: str, path: str, kind: type) -> Any:
    """What the YAML file of a flag holds, which must be a list or a mapping."""
    from psfgen.config import read_yaml

    held = read_yaml(path)
    if not isinstance(held, kind):
        raise ConfigError(f"--{flag} {path} holds no {'list' if kind is list else 'KEY: VALUE lines'}")
    return held


def _timing(store: Any, began: float, started: float) -> str:
    """Where the time of a render went, in words."""
    entries = [store.ledger.read(block) for block in store.ledger.done()]
    parts = {part: sum(entry.get(f"seconds_{part}", 0.0) for entry in entries) for part in ("tracing", "writing")}
    rays = sum(entry["rays"] for entry in entries)
    return (
        f"time: start-up {started - began:.1f} s (imports, lens, tracer), then {time.monotonic() - started:.1f} s; "
        f"in the blocks of this store {parts['tracing']:.1f} s tracing {rays / 1e6:.0f} million rays, "
        f"{parts['writing']:.1f} s writing"
    )


def _dry_run(job: Any, shard: str | None, as_json: bool) -> int:
    from psfgen.block import cut_block
    from psfgen.engines import engine_class
    from psfgen.executors import executor
    from psfgen.plan import share
    from psfgen.render import load, resolve_device
    from psfgen.show import span
    from psfgen.specimens import Specimens
    from psfgen.store.open import store_class

    engine_class(job.engine), executor(job.executor), store_class(job.format)
    lens, plan = load(job, resolve_device(job.device))
    blocks = len(share(plan.blocks, shard))
    cut_block(Specimens(lens, plan).engine(0), plan, cores=1)
    memory = plan.config.memory_mib * 2**20
    effort = f"{plan.config.spp} rays a kernel" if plan.config.spp else f"noise at most {plan.config.tolerance:g}"
    document = {
        "config": plan.config.model_dump(),
        "plan_sha256": plan.sha256,
        "kernels": blocks * plan.kernels_per_block,
        "blocks": blocks,
        "bytes": plan.nbytes,
        "memory_bytes": memory,
        "paths": {"store": plan.config.out},
    }
    text = (
        f"lens {lens.name}: EFL {lens.efl_mm:.3f} mm, F/{lens.fnum:.2f}\n"
        f"depth {span(plan.coords['depth'])} mm, focus {span(plan.coords['focus'])} mm, "
        f"wavelength {span(plan.coords['wavelength'])} um\n"
        f"field x {span(plan.coords['field_x'])}, y {span(plan.coords['field_y'])} half sensor sides\n"
        f"{plan.config.kernel_px} x {plan.config.kernel_px} samples of {plan.config.pitch_um:g} um, "
        f"{effort}, tracer {plan.config.tracer}\n"
        f"{document['kernels']} kernels in {blocks} {'block' if blocks == 1 else 'blocks'}; "
        f"the store holds {plan.nbytes / 2**20:.0f} MiB before compression, "
        f"rendering takes at most {plan.config.memory_mib} MiB of memory above the imports\n"
        f"would be rendered into {plan.config.out}"
    )
    _answer("render", document, text, as_json)
    return 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@common
def status(store: str, verbose: bool, as_json: bool) -> int:
    """Say which blocks of a store are done. Exits 3 while some are missing."""
    from psfgen.store import open_store

    opened = open_store(store, allow_incomplete=True)
    total, missing = len(opened.blocks), len(opened.missing())
    running, failed = opened.ledger.running(), opened.ledger.failed()
    counts = {
        "total": total,
        "done": total - missing,
        "running": len(running),
        "failed": len(failed),
        "missing": missing,
    }
    lines = [f"{store}: {counts['done']} of {total} blocks done, {len(running)} running, {len(failed)} failed"]
    lines += [f"{block} failed: {error}" for block, error in sorted(failed.items())]
    document = {"ok": not missing, "complete": not missing, "blocks": counts, "failed": failed}
    _answer("status", {**document, "paths": {"store": store}}, "\n".join(lines), as_json)
    return 3 if missing else 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@common
def verify(store: str, verbose: bool, as_json: bool) -> int:
    """Check schema, ledger, every checksum and every value. Exits 1 on a fault, 3 if incomplete."""
    from psfgen.store import open_store
    from psfgen.store.verify import problems

    opened = open_store(store, allow_incomplete=True)
    missing = len(opened.missing())
    bar = progress(len(opened.blocks) - missing, "verify", "block")
    try:
        faults = list(problems(opened, on_block=bar.update))
    finally:
        bar.close()
    state = "corrupt" if faults else "incomplete" if missing else "sound"
    lines = [f"{store}: {state}, {bar.n} of {len(opened.blocks)} blocks checked", *faults]
    if faults:
        lines.append(f"to mend a block: delete {store}/ledger/BLOCK.json and run the same render again")
    document = {"ok": not faults and not missing, "complete": not missing, "problems": faults}
    document["paths"] = {"store": store}
    _answer("verify", document, "\n".join(lines), as_json)
    return 1 if faults else 3 if missing else 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@common
def info(store: str, verbose: bool, as_json: bool) -> int:
    """Describe a store: lens, axes, sampling, light and noise, provenance."""
    from psfgen.show import describe
    from psfgen.store import open_store

    document, text = describe(open_store(store, allow_incomplete=True))
    _answer("info", document, text, as_json)
    return 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--out", metavar="PNG", help="The picture; several pages get a suffix each. [STORE.png]")
@click.option("--depth", metavar="D", help="Depths to draw. [the one most in focus]")
@click.option("--focus", metavar="D", help="Focus distances to draw. [all]")
@click.option("--copy", metavar="N", type=int, help="Which copy to draw. [0]")
@common
def show(
    store: str, out: str | None, depth: str | None, focus: str | None, copy: int | None, verbose: bool, as_json: bool
) -> int:
    """Draw contact sheets: the kernels over the field, in colour, a page a depth and focus."""
    from psfgen.show import contact_sheets
    from psfgen.store import open_store

    opened: Store = open_store(store)
    pages = contact_sheets(opened, Path(out or f"{opened.path.stem}.png"), depth=depth, focus=focus, copy=copy)
    _answer("show", {"paths": {"pictures": [str(page) for page in pages]}}, "\n".join(map(str, pages)), as_json)
    return 0


@cli.command()
@common
def lenses(verbose: bool, as_json: bool) -> int:
    """List the lenses that come with psfgen."""
    from psfgen.catalogue import shipped

    rows = [
        {"name": name, "info": document["info"], **document["psfgen"], "sensor_mm": document["sensor_size"]}
        for name, document in shipped().items()
    ]
    head = f"{'name':<14}{'EFL mm':>8}{'F/':>7}{'FoV deg':>9}{'field':>7}{'pitch um':>10}  description"
    lines = [
        f"{r['name']:<14}{r['efl_mm']:>8.2f}{r['fnum']:>7.2f}{r['fov_diag_deg']:>9.1f}{r['field_max']:>7.1f}"
        f"{r['pitch_um']:>10.2f}  {r['info']} ({r['source']})"
        for r in rows
    ]
    _answer("lenses", {"lenses": rows}, "\n".join([head, *lines]), as_json)
    return 0


@cli.command()
@common
def doctor(verbose: bool, as_json: bool) -> int:
    """Say what this machine has, check a small render against theory, and what to do about what is missing."""
    from psfgen.doctor import examine

    findings = examine()
    lines = [f"{'ok ' if f.ok else 'NO ' if f.needed else '-- '} {f.name:<12} {f.found}" for f in findings]
    lines += [f"   to do: {f.advice}" for f in findings if not f.ok and f.advice]
    ok = all(f.ok for f in findings if f.needed)
    _answer("doctor", {"ok": ok, "findings": [vars(f) for f in findings]}, "\n".join(lines), as_json)
    return 0 if ok else 1


def _answer(command: str, document: dict[str, Any], text: str, as_json: bool) -> None:
    from psfgen.store.schema import json_text

    if as_json:
        text = json_text({"schema": 1, "command": command, "ok": True, "paths": {}, **document})
    click.echo(text)
