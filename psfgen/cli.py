"""The `psfgen` command: parse, call, print. No physics."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from psfgen import __version__
from psfgen.errors import ConfigError, progress, report, stop_signals

if TYPE_CHECKING:
    from psfgen.store import Store

Command = Callable[..., Any]
WAVEFRONT_OPTIONS: dict[str, str | None] = {  # those of `render` that `wavefront` has too, and their help
    "--lens": None,
    "--grid": "Field points a side. [5]",
    "--layout": None,
    "--field-max": None,
    "--sensor-mm": None,
    "--fnum": None,
    "--depth": "Object distances: inf, 2m, 0.4m:20m:8 ... [inf]",
    "--focus": "Focus distances, written likewise. [inf]",
    "--wavelength": None,
    "--reference-um": None,
    "--perturb": None,
    "--seed": "Draws layout random. [0]",
}
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


def config_options(command: Command, shown: dict[str, str | None] | None = None) -> Command:
    """`render`'s options: each is the config key of the same name. Of `shown`, if given, alone, with its help."""
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
            ("--engine", {"metavar": "NAME", "help": "geometric, wave, auto, or deeplens (its own psf())."}),
            ("--bandwidth-um", {"type": float, "help": "Width of the band about each wavelength (wave, auto)."}),
            ("--response", {"metavar": "NAME", "help": "Of a sample: bilinear, area or point (wave). [bilinear]"}),
            ("--tracer", {"metavar": "NAME", "help": "auto, numba (CPU), torch (GPU) or deeplens."}),
            ("--perturb", {"metavar": "FILE", "help": "YAML list of how the lens as built departs from its design."}),
            ("--copies", {"type": int, "help": "Render so many random specimens of the lens."}),
            ("--tolerances", {"metavar": "FILE", "help": "YAML of the standard deviations that the copies have."}),
            ("--seed", {"type": int, "help": "Turns the pupil points; draws layout random. [0]"}),
            ("--device", {"metavar": "D", "help": "auto, cpu, cuda or cuda:i."}),
            ("--workers", {"type": int, "help": "Processes. [one with a thread a core, or what the tracer needs]"}),
            ("--memory-mib", {"type": int, "help": "Most memory above the imports. [512]"}),
            ("--out", {"metavar": "STORE", "help": "The store: a path, or a URL such as s3://... [psfs.zarr]"}),
            ("--format", {"metavar": "NAME", "help": "zarr or hdf5. [zarr, unless STORE ends in .h5]"}),
            ("--executor", {"metavar": "NAME", "help": "Where the blocks run: local, dask or slurm. [local]"}),
            ("--scheduler", {"metavar": "ADDRESS", "help": "A dask scheduler that runs; means --executor dask."}),
        ]
    ):
        if shown is None or flag in shown:
            settings: dict[str, Any] = {**kwargs}  # type: ignore[dict-item]
            settings["help"] = (shown or {}).get(flag) or settings["help"]
            command = click.option(flag, **settings)(command)
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
    with stop_signals() as stopped:  # from the first moment: a queue may change its mind during the imports
        job = _job(config, sets, flags)
        shard = shard or (_array_shard() if job.executor == "local" else None)
        if dry_run:
            from psfgen.preview import preview

            _answer("render", *preview(job, shard, overwrite=overwrite), as_json)
            return 0
        return _render(job, shard, overwrite, verbose, as_json, stopped)


def _job(config: str | None, sets: tuple[str, ...], flags: dict[str, Any], base: dict[str, Any] | None = None) -> Any:
    """The render job that a file, --set and the other options make, over `base`."""
    from psfgen.config import RenderConfig, load_config

    given = {key: value for key, value in flags.items() if value is not None}
    given |= {key: _held(key, given[key], kind) for key, kind in FILES.items() if key in given}
    if "scheduler" in given:
        given = {"executor": "dask", **given, "dask.scheduler": given["scheduler"]}
        del given["scheduler"]
    for one, other in (("spp", "tolerance"), ("tolerance", "spp")):  # a flag takes the other's place in CONFIG
        if one in given:
            given.setdefault(other, None)
    return load_config(RenderConfig, config, [*sets, *given.items()], base=base)


def _array_shard() -> str | None:
    """The share of this task, where it is one of a Slurm array."""
    from psfgen.plan import array_shard

    shard = array_shard(os.environ)
    if shard is not None:
        task, _, tasks = shard.partition("/")
        click.echo(f"array task {int(task) + 1} of {tasks}: renders its share, as --shard {shard} would", err=True)
    return shard


def _render(job: Any, shard: str | None, overwrite: bool, verbose: bool, as_json: bool, stopped: list[str]) -> int:
    began = time.monotonic()

    from psfgen import render as rendering
    from psfgen.shortfalls import shortfalls
    from psfgen.store.schema import plain

    started: list[float] = []

    def start(plan: Any, kernels: int) -> None:
        started.append(time.monotonic())
        if job.executor != "slurm":
            bar.start(kernels, f"render {plan.lens_name}", "psf")

    before = _submission(job)
    with _Bar() as bar:
        store = rendering.render(
            job, shard=shard, overwrite=overwrite, on_start=start, on_kernels=bar.update, stopped=stopped
        )
    missing = len(store.missing())
    if missing and job.executor == "slurm":
        return _submitted(job, before, as_json)
    warnings = list(shortfalls(store)) if not missing else []
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if verbose and bar.n:
        click.echo(_timing(store, began, started[0]), err=True)
    did = f"{bar.n} kernels traced" if bar.n else "nothing to do"
    left = f"; {missing} of {len(store.blocks)} blocks still missing" if missing else ""
    _answer(
        "render",
        {
            "paths": {"store": store.path},
            "complete": not missing,
            "plan_sha256": store.attrs["plan_sha256"],
            "config": plain(store.attrs["config"]),
            "warnings": warnings,
        },
        f"{store.path}: {did}{left}",
        as_json,
    )
    return 0


def _submission(job: Any) -> Any:
    """What executor slurm submitted last for a job, if anything."""
    from psfgen.executors import slurm

    return slurm.submission(job.out) if job.executor == "slurm" else None


def _submitted(job: Any, before: Any, as_json: bool) -> int:
    """Say what was submitted, or that what was submitted before still runs, and how to follow it."""
    last = _submission(job)
    did = "is still in the queue" if last == before else f"submitted, and finaliser {last.finaliser} after it"
    text = (
        f"{job.out}: array job {last.array} ({len(last.indices)} {'task' if len(last.indices) == 1 else 'tasks'}) {did}"
    )
    document = {"complete": False, "slurm": {**vars(last), "submitted": last != before}, "paths": {"store": job.out}}
    _answer("render", document, f"{text}\nfollow it: psfgen status {job.out} --watch", as_json)
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


@cli.command()
@click.argument("store", default="psfs.zarr")
@common
def finalise(store: str, verbose: bool, as_json: bool) -> int:
    """Close a complete store: its metadata in one piece. Exits 3 while blocks are missing."""
    from psfgen.store import open_store

    opened = open_store(store)
    opened.finalise()
    _answer("finalise", {"paths": {"store": store}}, f"{store}: complete, {len(opened.blocks)} blocks", as_json)
    return 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--watch", is_flag=True, help="Follow it until it is complete, or its Slurm array has ended.")
@click.option("--every", metavar="S", type=click.FloatRange(min=0.1), help="Seconds between two looks.")
@common
def status(store: str, watch: bool, every: float | None, verbose: bool, as_json: bool) -> int:
    """Say which blocks of a store are done, running, failed and missing. Exits 3 while some are missing."""
    from psfgen.status import Status
    from psfgen.store import open_store

    opened = open_store(store, allow_incomplete=True)
    found = Status.of(opened)
    while watch and not found.over:
        terminal = sys.stderr.isatty()
        click.echo(f"\033[H\033[2J{found.text}" if terminal else found.line, err=True)
        time.sleep(every or (5 if terminal else 30))
        found = Status.of(opened)
    _answer("status", found.document, found.text, as_json)
    return 3 if found.missing else 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--deep", is_flag=True, help="Render a sample of the kernels again, and compare.")
@click.option("--sample", type=click.IntRange(1), default=64, show_default=True, help="Field points that --deep takes.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which --deep takes.")
@common
def verify(store: str, deep: bool, sample: int, seed: int, verbose: bool, as_json: bool) -> int:
    """Check schema, ledger, every checksum and every value. Exits 1 on a fault, 3 if incomplete."""
    from psfgen.store import open_store
    from psfgen.store.verify import problems

    opened = open_store(store, allow_incomplete=True)
    missing = len(opened.missing())
    with progress(len(opened.blocks) - missing, "verify", "block") as bar:
        faults = [str(problem) for problem in problems(opened, on_block=bar.update)]
    checked = f"{bar.n} of {len(opened.blocks)} blocks checked"
    cure = f"psfgen repair {store}"
    if deep and not faults:
        from psfgen.deep import differences

        points = len(opened.coords["field_y"]) * len(opened.coords["field_x"]) * bar.n
        with progress(min(sample, points), "render again", "point") as bar:
            found = list(differences(opened, sample=sample, seed=seed, on_point=bar.update))
        faults = [text for _, text in found]
        cure += "".join(f" --drop {block}" for block in dict.fromkeys(block for block, _ in found))
        checked += f", {bar.n} field points rendered again"
    state = "corrupt" if faults else "incomplete" if missing else "sound"
    lines = [f"{store}: {state}, {checked}", *faults]
    if faults:
        lines.append(f"to mend it: {cure}, then run the same render again")
    document = {"ok": not faults and not missing, "complete": not missing, "problems": faults}
    document["paths"] = {"store": store}
    _answer("verify", document, "\n".join(lines), as_json)
    return 1 if faults else 3 if missing else 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option(
    "--drop", multiple=True, metavar="BLOCK", help="Drop this block too (name or number), though it is sound."
)
@common
def repair(store: str, drop: tuple[str, ...], verbose: bool, as_json: bool) -> int:
    """Restore metadata, drop broken blocks so that `render` makes them again, sweep up after killed writers."""
    from psfgen.store import open_store
    from psfgen.store.repair import repair as mend

    def on_open(found: Store) -> Callable[[], object]:
        bar.start(len(found.blocks) - len(found.missing()), "verify", "block")
        return bar.update

    with _Bar() as bar:
        done = mend(store, drop, on_open)
    opened = open_store(store, allow_incomplete=True)
    missing = len(opened.missing())
    lines = [
        *(f"restored {name}" for name in done.restored),
        *(f"dropped {text}" for text in done.dropped.values()),
        *(f"removed {name}, which a killed writer left" for name in done.swept),
    ]
    total = len(opened.blocks)
    end = f"{missing} of {total} blocks are missing, run the same `psfgen render` again" if missing else "complete"
    document = {"complete": not missing, "paths": {"store": store}, **vars(done)}
    _answer("repair", document, "\n".join([*lines, f"{store}: {end}"]), as_json)
    return 0


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
    pages = contact_sheets(opened, Path(out or f"{Path(opened.path).stem}.png"), depth=depth, focus=focus, copy=copy)
    _answer("show", {"paths": {"pictures": [str(page) for page in pages]}}, "\n".join(map(str, pages)), as_json)
    return 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--to", metavar="NAME", required=True, help="hdf5, psf-densify, gridded (photutils) or csv.")
@click.option("--out", metavar="FILE", required=True, help="The file.")
@click.option("--depth", metavar="D", help="Depths to export. [all]")
@click.option("--focus", metavar="D", help="Focus distances to export. [all]")
@click.option("--wavelength", metavar="L", help="Wavelengths to export. [all]")
@click.option("--copy", metavar="N", type=int, help="Which copy to export. [all]")
@click.option("--overwrite", is_flag=True, help="Replace FILE where it exists.")
@common
def export(store: str, to: str, out: str, overwrite: bool, verbose: bool, as_json: bool, **selected: Any) -> int:
    """Write a store, or the part that options select, for other programs."""
    from psfgen import export as exporting
    from psfgen.select import Selection
    from psfgen.store import open_store

    selection = Selection.of(open_store(store), **selected)

    def on_kernels(count: int) -> None:
        if not bar.n:
            bar.start(selection.kernels, "export", "psf")
        bar.update(count)

    with _Bar() as bar:
        exporting.export(selection, to, Path(out), overwrite=overwrite, on_kernels=on_kernels)
    nbytes = Path(out).stat().st_size
    document = {"to": to, "kernels": selection.kernels, "bytes": nbytes, "paths": {"store": store, "out": out}}
    _answer("export", document, f"{out}: {selection.kernels} kernels, {nbytes / 2**20:.1f} MiB", as_json)
    return 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--out", metavar="PNG", help="Draw the histograms and the mean kernels too.")
@common
def stats(store: str, out: str | None, verbose: bool, as_json: bool) -> int:
    """Summarise every number of a store: light, energy, truncation, noise, with histograms."""
    from psfgen.stats import draw, statistics, text
    from psfgen.store import open_store

    opened: Store = open_store(store)
    document = statistics(opened)
    lines = [text(document)]
    if out:
        title = f"{opened.attrs['lens']['name']}   {Path(opened.path).name}   {document['kernels']} kernels"
        draw(document, title, Path(out))
        document["paths"]["picture"] = out
        lines.append(out)
    del document["mean_psf"]
    _answer("stats", document, "\n".join(lines), as_json)
    return 0


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--out", metavar="PNG", help="The picture; several pages get a suffix each. [STORE-mtf.png]")
@click.option("--csv", "csv_file", metavar="FILE", help="Write the curves of every kernel too.")
@click.option("--depth", metavar="D", help="Depths to look at. [the one most in focus]")
@click.option("--focus", metavar="D", help="Focus distances to look at. [all]")
@click.option("--wavelength", metavar="L", help="Wavelengths to look at, apart and together. [all]")
@click.option("--copy", metavar="N", type=int, help="Which copy to look at. [0]")
@common
def mtf(
    store: str, out: str | None, csv_file: str | None, copy: int | None, verbose: bool, as_json: bool, **selected: Any
) -> int:
    """Modulation transfer of the kernels: tangential and sagittal curves, MTF50 over the field."""
    from psfgen import mtf as transfer
    from psfgen.select import Selection
    from psfgen.store import open_store

    selection = Selection.of(open_store(store), copy=copy or 0, **selected)
    picture = out or f"{Path(selection.store.path).stem}-mtf.png"
    points = len(selection.store.coords["field_x"]) * len(selection.store.coords["field_y"])
    with progress(points * len(transfer.chosen(selection)), "mtf", "point") as bar:
        document, text = transfer.run(selection, picture=picture, csv_file=csv_file, on_points=bar.update)
    _answer("mtf", document, text, as_json)
    return 0


@cli.command()
@click.argument("config", required=False, type=click.Path())
@partial(config_options, shown=WAVEFRONT_OPTIONS)
@click.option("--field", "fields", multiple=True, metavar="X,Y", help="A field point, instead of the grid; repeatable.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any config key; the value is YAML.")
@click.option(
    "--out", "picture", metavar="PNG", help="Draw maps over the field too, a page a depth, focus, wavelength."
)
@click.option("--csv", "csv_file", metavar="FILE", help="Write a row a wavefront, with all Zernike coefficients.")
@common
def wavefront(
    config: str | None,
    fields: tuple[str, ...],
    sets: tuple[str, ...],
    picture: str | None,
    csv_file: str | None,
    verbose: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Say how good the wavefronts of a lens are: RMS, peak to valley, Strehl ratio, Zernike coefficients.

    CONFIG is a YAML file of `render`'s keys; options win over --set, --set over CONFIG.
    """
    from psfgen import wavefronts

    survey = wavefronts.Survey(_job(config, sets, flags, wavefronts.DEFAULTS), [_point(text) for text in fields])
    with progress(survey.count, f"wavefront {survey.lens.name}", "wavefront") as bar:
        document, text = wavefronts.run(survey, picture=picture, csv_file=csv_file, on_wavefront=bar.update)
    _answer("wavefront", document, text, as_json)
    return 0


def _point(text: str) -> tuple[float, float]:
    """A field point, as typed."""
    from psfgen.quantities import parse_pair

    try:
        return parse_pair(text)
    except ValueError as error:
        raise ConfigError(f"--field {text}: {error}") from None


@cli.command()
@click.argument("stores", nargs=-1, metavar="STORE STORE...")
@click.option("--out", required=True, metavar="STORE", help="The store that is made.")
@click.option("--along", metavar="DIM", help="The axis; needed for copies alone. [the one they differ along]")
@click.option("--format", metavar="NAME", help="zarr or hdf5. [zarr, unless --out ends in .h5]")
@click.option("--overwrite", is_flag=True, help="Start anew where the store exists.")
@common
def merge(
    stores: tuple[str, ...],
    out: str,
    along: str | None,
    format: str | None,
    overwrite: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Join stores that differ along one axis into one; run it again to finish what is missing."""
    from psfgen.merge import merge as join

    return _copied("merge", as_json, join, stores, out, along=along, format=format, overwrite=overwrite)


@cli.command()
@click.argument("store", default="psfs.zarr")
@click.option("--out", required=True, metavar="STORE", help="The store that is made.")
@click.option("--chunks", required=True, metavar="DIM=N,...", help="Sizes along focus, field_y, field_x, wavelength.")
@click.option("--format", metavar="NAME", help="zarr or hdf5. [zarr, unless --out ends in .h5]")
@click.option("--overwrite", is_flag=True, help="Start anew where the store exists.")
@common
def rechunk(
    store: str, out: str, chunks: str, format: str | None, overwrite: bool, verbose: bool, as_json: bool
) -> int:
    """Write a store anew in other chunks; run it again to finish what is missing."""
    from psfgen.rechunk import rechunk as write_anew

    return _copied("rechunk", as_json, write_anew, store, out, chunks, format=format, overwrite=overwrite)


def _copied(command: str, as_json: bool, work: Callable[..., Store], *args: Any, **kwargs: Any) -> int:
    """Run `merge` or `rechunk` under a bar, and say what came out."""
    with _Bar() as bar:
        store = work(*args, **kwargs, on_start=lambda blocks: bar.start(blocks, command, "block"), on_block=bar.update)
    did = f"{bar.n} of {len(store.blocks)} blocks written" if bar.n else "nothing to do"
    document = {"paths": {"store": store.path}, "plan_sha256": store.attrs["plan_sha256"]}
    _answer(command, document, f"{store.path}: {did}", as_json)
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


class _Bar:
    """A progress bar that comes when the work begins, not before a refusal, and not where there is nothing to do."""

    def __init__(self) -> None:
        self.n = 0
        self._bar: Any = None

    def start(self, total: int, description: str, unit: str) -> None:
        if total:
            self._bar = progress(total, description, unit)

    def update(self, count: int = 1) -> None:
        self.n += count
        self._bar.update(count)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _answer(command: str, document: dict[str, Any], text: str, as_json: bool) -> None:
    from psfgen.store.schema import json_text

    if as_json:
        text = json_text({"schema": 1, "command": command, "ok": True, "paths": {}, **document})
    click.echo(text)
