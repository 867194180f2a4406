"""What would lose a store is refused before anything is touched."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Psfgen, arrays, beside, contents, flags, tiny

from psfgen.errors import StoreError
from psfgen.render import render
from psfgen.store import open_store
from psfgen.store.ledger import SEALED
from psfgen.store.place import LocalFolder
from psfgen.store.repair import repair


@pytest.mark.parametrize("out", ["file://{}", "file://{}/", "{}/", "link.zarr", "{}/../psfs.zarr"])
def test_a_store_is_not_written_over_itself_whatever_it_is_called(psfgen: Psfgen, store: Path, out: str) -> None:
    Path("link.zarr").symlink_to(store)
    before = contents(store)
    ran = psfgen("rechunk", store, "--out", out.format(store), "--chunks", "field_y=1", "--overwrite")
    assert (ran.code, ran.out) == (2, "")
    assert "is the store that is read; choose another --out" in ran.err
    assert contents(store) == before


def test_a_link_is_not_overwritten(psfgen: Psfgen, store: Path) -> None:
    Path("link.zarr").symlink_to(store)
    before = contents(store)
    ran = psfgen("render", *flags(out="link.zarr"), "--overwrite")
    assert ran.code == 1
    assert re.search(r"link\.zarr is a link to .*; name that, or delete the link", ran.err)
    assert contents(store) == before
    assert Path("link.zarr").is_symlink()


def test_a_store_is_not_overwritten_while_a_block_is_rendered(psfgen: Psfgen, broken: Path) -> None:
    opened = open_store(broken)
    opened.ledger.drop("depth-0001")
    opened.ledger.start("depth-0001")  # by this process, which lives
    before = arrays(broken)
    ran = psfgen("render", *flags(out=broken, spp=512), "--overwrite")
    assert ran.code == 1
    assert "block depth-0001" in ran.err
    assert "is being rendered (1 in all); stop that first" in ran.err
    assert arrays(broken) == before


def test_a_block_is_not_committed_into_another_store(broken: Path) -> None:
    """One that was moved away, or replaced by that of another plan."""
    opened = open_store(broken)
    shutil.rmtree(beside(broken))
    broken.unlink(missing_ok=True)
    for replaced in (False, True):
        if replaced:
            render(tiny(broken, spp=512))
        with pytest.raises(StoreError, match="was moved or replaced while it was written"):
            opened.commit(0, {})


def test_a_renamed_hdf5_store_is_refused_and_touches_no_other(psfgen: Psfgen, tmp_path: Path) -> None:
    render(tiny(tmp_path / "old.h5"))
    Path("old.h5").rename("new.h5")
    Path("old.h5.d").rename("new.h5.d")
    for command in (["status"], ["verify"], ["repair"], ["info"]):
        ran = psfgen(*command, "new.h5")
        assert ran.code == 1
        assert "was made as old.h5, and finds its parts by that name; rename it back" in ran.err
    assert not Path("old.h5").exists()
    Path("new.h5").rename("old.h5")
    Path("new.h5.d").rename("old.h5.d")
    assert psfgen("verify", "old.h5").code == 0


def test_a_deleted_seal_is_made_anew(broken: Path, psfgen: Psfgen) -> None:
    whole = arrays(broken)
    (beside(broken) / SEALED).unlink()
    assert "psfgen repair" in psfgen("status", broken).err
    assert repair(broken).restored == ["the seal of the metadata"]
    assert psfgen("verify", broken).code == 0
    assert arrays(broken) == whole


def test_an_unreadable_chunk_is_a_fault_of_its_block(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in its place is as good as a bad sector."""
    opened = open_store(broken)
    (relative, *_) = opened.chunk_files(1)
    (beside(broken) / relative).unlink()
    (beside(broken) / relative).mkdir()
    assert list(repair(broken).dropped) == ["depth-0001"]
    assert np.array_equal(render(tiny(broken)).read("captured"), opened.read("captured"))


def test_what_is_not_ours_is_not_swept(store: Path) -> None:
    kept = [store.with_name(name) for name in (".psfs.zarr.old", ".psfs.zarr.mine.tmp", f".xpsfs.zarr.{'0' * 32}.tmp")]
    for path in kept:
        path.mkdir()
    left = store.with_name(f".psfs.zarr.{'0' * 32}.old")
    LocalFolder(left).write("file", b"")
    assert repair(store).swept == [left.name]
    assert all(path.exists() for path in kept)
    assert not left.exists()
