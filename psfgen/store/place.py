"""Where a store lies: in a folder on a disk, or behind an fsspec URL (s3://..., memory://...).

Whatever is written appears whole or not at all: by a rename on a disk, by a single PUT in an object store.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from psfgen.errors import ConfigError, StoreError

# What a killed writer leaves: ours, and zarr's.
UNFINISHED = (".tmp", ".old", ".partial")


class Folder(Protocol):
    """The few things a store asks of the place where it lies; names are relative, with slashes.

    Raises FileNotFoundError for what is not there, StoreError for everything else.
    """

    url: str

    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def exists(self, name: str) -> bool: ...
    def names(self, folder: str) -> list[str]: ...
    def unfinished(self) -> list[str]: ...
    def touch(self, name: str) -> None: ...
    def age_s(self, name: str) -> float: ...
    def remove(self, name: str) -> None: ...


def is_url(path: str | Path) -> bool:
    """Whether a store's path is an fsspec URL."""
    return "://" in str(path)


def folder_of(path: str | Path) -> Folder:
    """The folder at a path or URL. Raises ConfigError for a URL that nothing here understands."""
    return RemoteFolder(str(path)) if is_url(path) else LocalFolder(Path(path))


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def read(self, name: str) -> bytes:
        with _local_errors(self.path):
            return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes, *, durable: bool = False) -> None:
        """Write a file so that readers see the old one or the whole new one; if `durable`, even after a power cut."""
        self._land(name, data, os.replace, durable=durable)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one; returns whether this one was first."""
        try:
            self._land(name, data, os.link, durable=False)
        except FileExistsError:
            return False
        return True

    def _land(self, name: str, data: bytes, appear: Callable[[Path, Path], None], *, durable: bool) -> None:
        path = self.path / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with _local_errors(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                appear(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def names(self, folder: str) -> list[str]:
        """Names of the files that stand directly in a folder, without hidden ones."""
        try:
            with os.scandir(self.path / folder) as entries:
                return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
        except FileNotFoundError:
            return []

    def unfinished(self) -> list[str]:
        """What killed writers left, here and below."""
        below = (str(path.relative_to(self.path)) for path in self.path.rglob("*"))
        return sorted(name for name in below if name.endswith(UNFINISHED))

    def touch(self, name: str) -> None:
        """Make a file look new."""
        os.utime(self.path / name)

    def age_s(self, name: str) -> float:
        return time.time() - (self.path / name).stat().st_mtime

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all it holds, if it is there."""
        path = self.path / name
        with _local_errors(self.path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class RemoteFolder:
    """A folder behind an fsspec URL, where nothing can be renamed but every PUT is whole."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = self._connect()

    def _connect(self) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)  # type: ignore[no-any-return]
        except ImportError as error:
            raise ConfigError(f"{self.url} needs a package that is not installed ({error})") from None
        except ValueError as error:
            raise ConfigError(f"{self.url} is no URL of a store: {error}") from None

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]  # a connection does not cross processes

    def read(self, name: str) -> bytes:
        with self._errors():
            return bytes(self._fs.cat_file(self._at(name)))

    def write(self, name: str, data: bytes) -> None:
        with self._errors():
            self._fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        try:
            with self._errors():
                self._fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        with self._errors():
            return bool(self._fs.exists(self._at(name)))

    def names(self, folder: str) -> list[str]:
        return [name for name, kind in self._listed(folder).items() if kind == "file"]

    def unfinished(self) -> list[str]:
        return []

    def touch(self, name: str) -> None:
        self.write(name, self.read(name))

    def age_s(self, name: str) -> float:
        with self._errors():
            return time.time() - float(self._fs.modified(self._at(name)).timestamp())

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all it holds, if it is there."""
        with suppress(FileNotFoundError), self._errors():  # not there, or others removed it too
            self._fs.rm(self._at(name), recursive=True)

    def _listed(self, folder: str) -> dict[str, str]:
        self._fs.invalidate_cache()  # others write here too
        try:
            with self._errors():
                found = self._fs.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in found}

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each service has its own
            raise StoreError(f"{self.url}: {str(error) or type(error).__name__}") from error


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except PermissionError:
        raise StoreError(f"{path} cannot be written: permission denied; choose another --out") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from None
