"""psfgen: ray-traces the point-spread functions of a lens into labelled, checksummed stores."""

__version__ = "0.1.0"
