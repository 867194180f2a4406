"""The config of a run: defaults < those of the model < YAML < --set, and errors that name the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from psfgen.errors import ConfigError
from psfgen.store.schema import plain
from psftrain.config import FitConfig, ModelConfig, load_fit_config
from psftrain.ddp import resolve_device
from psftrain.losses import RECONSTRUCTIONS
from psftrain.models import MODELS

CONFIGS = Path(__file__).parents[1] / "configs" / "fit"


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_the_documented_defaults() -> None:
    config = load_fit_config(None, [])
    assert (config.store, config.run, config.val) == (("psfs.zarr",), "runs/fit", None)
    assert (config.model.name, config.steps) == ("field_cvae", 1), "solved at once"
    assert (config.data.array, config.data.val) == ("psf_binned", 0)
    assert config == FitConfig(steps=1), "all else is what a model that is trained by steps has"


def test_the_documented_defaults_of_training_by_steps() -> None:
    config = load_fit_config(None, ["model.name=neural_cvae"])
    assert (config.steps, config.log_every, config.val_every, config.save_every, config.keep) == (
        3000,
        50,
        500,
        1000,
        3,
    )
    assert config == FitConfig(model=ModelConfig(name="neural_cvae"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_file_of_a_model_is_its_defaults(path: Path) -> None:
    config = load_fit_config(path, [])
    assert config == load_fit_config(None, [f"model.name={config.model.name}"])


def test_the_default_model_has_the_file_that_help_names() -> None:
    assert load_fit_config(CONFIGS / "field.yaml", []) == load_fit_config(None, [])


def test_there_is_a_file_for_every_model() -> None:
    names = {load_fit_config(path, []).model.name for path in CONFIGS.glob("*.yaml")}
    assert names == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_written_config_is_read_as_itself(name: str, tmp_path: Path) -> None:
    """As RUN/config.yaml is."""
    config = load_fit_config(None, [f"model.name={name}", "steps=7", "data.val=0.1"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain(config.model_dump())))
    assert load_fit_config(path, []) == config
    assert FitConfig.model_validate(yaml.safe_load(path.read_text())) == config


# --- which wins -------------------------------------------------------------------------------------------------------


def test_model_defaults_then_yaml_then_set_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {name: seed_cvae, width: 256}\nlr: 1.0e-3\nseed: 4\nrun: a\n")
    config = load_fit_config(path, ["lr=2e-3", "model.octaves=3", "run=b", ("run", "c")])
    assert (config.batch, config.model.latent) == (64, 128), "the model's"
    assert (config.model.width, config.seed) == (256, 4), "the file's"
    assert (config.lr, config.model.octaves) == (2e-3, 3), "--set"
    assert config.run == "c", "the flag"
    assert config.steps == 3000


def test_the_model_may_be_named_last() -> None:
    """Its defaults do not bury what was said before."""
    config = load_fit_config(None, ["batch=5", "model.name=seed_cvae"])
    assert (config.batch, config.lr) == (5, 1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss.recon=mse", {"mse": 1.0}),
        ("loss.recon.nll=0.5", {"rel_l2": 1.0, "nll": 0.5}),
        ("loss.recon.mse=3", {"rel_l2": 1.0, "nll": 0.1, "mse": 3.0}),
    ],
)
def test_a_reconstruction_is_a_name_or_weights(text: str, expected: dict[str, float]) -> None:
    """A weight of its own leaves the others as they were."""
    assert load_fit_config(None, [text]).loss.recon == expected


@pytest.mark.parametrize(
    "text", ["loss.recon=mse", "loss.recon.nll=0.5", "loss.recon={nll: 2}", "model.width=8", "lr=1"]
)
@pytest.mark.parametrize(
    ("file", "name"), [("field.yaml", "field_cvae"), ("neural.yaml", "neural_cvae"), ("seed.yaml", "seed_cvae")]
)
def test_a_file_that_says_the_defaults_changes_nothing(text: str, file: str, name: str) -> None:
    """Nor what --set makes of them."""
    assert load_fit_config(CONFIGS / file, [text]) == load_fit_config(None, [f"model.name={name}", text])


@pytest.mark.parametrize("text", ["a.zarr,b.zarr", "[a.zarr, b.zarr]", "'a.zarr, b.zarr'"])
def test_stores_are_a_list(text: str) -> None:
    assert load_fit_config(None, [f"store={text}"]).store == ("a.zarr", "b.zarr")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'"),
        ("model.widht=3", "unknown key 'model.widht'; did you mean 'width'"),
        ("loss.bta=3", "unknown key 'loss.bta'; did you mean 'beta'"),
        ("data.vall=3", "unknown key 'data.vall'; did you mean 'val'"),
        ("model.name=field_cvea", "unknown model 'field_cvea'; did you mean 'field_cvae'"),
        ("steps=-1", "steps: .*greater than or equal to 0, got -1"),
        ("steps=many", "steps: .*integer.*'many'"),
        ("batch=0", "batch: .*got 0"),
        ("lr=0", "lr: .*got 0"),
        ("clip=0", "clip: .*got 0"),
        ("keep=0", "keep: .*got 0"),
        ("log_every=0", "log_every: .*got 0"),
        ("schedule=linear", "schedule: .*'cosine', 'restarts' or 'constant', got 'linear'"),
        ("device=gpu", "device: .*'gpu'"),
        ("store=[]", "store: .*at least 1"),
        ("run=''", "run: .*at least 1"),
        ("data.val=1", r"data\.val: .*less than 0\.9, got 1"),
        ("data.array=psf_bined", r"data\.array: .*'psf_binned' or 'psf'"),
        ("loss.recon={}", r"loss\.recon: .*at least 1"),
        ("loss.recon=l1", r"loss\.recon.*'mse', 'rel_l2', .* or 'huber'"),
        ("loss.recon={mse: -1}", r"loss\.recon.*got -1"),
        ("loss.beta=-1", r"loss\.beta: .*got -1"),
        ("loss.smooth_on=posterior", r"loss\.smooth_on: .*'prior_mean'"),
        ("model.octaves=99", r"model\.octaves: .*16, got 99"),
        ("model.latent=0", r"model\.latent: .*got 0"),
        ("steps", "--set steps: write KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_answered_with_its_key_and_the_way_out(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_fit_config(None, [text])
    assert "\n" not in str(raised.value)


def test_a_wrong_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {nam: seed_cvae}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'model\.nam' in .*job\.yaml; did you mean 'name'"):
        load_fit_config(path, [])


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "holds a list"), ("a: [\n", "is no YAML"), (None, "cannot be read")]
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_fit_config(path, [])


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_fit_config(None, []).steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_every_reconstruction_may_be_asked_for(name: str) -> None:
    assert load_fit_config(None, [f"loss.recon={name}"]).loss.recon == {name: 1.0}


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match=r"device cuda:99 is not here \(\d+ GPUs found\); use device cpu"):
        resolve_device("cuda:99")


def test_nothing_is_said_twice_in_the_shipped_files() -> None:
    """Every key of a file is one of the config's, at its place."""
    known: dict[str, Any] = FitConfig().model_dump()
    for path in CONFIGS.glob("*.yaml"):
        for key, value in yaml.safe_load(path.read_text()).items():
            assert set(value) <= set(known[key]) if isinstance(value, dict) else key in known
