"""The contract between psfgen and psftrain: labelled, checksummed PSF stores."""

from psfgen.store.open import Store, open_store

__all__ = ["Store", "open_store"]
