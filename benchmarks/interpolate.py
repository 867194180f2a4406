"""The scoreboard: does a model beat interpolation? Writes docs/results.md; every number in it comes out of here.

    python benchmarks/interpolate.py [--parts NAME,...] [--cells NAME,...] [--grids 5,10,20] [--seeds 6,7,8]
                                     [--models NAME,...] [--set KEY=VALUE]... [--work DIR] [--out FILE]
                                     [--threads N] [--quick]

A part is a section of the page: `lenses` is measured here, any other by `measure` of the module of its name, which
writes NAME.json into the work folder. Of `lenses`, a cell is a lens of configs/render/cells at one training grid. For
each seed a training store and 1024 other points of the same specimen are rendered, the models trained (the first is
the one compared) and scored. A seed draws the specimen of a lens as built, the held-out points and the pupil.
Everything is kept in the work folder: the same command goes on where it was stopped, and `python
benchmarks/results.py` writes the page again from what is there.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import results
import torch
from pooled import calibrated, pool
from scored import CELLS, ROOT, Scored, Setting, Task, circumstances, read, save, score, source

from psfgen.errors import Preempted, PsfError
from psftrain.config import FitConfig

MOST_S = 360.0  # that a fit (at most 5 minutes) and its evaluation may take: expected before the first has ended
PARTS = ("lenses", "copies", "distances", "bake")
BLIND = [6, 7, 8]  # while settings were chosen, 0 to 5 were in view
QUICK: dict[str, Any] = {"grids": [5], "seeds": [0]}
QUICK_SETTING: dict[str, Any] = {"held_side": 12, "mlp_steps": 300}


def main() -> None:
    """Measure what is missing, and write the page."""
    given = arguments()
    setting = Setting(given.work / "quick" if given.quick else given.work, given.threads, tuple(given.sets))
    if given.quick:
        vars(given).update(QUICK)
        setting = Setting(setting.work, setting.threads, tuple(given.sets), **QUICK_SETTING)
    torch.set_num_threads(given.threads)
    began = time.monotonic()
    failures: list[str] = []
    try:
        for part in given.parts:
            print(f"\n--- {part} ---\n", flush=True)
            failures += single_lenses(given, setting) if part == "lenses" else measured(part, setting, given.quick)
    except Preempted as stopped:
        sys.exit(f"{stopped}; what was done before is kept in {setting.work}, the same command goes on")
    print(f"\nall of it took {(time.monotonic() - began) / 60:.1f} min\n")
    text = results.page(setting.work)
    if given.quick:
        print(text)
    else:
        given.out.write_text(text, encoding="utf-8")
        print(f"{given.out} is written")
    sys.exit("\n".join(failures) or 0)


def arguments() -> argparse.Namespace:
    """The options, lists as lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [path.stem for path in sorted(CELLS.glob("*.yaml"))]
    parser.add_argument("--parts", type=_words, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cells", type=_words, default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--grids", type=_numbers, default=[5, 10, 20], help="field points a side that are trained on")
    parser.add_argument("--seeds", type=_numbers, default=BLIND)
    parser.add_argument("--models", type=_words, default=[FitConfig().model.name], help="the first is the one compared")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="a key of the fits")
    parser.add_argument("--work", type=Path, default=Path("build/results"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--threads", type=int, default=2, help="for training; kernels are timed on one")
    parser.add_argument("--quick", action="store_true", help="one grid, one seed, few points; prints, writes no page")
    given = parser.parse_args()
    for what, asked, known in (("part", given.parts, PARTS), ("cell", given.cells, names)):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            parser.error(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return given


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def measured(part: str, setting: Setting, quick: bool) -> list[str]:
    """Measure a part that a module of its own measures; returns what failed."""
    try:
        importlib.import_module(part).measure(setting, quick)
    except Preempted:
        raise
    except PsfError as error:
        print(f"{part}: {error}", flush=True)
        return [f"{part}: {error}"]
    return []


def single_lenses(given: argparse.Namespace, setting: Setting) -> list[str]:
    """Every lens, grid, seed and model, into interpolate.json; returns what failed."""
    tasks = [
        Task(cell, grid, seed, model)
        for seed in given.seeds
        for cell in given.cells
        for grid in given.grids
        for model in given.models
    ]
    done, failures = run(tasks, setting)
    cells = []
    for cell in given.cells:
        for grid in given.grids:
            by_model = {
                model: [
                    found for task, found in done.items() if (task.cell, task.grid, task.model) == (cell, grid, model)
                ]
                for model in given.models
            }
            if by_model[given.models[0]]:
                cells.append({"cell": cell, "grid": grid, **pool(by_model)})
    about = circumstances(setting, list(done.values()))
    asked = {key: getattr(given, key) for key in ("models", "grids", "seeds")}
    save(
        setting.work / "interpolate.json", {**asked, **about, "cells": cells, "calibration": _calibration(given, done)}
    )
    return failures


def _calibration(given: argparse.Namespace, done: dict[Task, Scored]) -> list[dict[str, Any]]:
    """Of each lens, over all its grids and seeds, and at each grid."""
    found = []
    for cell in given.cells:
        own = {task: score for task, score in done.items() if (task.cell, task.model) == (cell, given.models[0])}
        for grids in (given.grids, *([grid] for grid in given.grids)):
            parts = [score for task, score in own.items() if task.grid in grids]
            if parts and (judged := calibrated(parts)) is not None:
                found.append({"cell": cell, "grids": grids, **judged})
    return found


def run(tasks: list[Task], setting: Setting) -> tuple[dict[Task, Scored], list[str]]:
    """What came out of every task, done now or before, and what failed; says how long it will take."""
    kept = [found for task in tasks if (found := read(setting.folder(task))) is not None]
    spent = [found.all_s for found in kept]
    print(
        f"{len(tasks)} fits, {len(spent)} of them kept in {setting.work}; {_expected(len(tasks) - len(spent), spent)}"
    )
    stale = sum(found.source != source() for found in kept)
    if stale:
        print(f"{stale} of them by another source than today's; delete {setting.work / 'interpolate'} to do them again")
    done, failures = dict[Task, Scored](), list[str]()
    for number, task in enumerate(tasks, start=1):
        try:
            found, now = score(task, setting)
        except Preempted:
            raise
        except PsfError as error:
            failures.append(f"{task}: {error}")
            print(failures[-1], flush=True)
            continue
        done[task] = found
        if now:
            spent.append(found.all_s)
            print(f"{number}/{len(tasks)} {task}: {_line(found)}; {_expected(len(tasks) - number, spent)}", flush=True)
    return done, failures


def _expected(left: int, spent: list[float]) -> str:
    each = statistics.mean(spent) if spent else MOST_S
    return f"{'about' if spent else 'at most'} {left * each / 60:.0f} min to come"


def _line(found: Scored) -> str:
    report = found.report
    ours, best = report["rows"]["prior_mean"]["rel_l2"]["mean"], report["best_classical"]
    theirs = report["rows"][best]["rel_l2"]["mean"]
    return f"{ours:.2%} against {theirs:.2%} ({best}), a ratio of {ours / theirs:.2f}, trained {found.fit_s:.0f} s"


if __name__ == "__main__":
    main()
