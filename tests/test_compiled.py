"""What the compiler makes must not depend on who compiled: numba keeps its results in a cache for later processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import arrays, flags


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_the_process_that_compiles_makes_the_bytes_of_those_that_find_it_compiled(tmp_path: Path) -> None:
    """With as many rays as it takes for a last bit to show."""
    for name in ("compiles", "finds"):
        command = [sys.executable, "-m", "psfgen", "render", *flags(spp=2**18, out=tmp_path / name / "psfs.zarr")]
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    assert list((tmp_path / "cache").rglob("*.nbi")), "nothing was compiled"
    assert arrays(tmp_path / "compiles/psfs.zarr") == arrays(tmp_path / "finds/psfs.zarr")
