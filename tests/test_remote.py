"""Stores behind URLs: memory:// in this process, s3:// in a server of its own."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray
from conftest import Psfgen, arrays, flags, fork, tiny, wait_for

from psfgen.config import RenderConfig
from psfgen.errors import ConfigError, PlanMismatch, StoreCorrupt, StoreError, StoreIncomplete
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.ledger import SEALED
from psfgen.store.place import RemoteFolder
from psfgen.store.repair import repair
from psfgen.store.schema import StoreSpec
from psfgen.store.verify import problems
from psfgen.store.zarr_store import ZarrStore


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server on this machine."""
    program = Path(sys.executable).with_name("moto_server")  # of the extra `test`
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(tmp_path_factory.mktemp("moto") / "log", "w") as log:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, "the server has died"
                    time.sleep(0.05)
            yield url
        finally:
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def no_open_session() -> Iterator[None]:
    """s3fs leaves the sessions of its forgotten file systems to the garbage collector, which warns of each."""
    yield
    if "s3fs" in sys.modules:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unclosed client session", category=ResourceWarning)
            gc.collect()


# Every test over memory://, and in the campaign over s3:// too: each request costs some 10 ms there.
@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.campaign)])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which no store stands yet."""
    if request.param == "memory":
        yield "memory://bucket/psfs.zarr"
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]
        return
    for key, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": request.getfixturevalue("server")})
    bucket = f"bucket-{time.monotonic_ns()}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}/some/psfs.zarr"


def job(url: str, **changes: Any) -> RenderConfig:
    """The tiny job at a URL."""
    return RenderConfig.model_validate({**tiny(Path("unused"), **changes).model_dump(), "out": url})


def objects(url: str) -> dict[str, bytes]:
    """Every object of a store but its ledger, by relative name."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    names = {name[len(root) :].lstrip("/"): name for name in fs.find(root)}
    return {short: fs.cat_file(name) for short, name in names.items() if not short.startswith("ledger/")}


def put(url: str, name: str, data: bytes | None) -> None:
    """Replace an object of a store, or delete it."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(f"{root}/{name}") if data is None else fs.pipe_file(f"{root}/{name}", data)


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def test_a_store_behind_a_url_holds_what_one_on_a_disk_holds(finished: Path, url: str) -> None:
    """Byte by byte; and others read it."""
    store = render(job(url))
    assert (store.path, store.missing()) == (url, [])
    assert objects(url) == arrays(finished)
    assert list(problems(open_store(url))) == []
    with xarray.open_zarr(url) as dataset, xarray.open_zarr(finished) as local:
        xarray.testing.assert_identical(dataset.load(), local.load())


def test_the_commands_take_a_url(url: str, psfgen: Psfgen) -> None:
    assert psfgen("status", url).err.startswith(f"error: store {url} does not exist; `psfgen render --out {url}`")
    assert psfgen("render", *flags(out=url), "--shard", "0/2").code == 0
    assert psfgen("status", url).code == 3
    assert psfgen("render", *flags(out=url)).code == 0
    assert psfgen("render", *flags(out=url)).out == f"{url}: nothing to do\n"
    status = psfgen("status", url, "--json")
    assert status.document["blocks"] == {"total": 3, "done": 3, "running": 0, "failed": 0, "missing": 0}
    assert psfgen("verify", url).out == f"{url}: sound, 3 of 3 blocks checked\n"
    assert psfgen("verify", url, "--deep", "--sample", 2).code == 0
    assert psfgen("info", url).code == 0
    assert psfgen("show", url, "--depth", "1m", "--focus", "2m", "--out", "page.png").code == 0
    assert psfgen("repair", url, "--drop", "depth-0001").code == 0
    assert psfgen("status", url).code == 3


def test_a_dropped_block_is_rendered_again(finished: Path, url: str) -> None:
    render(job(url))
    put(url, "ledger/depth-0001.json", None)
    with pytest.raises(StoreIncomplete):
        open_store(url)
    counted: list[int] = []
    render(job(url), on_kernels=counted.append)
    assert sum(counted) == 36
    assert objects(url) == arrays(finished)


def test_damage_is_found_and_mended(finished: Path, url: str) -> None:
    """A chunk, an entry, metadata, the seal, and a chunk that is gone."""
    render(job(url))
    for name, restored, dropped in (
        ("psf/c/0/1/0/0/0/0/0", [], ["depth-0001"]),
        ("ledger/depth-0002.json", [], ["depth-0002"]),
        ("psf/zarr.json", ["psf/zarr.json"], []),
        ("zarr.json", ["zarr.json"], []),
        (SEALED, ["the seal of the metadata"], []),
    ):
        fs, root = fsspec.core.url_to_fs(url)
        put(url, name, flipped(fs.cat_file(f"{root}/{name}")))
        try:
            assert [problem.block for problem in problems(open_store(url, allow_incomplete=True))] == dropped, name
        except StoreCorrupt:
            assert not [block for block in dropped if "ledger" not in name], name
        done = repair(url)
        assert (done.restored, list(done.dropped)) == (restored, dropped), name
        render(job(url))
        assert objects(url) == arrays(finished), name
    put(url, "noise/c/0/0/0/0/0", None)
    with pytest.raises(StoreIncomplete, match="noise has missing chunks"):
        open_store(url).read("noise")
    assert list(repair(url).dropped) == ["depth-0000"]


def test_overwrite_and_another_plan(url: str) -> None:
    render(job(url, depth="2m"))
    before = objects(url)
    with pytest.raises(PlanMismatch, match="another plan: spp is 256, this render asks for 64"):
        render(job(url, depth="2m", spp=64))
    assert objects(url) == before
    render(job(url, depth="1m,2m", spp=64), overwrite=True)
    assert open_store(url).attrs["plan"]["spp"] == 64
    assert open_store(url).missing() == []
    assert list(problems(open_store(url))) == []


def test_overwriting_may_be_killed(finished: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the chunks went, and after half of them: nothing is said to be done that is not."""
    render(job(url))
    true = RemoteFolder.remove

    def remove(self: RemoteFolder, name: str) -> None:
        if not name:
            put(url, "psf/c/0/1/0/0/0/0/0", None)
            raise KeyboardInterrupt
        true(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            render(job(url), overwrite=True)
    render(job(url))
    assert objects(url) == arrays(finished)
    assert list(problems(open_store(url))) == []


def test_the_first_of_two_creators_wins(finished: Path, url: str) -> None:
    """The other joins where the plan is the same, and is refused where it is not."""
    first = open_store(finished)
    other = {**first.attrs, "plan_sha256": "0" * 64}
    made = ZarrStore.create(url, StoreSpec(first.coords, first.attrs))
    joined = ZarrStore.create(url, StoreSpec(first.coords, other))
    assert joined.attrs == made.attrs == first.attrs
    with pytest.raises(PlanMismatch):
        render(job(url, spp=64))
    render(job(url))
    assert objects(url) == arrays(finished)


def test_a_creator_that_was_killed_is_finished_by_the_next(finished: Path, url: str) -> None:
    """With its plan: the seal came first."""
    first = open_store(finished)
    ZarrStore.create(url, StoreSpec(first.coords, first.attrs))
    put(url, "psf/zarr.json", None)
    put(url, "zarr.json", None)
    assert not ZarrStore.is_store(url)
    with pytest.raises(StoreError, match="does not exist"):
        open_store(url)
    with pytest.raises(PlanMismatch, match="spp is 256, this render asks for 64"):
        render(job(url, spp=64))
    render(job(url))
    assert objects(url) == arrays(finished)


def test_hdf5_needs_a_disk(url: str, psfgen: Psfgen) -> None:
    for more in ({"format": "hdf5"}, {"out": url.replace(".zarr", ".h5")}):
        ran = psfgen("render", *flags(**{"out": url, **more}))
        assert ran.code in (1, 2)
        assert "is no path on a disk, which HDF5 needs; use --format zarr" in ran.err
        assert ran.err.count("\n") == 1
    assert objects(url) == {}


@pytest.mark.parametrize("bad", ["nosuch://bucket/psfs.zarr", "gs://bucket/psfs.zarr"])
def test_a_url_that_nothing_understands_is_one_line(psfgen: Psfgen, bad: str) -> None:
    for command in (["render", *flags(out=bad)], ["status", bad], ["repair", bad]):
        ran = psfgen(*command)
        assert (ran.code, ran.out) == (ConfigError.exit_code, ""), ran.err
        assert ran.err.startswith(f"error: {bad}")
        assert ran.err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, psfgen: Psfgen) -> None:
    pytest.importorskip("s3fs")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setitem(
        fsspec.config.conf,
        "s3",
        {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}},
    )
    ran = psfgen("status", "s3://nobody/psfs.zarr")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: s3://nobody/psfs.zarr: ")
    assert ran.err.count("\n") == 1


def test_training_reads_a_url(finished: Path, url: str) -> None:
    from psftrain.conditioning import conditioning_of
    from psftrain.data import open_stores, read_examples

    render(job(url))
    one, other = (open_stores([str(path)], "psf_binned") for path in (url, finished))
    found, expected = (read_examples(stores, conditioning_of(stores), "psf_binned") for stores in (one, other))
    assert np.array_equal(found.kernels, expected.kernels)


@pytest.mark.slow
def test_several_processes_render_into_one_bucket(
    request: pytest.FixtureRequest, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands of their own, since connections do not cross forks."""
    server = request.getfixturevalue("server")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server})
    fsspec.filesystem("s3").mkdir("many")
    fsspec.filesystem("s3").clear_instance_cache()
    url = "s3://many/psfs.zarr"
    pids = [fork(lambda: render(job(url))) for _ in range(2)]
    assert [wait_for(pid) for pid in pids] == [0, 0]
    assert objects(url) == arrays(finished)
    assert list(problems(open_store(url))) == []
