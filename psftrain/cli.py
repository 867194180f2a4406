"""The `psftrain` command: parse, call, print. No training."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from psfgen import __version__
from psfgen.errors import ConfigError, ended_by_signals, report

if TYPE_CHECKING:
    from psftrain.fit import Fitted

Command = Callable[..., Any]

NOTHING = "nothing was written; the same command begins anew"  # of work that a signal ends


def main() -> None:
    """Entry point of the console script."""
    # Threads that spin while they wait make training crawl on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Of several processes the first alone answers: standard output is one document.
    argv = sys.argv[1:] if _first() else [word for word in sys.argv[1:] if word != "--json"]
    sys.exit(report(lambda: cli(standalone_mode=False, prog_name="psftrain"), argv=argv))


def _first() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _on_disk(out: str) -> Path:
    """The path that --out names. Raises ConfigError for a URL."""
    from psfgen.store.place import is_url

    if is_url(out):
        raise ConfigError(f"--out {out}: this is written to a disk; name a path there, and upload it afterwards")
    return Path(out)


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Learn from a PSF store a model that gives the PSF anywhere, at once.

    \b
    psftrain fit                                train on psfs.zarr into runs/fit
    psftrain eval --store heldout.zarr          does it beat interpolation on points it never saw?
    psftrain sample runs/fit --grid 50 --depth 10m --focus 10m --out field.npz
    psftrain show                               how far is the newest run? curves as a picture
    psftrain export runs/fit                    the model for other programs: safetensors, ONNX, torch.export
    psftrain bake runs/fit                      a table of its kernels that is read in microseconds

    Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 incomplete, 75 stopped with the work saved.
    """  # noqa: D301  (click reads the escape)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def common(command: Command) -> Command:
    """The options every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)
    return click.option("-v", "--verbose", is_flag=True, help="Show where an error comes from.")(command)


@cli.command()
@click.argument("config", required=False, type=click.Path())
@click.option("--store", multiple=True, metavar="STORE", help="Store to train on; may be repeated. [psfs.zarr]")
@click.option("--run", metavar="DIR", help="Run directory. [runs/fit]")
@click.option("--val", metavar="STORE", help="Store of other points for validation; never the one eval judges on.")
@click.option("--init", metavar="RUN", help="Start from the weights of another run (by steps).")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any config key; the value is YAML.")
@click.option("--no-resume", is_flag=True, help="Refuse a run directory that is not empty.")
@common
def fit(
    config: str | None,
    store: tuple[str, ...],
    run: str | None,
    val: str | None,
    init: str | None,
    sets: tuple[str, ...],
    no_resume: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Solve the default model, or train another by steps; run it again to go on where it stopped.

    CONFIG is a YAML file, such as configs/fit/neural.yaml; options win over --set, --set over CONFIG.

    By steps in several processes, one a GPU: torchrun --standalone --nproc-per-node N -m -- psftrain fit ...
    """
    from psftrain.config import load_fit_config

    given = [("store", list(store) or None), ("run", run), ("val", val), ("init", init)]
    job = load_fit_config(config, [*sets, *((key, value) for key, value in given if value is not None)])

    from psftrain.fit import fit as train

    done = train(job, resume=not no_resume)
    if not _first():
        return 0
    scores = ", ".join(f"{name} {done.metrics[name]:.4g}" for name in SHOWN if done.metrics.get(name) is not None)
    text = f"{done.run}: {_worked(done)}" + (f"; {scores}" if scores else "")
    text += f"\nwatch it: tensorboard --logdir {done.run}/tb; judge it: psftrain eval {done.run} --store HELDOUT"
    paths = {"run": str(done.run), "best": str(done.run / "checkpoints" / "best.pt")}
    _answer("fit", {"paths": paths, "step": done.step, "metrics": done.metrics}, text, as_json)
    return 0


def _worked(done: Fitted) -> str:
    """What a run has done, in words."""
    what = f"{done.step} steps"
    if done.solved:
        what = "solved" if done.step else "checked, not solved"
    return f"{what} in {done.seconds:.0f} s" if done.seconds else f"{what}, nothing to do"


SHOWN = ("loss/recon", "loss/prior", "loss/kl", "left_out/rel_l2", "val_prior/rel_l2")


@cli.command(name="eval")
@click.argument("run", required=False)
@click.option("--store", metavar="STORE", help="Held-out store to score on. [the training points]")
@click.option("--no-baselines", is_flag=True, help="Leave out all that the model is measured against.")
@click.option("--out", metavar="DIR", help="Where the report goes. [RUN/eval]")
@common
def evaluate(
    run: str | None, store: str | None, no_baselines: bool, out: str | None, verbose: bool, as_json: bool
) -> int:
    """Say whether a model beats interpolation on held-out points, by how much, and how fast it is.

    RUN is a run directory; without it the newest in runs/.
    """
    from psfgen.store.schema import json_text
    from psftrain import report as reports
    from psftrain import run as runs
    from psftrain.evaluate import evaluate as score
    from psftrain.heldout import heldout_command
    from psftrain.origin import stores_of

    folder = _on_disk(out) if out else None
    trained = runs.load_run(Path(run) if run else runs.newest())
    found = score(trained, store, baselines=not no_baselines)
    advice = heldout_command(stores_of(trained)[0], trained.path)
    paths = reports.write(found, folder or trained.path / "eval", advice)
    if as_json:
        click.echo(json_text({**found.report, "command": "eval", "ok": True, "paths": _texts(paths)}))
    else:
        click.echo(reports.as_text(found.report, advice))
        click.echo("\n" + "\n".join(map(str, paths.values())))
    return 0


@cli.command()
@click.argument("run")
@click.option("--grid", type=int, metavar="N", help="N x N field points over the trained field.")
@click.option("--at", metavar="CSV", help="Points from a CSV file: field_x, field_y, depth_mm, focus_mm.")
@click.option("--depth", metavar="D", help="Depths of the grid. [the trained one]")
@click.option("--focus", metavar="D", help="Focus distances of the grid. [the trained one]")
@click.option("--wavelength", metavar="L", help="Wavelengths in um, also between those trained on. [the trained ones]")
@click.option("--outside", is_flag=True, help="Guess also outside the field and distances trained on; flagged.")
@click.option("--prior", "copies", type=int, metavar="M", help="M plausible copies of the lens, drawn from the prior.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Draws the copies of --prior. [0]")
@click.option("--out", metavar="FILE", required=True, help="A .npz file or a .zarr folder.")
@common
def sample(
    run: str,
    grid: int | None,
    at: str | None,
    depth: str | None,
    focus: str | None,
    wavelength: str | None,
    outside: bool,
    copies: int | None,
    seed: int | None,
    out: str,
    verbose: bool,
    as_json: bool,
) -> int:
    """Write a model's kernels (prior mean) at points of your choice."""
    from psftrain import sample as sampling
    from psftrain.run import load_run

    if (grid is None) == (at is None):
        raise ConfigError("give either --grid N or --at CSV")
    if at is not None and (depth or focus):
        raise ConfigError("--at brings its own depth_mm and focus_mm; leave out --depth and --focus")
    if seed is not None and copies is None:
        raise ConfigError(f"--seed {seed} draws copies; give --prior M too, or leave it out")
    path = _on_disk(out)
    sampling.require_new(path)
    trained = load_run(Path(run))
    if at is not None:
        points, shape = sampling.csv_points(at), None
    else:
        points, shape = sampling.grid_points(trained, grid or 0, depth, focus, copies or 1)
    model = sampling.model_for(trained, wavelength)
    with ended_by_signals(NOTHING):
        if copies is None:
            kernels = sampling.sample(model, points, outside=outside)
        else:
            kernels = sampling.draw(model, points, copies, seed or 0, outside=outside)
        sampling.write(path, model, kernels, points, shape)
    _answer("sample", {"paths": {"out": out}, "kernels": len(points)}, f"{out}: {len(points)} points", as_json)
    return 0


@cli.command()
@click.argument("run")
@click.option("--store", required=True, metavar="STORE", help="Measured kernels of one copy; a handful suffices.")
@click.option("--copy", type=int, metavar="I", help="Which copy of a store with several, counted from 0.")
@click.option("--out", metavar="DIR", help="The run that is written. [RUN-adapted]")
@common
def adapt(run: str, store: str, copy: int | None, out: str | None, verbose: bool, as_json: bool) -> int:
    """Find the copy of a lens that a few measured kernels are of, and write its whole field as a run.

    RUN was trained on many copies; what is written can be evaluated, sampled, exported and baked as any run.
    """
    from psftrain.adapt import adapt as infer
    from psftrain.run import load_run

    folder = _on_disk(out) if out else Path(f"{run.rstrip('/')}-adapted")
    with ended_by_signals(NOTHING):
        done = infer(load_run(Path(run)), store, copy, folder)
    text = (
        f"{done.run}: adapted to {done.kernels} kernels of {store}; at these the error fell from "
        f"{done.error_before:.1%} to {done.error:.1%}, over the field {done.expected_before:.1%} is expected of the "
        f"mean copy and {done.expected:.1%} of this one"
    )
    numbers = ("kernels", "error_before", "error", "expected_before", "expected")
    document = {"paths": {"run": str(done.run)}, **{name: getattr(done, name) for name in numbers}}
    _answer("adapt", document, text, as_json)
    return 0


@cli.command()
@click.argument("run", required=False)
@click.option("--out", metavar="PNG", help="Where the curves go. [RUN/curves.png]")
@common
def show(run: str | None, out: str | None, verbose: bool, as_json: bool) -> int:
    """Say how far a run is and how well it does, and draw its curves.

    RUN is a run directory; without it the newest in runs/.
    """
    from psftrain import show as showing
    from psftrain.run import newest

    folder = Path(run) if run else newest()
    log = showing.read_log(folder)
    state = showing.state(folder, log)
    curves = None
    if log.scalars and not state["solved"]:
        from psftrain.curves import draw

        curves = draw(log, showing.title(state), _on_disk(out) if out else folder / "curves.png")
    paths = {"run": str(folder), **({"curves": str(curves)} if curves else {})}
    _answer("show", {**state, "paths": paths}, showing.as_text(state, curves), as_json)
    return 0


@cli.command()
@click.argument("run")
@click.option(
    "--format", "formats", multiple=True, metavar="NAME", help="safetensors, onnx or torch; may be repeated. [all]"
)
@click.option("--out", metavar="DIR", help="Where the files go. [RUN/export]")
@common
def export(run: str, formats: tuple[str, ...], out: str | None, verbose: bool, as_json: bool) -> int:
    """Write a model for other programs: field, depth, focus -> kernel (prior mean).

    A former export is replaced. Each file is read again and compared with the model first.
    """
    from psftrain.export import export as write
    from psftrain.run import load_run

    done = write(load_run(Path(run)), formats, _on_disk(out) if out else Path(run) / "export")
    lines = [f"{done.paths['config']}: inputs, outputs, units"]
    lines += [f"{done.paths[name]}: differs from the model by at most {d:.2g}" for name, d in done.differences.items()]
    document = {"paths": _texts(done.paths), "differences": done.differences}
    _answer("export", document, "\n".join(lines), as_json)
    return 0


@cli.command()
@click.argument("run")
@click.option("--grid", type=int, metavar="N", help="N x N field points. [as many as it takes]")
@click.option("--depth", metavar="D", help="Depths of the table. [those trained on, and as many between as it takes]")
@click.option("--focus", metavar="D", help="Focus distances of the table. [likewise]")
@click.option("--store", metavar="STORE", help="Held-out store to judge table and model on.")
@click.option("--out", metavar="STORE", help="The table, a store. [RUN/table.zarr]")
@common
def bake(
    run: str,
    grid: int | None,
    depth: str | None,
    focus: str | None,
    store: str | None,
    out: str | None,
    verbose: bool,
    as_json: bool,
) -> int:
    """Write a model's kernels on a grid as a store that psftrain.open_table reads, for speed.

    Between the nodes the table is bilinear in the field and linear in dioptres; how far it then is from the model is
    measured at random places. What is left open is made so dense that the table adds little to the model's own error,
    in at most 256 MiB.
    """
    from psftrain import load
    from psftrain.bake import bake as write
    from psftrain.fidelity import as_text, heldout, judge
    from psftrain.table import Lattice, Table

    model = load(run)
    held = heldout(model, store) if store else None
    with ended_by_signals(NOTHING):
        table = write(model, grid, depth, focus, out or Path(run) / "table.zarr")
    judged = judge(model, Table(table), held) if held else None
    nodes = dict(zip(("focus", "depth", "field_y", "field_x"), Lattice(table.coords).shape, strict=True))
    error = table.attrs["bake"]["error"]
    document = {"paths": {"table": table.path}, "nodes": nodes, "error": error, "heldout": judged}
    _answer("bake", document, as_text(table, judged), as_json)
    return 0


def _texts(paths: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def _answer(command: str, document: dict[str, Any], text: str, as_json: bool) -> None:
    from psfgen.store.schema import json_text

    if as_json:
        text = json_text({"schema": 1, "command": command, "ok": True, "paths": {}, **document})
    click.echo(text)
