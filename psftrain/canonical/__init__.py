"""A field of kernels by regularised least squares in the field-aligned frame; no network, no GPU."""

from psftrain.canonical.fitting import fit_canonical
from psftrain.canonical.model import Canonical

__all__ = ["Canonical", "fit_canonical"]
