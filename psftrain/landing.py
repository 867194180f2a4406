"""Files and folders that appear whole, or not at all.

It imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from psfgen.errors import FitError, StoreError


@contextmanager
def landing(out: Path) -> Iterator[Path]:
    """A path for a file or a folder that becomes `out` at the end.

    It lies in a hidden folder beside `out`, which is gone afterwards; so are those that killed processes have left.
    Raises FitError where it cannot be written, or where `out` has come to exist by then.
    """
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    inner = folder / out.name
    handle = None
    try:
        folder.mkdir(parents=True)
        handle = os.open(folder, os.O_RDONLY)
        _locked(handle)
        _sweep(out)
        yield inner
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FitError(f"{out} has been written by another process meanwhile; choose another --out")
        inner.rename(out)
    except StoreError as error:
        raise StoreError(str(error).replace(str(inner), str(out))) from None
    except (OSError, FitError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise FitError(f"{out} cannot be written: {reason.strerror}; nothing is left, choose another --out") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(out: Path) -> None:
    """Delete what processes that are no more had begun to write."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{32}}\.tmp")
    for left in out.parent.iterdir():
        if name.fullmatch(left.name):
            with suppress(OSError):  # another process may be faster
                handle = os.open(left, os.O_RDONLY)
                try:
                    if _locked(handle):
                        shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(handle)


def _locked(handle: int) -> bool:
    """Whether nobody else holds it; where a file system has no locks, nobody can say."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
