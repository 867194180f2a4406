"""A store as dask arrays, for work on stores that memory does not hold."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from numpy.typing import NDArray

from psfgen.store import Store


class StoreArray:
    """One array of a store, as far as dask asks for it: its shape and type, and slices of it on demand."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.shape = store.spec.shape(name)
        self.ndim = len(self.shape)
        # Reading nothing also opens the array, here in the main thread, before many threads read it.
        self.dtype = store.read(name, depth=slice(0, 0)).dtype

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        return self.store.read(self.name, **dict(zip(self.store.spec.dims(self.name), key, strict=True)))


def dask_array(store: Store, name: str) -> Any:
    """An array of a store as a dask array, chunked as it is stored.

    The keys of its chunks follow from the store's path and plan.
    """
    view = StoreArray(store, name)
    return da.from_array(  # type: ignore[no-untyped-call]
        view,
        chunks=store.spec.chunks(name),
        name=f"{name}-{tokenize(store.path, store.attrs['plan_sha256'])}",
        asarray=False,
        meta=np.empty((0,) * view.ndim, view.dtype),
    )
