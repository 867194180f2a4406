"""The long statistics of `make campaign`: what CI samples, over many draws (kills are in test_faults.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import lens

from psfgen import catalogue
from psfgen.config import RenderConfig
from psfgen.engines import engine_class
from psfgen.optics.splat import Kernels, normalise
from psfgen.plan import Plan

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("sampling", ["spiral", "sobol"])
def test_noise_is_honest(sampling: str) -> None:
    """Over 500 kernels of all lenses, in and out of focus: a bound for nearly all, at the median not far above."""
    rng = np.random.default_rng(0)
    ratios = []
    for name in catalogue.names():
        field = torch.from_numpy(rng.uniform(-1, 1, (50, 2)) * lens(name).field_max)

        def kernels(seed: int, spp: int, name: str = name, field: torch.Tensor = field) -> Kernels:
            job = {"lens": name, "depth": 2500, "focus": "1500,3000", "wavelength": 0.55, "sampling": sampling}
            config = RenderConfig.model_validate({**job, "spp": spp, "seed": seed})
            engine = engine_class("geometric")(lens(name), Plan.of(config, lens(name)))
            parts = [engine.deposit(engine.aim(points, 2500.0)) for points in torch.split(field, engine.batch)]
            return normalise(np.concatenate([part.halves for part in parts]), config.bins, parts[0].margins)

        truth, found = kernels(1, 2**18), kernels(0, 4096)
        pairs = ((found.psf, truth.psf, found.noise), (found.psf_binned, truth.psf_binned, found.noise_binned))
        with np.errstate(divide="ignore"):
            ratios.append(
                [
                    told * np.linalg.norm(exact, axis=(-2, -1)) / np.linalg.norm(ours - exact, axis=(-2, -1))
                    for ours, exact, told in pairs
                ]
            )
    for ratio in np.moveaxis(np.array(ratios), 1, 0):
        seen = ratio[np.isfinite(ratio)]  # the dark have no error, nor has all light in one sample
        assert len(seen) > 450
        assert (seen > 1).mean() >= 0.97
        assert np.median(seen) <= 3
