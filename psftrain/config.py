"""One training run as a config. Keys left out take the defaults of the model they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from psfgen.config import Config, load_config


def _names(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _weights(value: object) -> object:
    return {value: 1.0} if isinstance(value, str) else value


Reconstruction = Literal["mse", "rel_l2", "nll"]
Weight = Annotated[float, Field(ge=0)]


class ModelConfig(Config):
    """The networks."""

    name: str = Field("field_cvae", description="an entry of the MODELS table")
    latent: int = Field(8, ge=1)
    width: int = Field(96, ge=1)
    layers: int = Field(3, ge=1, description="hidden layers of each network")
    octaves: int | None = Field(None, ge=0, le=16, description="Fourier octaves of the field; None: from the grid")


class LossConfig(Config):
    """loss = recon + prior x (recon through the prior mean) + beta x kl + smooth x (neighbours' prior means)."""

    recon: Annotated[dict[Reconstruction, Weight], BeforeValidator(_weights)] = Field(
        {"rel_l2": 1.0, "nll": 0.1}, min_length=1, description="a name, or names with weights"
    )
    prior: Weight = Field(1.0, description="weight of the same reconstruction from the prior's mean")
    kl: Weight = Field(0.0, description="free bits: nats of KL per latent dimension that cost nothing")
    beta: Weight = Field(1e-3, description="weight of the KL")
    smooth: Weight = Field(1e-5, description="weight of the squared difference of neighbours' prior means")
    smooth_on: Literal["prior_mean"] = "prior_mean"


class DataConfig(Config):
    """What is trained on."""

    array: Literal["psf_binned", "psf"] = "psf_binned"
    mode: Literal["resident"] = "resident"
    val: float = Field(0.0, ge=0, lt=0.9, description="share of interior field points withheld for validation")


class FitConfig(Config):
    """One training run."""

    store: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(("psfs.zarr",), min_length=1)
    run: str = Field("runs/fit", min_length=1)
    val: str | None = Field(None, description="a store of other points, for validation")
    steps: int = Field(3000, ge=0)
    batch: int = Field(32, ge=1)
    lr: float = Field(3e-3, gt=0)
    warmup: int = Field(100, ge=0)
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    log_every: int = Field(50, ge=1)
    val_every: int = Field(500, ge=1)
    save_every: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1, description="last checkpoints kept, beside the best")
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()


def load_fit_config(path: str | Path | None, overrides: Sequence[str | tuple[str, Any]]) -> FitConfig:
    """The config of a run; what is not given takes the defaults of its model.

    Raises ConfigError as `load_config` does, and for an unknown model.
    """
    from psftrain.models import defaults

    name = load_config(FitConfig, path, overrides).model.name
    return load_config(FitConfig, path, overrides, base=defaults(name))
