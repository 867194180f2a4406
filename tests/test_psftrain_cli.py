"""The `psftrain` command as a user meets it: starting up, answers, exit codes; how each command errs stands with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Ran, contents
from training import TINY, make_store, one_line_error, psftrain, words

from psfgen import __version__

HEAVY = {"torch", "deeplens", "zarr", "dask", "xarray", "numpy", "matplotlib", "scipy", "tensorboard"}
COMMANDS = ("fit", "eval", "sample", "show", "export", "bake")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sets(**changes: object) -> list[str]:
    return [word for key, value in {**TINY, **changes}.items() for word in ("--set", f"{key}={json.dumps(value)}")]


# --- starting up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [["-m", "psftrain"], [str(Path(sys.executable).with_name("psftrain"))]])
def test_help_starts_without_the_heavy_libraries(start: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *start, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "psftrain" in imported, "nothing was measured"
    assert not HEAVY & imported
    assert done.stdout.startswith("Usage: psftrain ")


@pytest.mark.parametrize("module", ["psftrain", "psftrain.cli"])
def test_importing_the_command_line_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "psftrain" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize(("words", "code"), [(["sample", "x"], 2), (["--version"], 0), (["fly"], 2)])
def test_the_process_ends_with_the_exit_code(words: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "psftrain", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1) if code else __version__ in done.stdout


def test_help_names_every_command_and_keeps_its_lines() -> None:
    ran = psftrain("--help")
    assert (ran.code, ran.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", ran.out, re.MULTILINE)
    assert re.search(r"^ *psftrain fit  .*psfs\.zarr into runs/fit$", ran.out, re.MULTILINE)
    assert "75" in ran.out
    assert "\\b" not in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    ran = psftrain(command, "-h")
    assert (ran.code, ran.err) == (0, "")
    assert "--json" in ran.out
    assert "--verbose" in ran.out


def test_no_command_shows_the_help_readably() -> None:
    ran = psftrain()
    assert re.search(r"^  fit ", ran.out + ran.err, re.MULTILINE)


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["fit", "--stor", "x"],
        ["fit", "a", "b"],
        ["eval", "a", "b"],
        ["sample"],
        ["sample", "x", "--grid", "two"],
    ],
)
def test_wrong_usage(words: list[str], empty: Path) -> None:
    ran = psftrain(*words)
    assert ran.code == 2
    assert one_line_error(ran)
    assert not contents(empty)


# --- the whole round --------------------------------------------------------------------------------------------------


def test_the_commands_chain_in_an_empty_folder(empty: Path) -> None:
    """Without a name for anything: psfs.zarr, runs/fit, the newest run."""
    make_store(empty / "psfs.zarr", grid=4)
    fitted = psftrain("fit", *sets())
    assert fitted.code == 0, fitted.err
    assert fitted.out.startswith("runs/fit: 12 steps in ")
    assert "loss/recon" in fitted.out
    assert "tensorboard --logdir runs/fit/tb" in fitted.out
    assert "psftrain eval runs/fit --store" in fitted.out
    assert "fit neural_cvae" in fitted.err
    judged = psftrain("eval")
    assert judged.code == 0, judged.err
    assert judged.out.startswith("NOT HELD-OUT")
    assert (empty / "runs" / "fit" / "eval" / "report.md").exists()
    assert judged.out.rstrip().endswith("runs/fit/eval/error_map.png")
    assert psftrain("sample", "runs/fit", "--grid", 3, "--out", "field.npz").out == "field.npz: 9 points\n"
    assert psftrain("fit", *sets()).out.startswith("runs/fit: 12 steps, nothing to do")


def test_one_document_each(empty: Path) -> None:
    """stdout holds the document alone; the bar goes to stderr."""
    make_store(empty / "psfs.zarr", grid=4)
    ran: dict[str, Ran] = {
        "fit": psftrain("fit", *sets(), "--json"),
        "eval": psftrain("eval", "--json"),
        "sample": psftrain("sample", "runs/fit", "--grid", 2, "--out", "a.npz", "--json"),
    }
    for command, found in ran.items():
        document = found.document
        assert (found.code, document["schema"], document["command"], document["ok"]) == (0, 1, command, True)
        assert document["paths"]
        assert all((empty / path).exists() for path in document["paths"].values())
    document = ran["fit"].document
    assert document["step"] == 12
    assert document["metrics"]["loss/recon"] > 0
    assert document["paths"]["run"] == "runs/fit"
    again = psftrain("fit", *sets(), "--json").document
    assert again["metrics"] == document["metrics"]


def test_defaults_yaml_set_and_flags_in_that_order(empty: Path) -> None:
    store = make_store(empty / "s.zarr", grid=3)
    make_store(empty / "v.zarr", grid=3, layout="cells")
    (empty / "job.yaml").write_text(
        "store: nowhere.zarr\nrun: a\nsteps: 3\nbatch: 4\nseed: 5\nmodel: {name: neural_cvae}\n"
    )
    given = ["--set", "steps=2", "--set", "run=b", "--set", "model.width=8", "--set", "model.latent=2"]
    ran = psftrain("fit", "job.yaml", *given, "--run", "c", "--store", store, "--val", "v.zarr")
    assert ran.code == 0, ran.err
    config = yaml.safe_load((empty / "c" / "config.yaml").read_text())
    assert (config["steps"], config["batch"], config["seed"], config["model"]["width"]) == (2, 4, 5, 8)
    assert (config["run"], config["store"], config["val"]) == ("c", [str(store)], "v.zarr")
    assert not (empty / "a").exists()
    assert not (empty / "b").exists()


def test_several_stores(empty: Path) -> None:
    for name, depth in (("a.zarr", 500.0), ("b.zarr", 900.0)):
        make_store(empty / name, grid=3, depth=(depth,))
    ran = psftrain("fit", "--store", "a.zarr", "--store", "b.zarr", *sets(steps=1))
    assert ran.code == 0, ran.err
    assert json.loads((empty / "runs" / "fit" / "run.json").read_text())["examples"] == 18


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none.yaml"], "config none.yaml cannot be read: No such file"),
        (["--set", "stepz=1"], "unknown key 'stepz'; did you mean 'steps'"),
        (["--set", "model.name=cvae"], "model.name: unknown model 'cvae'"),
        (["--set", "steps"], "write KEY=VALUE"),
        (["--set", "device=cuda:99"], "device cuda:99 is not here"),
    ],
)
def test_a_wrong_config_leaves_nothing_behind(empty: Path, given: list[str], message: str) -> None:
    make_store(empty / "psfs.zarr", grid=2)
    before = contents(empty)
    ran = psftrain("fit", *given)
    assert ran.code == 2
    assert message in one_line_error(ran)
    assert contents(empty) == before


def test_half_an_environment_of_torchrun_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some schedulers leave it."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    ran = psftrain("fit")
    assert ran.code == 2
    assert "WORLD_SIZE is 4 but RANK is not set; start several processes with torchrun" in one_line_error(ran)
    assert not contents(empty)


def test_without_a_store(empty: Path) -> None:
    """The error says how to make one."""
    ran = psftrain("fit")
    assert ran.code == 1
    assert "store psfs.zarr does not exist; `psfgen render --out psfs.zarr` makes one" in one_line_error(ran)
    assert not contents(empty)


@pytest.mark.parametrize("where", ["-v", "--verbose"])
def test_verbose_shows_where_an_error_comes_from(empty: Path, where: str) -> None:
    assert "Traceback" not in psftrain("fit").err
    ran = psftrain("fit", where)
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("words", "code"), [(["fit"], 1), (["eval"], 2), (["eval", "--stor", "x"], 2)])
def test_an_error_is_a_document_too(empty: Path, words: list[str], code: int) -> None:
    """For a program that asked for one; people still get their line on stderr."""
    ran = psftrain(*words, "--json")
    document = ran.document
    assert ran.code == code
    assert (document["schema"], document["ok"], document["exit_code"]) == (1, False, code)
    assert ran.err.splitlines()[-1] == f"error: {document['error']}"


def test_nothing_outside_the_run_is_touched(empty: Path) -> None:
    """Neither by fit nor by eval, least of all the stores."""
    store = make_store(empty / "s.zarr", grid=4)
    held = make_store(empty / "h.zarr", grid=4, layout="cells")
    before = contents(empty)
    assert psftrain("fit", *words(store, empty / "run")).code == 0
    assert psftrain("eval", "run", "--store", held).code == 0
    assert {name: data for name, data in contents(empty).items() if not name.startswith("run/")} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "four"}, "the environment has WORLD_SIZE=four, which torchrun never sets; unset it"),
        ({"WORLD_SIZE": "0"}, "the environment has WORLD_SIZE=0, which"),
        ({"RANK": "-1"}, "the environment has RANK=-1, which"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and RANK 0, but that is no process of torchrun's"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "WORLD_SIZE is 2 and RANK 2, but that is no process of torchrun's",
        ),
    ],
    ids=str,
)
def test_an_odd_environment_is_refused(
    empty: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ran = psftrain("fit")
    assert ran.code == 2
    assert message in one_line_error(ran)


def test_a_rank_alone_means_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some schedulers set it: the one process there is answers."""
    store = make_store(empty / "s.zarr", grid=3)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert psftrain("fit", *words(store, empty / "run", steps=1), "--json").document["step"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_alone_prints_a_document(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """Of an error too."""
    from psftrain.cli import main

    monkeypatch.setattr("sys.argv", ["psftrain", "fit", "--json"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert "error: " in err
    assert (out == "") == (rank == 1)
    assert rank or json.loads(out)["exit_code"] == 2
