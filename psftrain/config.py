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


def _ramp(value: object) -> object:
    """[start, end] of a ramp, as shares of the steps. Raises ValueError for anything else."""
    if value is None:
        return value
    numbers = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
    if not numbers or len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:  # type: ignore[arg-type, index]
        raise ValueError(f"give [start, end], shares of the steps such as [0.1, 0.5], got {value!r}")
    return value


Reconstruction = Literal["mse", "rel_l2", "nll", "mae", "smooth_l1", "huber"]
Weight = Annotated[float, Field(ge=0, le=1e9)]  # float32 holds its square


class ModelConfig(Config):
    """The networks."""

    name: str = Field("field_cvae", description="an entry of the MODELS table")
    latent: int = Field(8, ge=1, le=2**16)
    width: int = Field(96, ge=1, le=2**16)
    layers: int = Field(3, ge=1, le=1000, description="hidden layers of each network")
    octaves: int | None = Field(None, ge=0, le=16, description="Fourier octaves of the field; None: from the grid")


class LossConfig(Config):
    """loss = recon + prior x (recon through the prior mean) + beta x kl + smooth x (neighbours' prior means)."""

    recon: Annotated[dict[Reconstruction, Weight], BeforeValidator(_weights)] = Field(
        {"rel_l2": 1.0, "nll": 0.1}, min_length=1, description="a name, or names with weights"
    )
    prior: Weight = Field(1.0, description="weight of the same reconstruction from the prior's mean")
    kl: Weight = Field(0.0, description="free bits: nats of KL per latent dimension that cost nothing")
    beta: Weight = Field(1e-3, description="weight of the KL")
    anneal: Annotated[tuple[float, float] | None, BeforeValidator(_ramp)] = Field(
        None, description="shares of the steps between which beta rises from a hundredth of itself to the whole"
    )
    smooth: Weight = Field(1e-5, description="weight of the difference of 4-connected field neighbours")
    smooth_on: Literal["prior_mean", "posterior_mean", "kernels", "kernels_tv"] = Field(
        "prior_mean", description="what differs; kernels (squared L2) and kernels_tv (total variation) are decoded"
    )
    smooth_over: Literal["batch", "grid"] = Field(
        "batch", description="the batch's own neighbours, or every point of one (copy, focus, depth) a step"
    )
    noise_half: float | None = Field(
        None, gt=0, description="noise at which an example counts half; None: all count alike"
    )


class DataConfig(Config):
    """What is trained on."""

    array: Literal["psf_binned", "psf"] = "psf_binned"
    mode: Literal["auto", "resident", "memmap", "stream"] = Field(
        "auto", description="kernels in memory, decoded once into a file, or read chunk by chunk; auto: by size"
    )
    cache: str | None = Field(None, description="folder of decoded files; None: the user's cache folder")
    buffer_mib: int = Field(
        512, ge=1, description="kernels that a stream shuffles at a time; it holds three times that"
    )
    val: float = Field(0.0, ge=0, lt=0.9, description="share of interior field points withheld for validation")
    val_depth: int = Field(0, ge=0, description="interior depths withheld whole")
    val_focus: int = Field(0, ge=0, description="interior focus distances withheld whole")


class FitConfig(Config):
    """One training run."""

    store: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(("psfs.zarr",), min_length=1)
    run: str = Field("runs/fit", min_length=1)
    val: str | None = Field(None, description="a store of other points, for validation")
    init: str | None = Field(None, description="a run whose weights to start from")
    steps: int = Field(3000, ge=0, lt=10**8)
    batch: int = Field(32, ge=1, description="examples a step, over all processes")
    accumulate: int = Field(1, ge=1, description="parts in which a process takes its share of the batch")
    lr: float = Field(3e-3, gt=0)
    warmup: int = Field(100, ge=0, lt=10**8)
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    schedule: Literal["cosine", "restarts", "constant"] = "cosine"
    restarts: int = Field(
        3, ge=0, le=20, description="how often schedule restarts begins anew, each part twice as long"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; None: no average")
    patience: int | None = Field(None, ge=1, description="validations without improvement after which to stop")
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:i")
    precision: Literal["float32", "bf16", "float64"] = Field("float32", description="bf16: autocast")
    tf32: bool = Field(True, description="on a GPU: matrix products in TF32")
    graph: bool = Field(True, description="on a GPU: the whole step as one CUDA graph")
    compile: bool = Field(False, description="torch.compile of the loss")
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
