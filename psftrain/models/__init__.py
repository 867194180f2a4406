"""Models: conditional VAEs of kernels. To add one, add a line to MODELS.

Its module's DEFAULTS are the config keys in which the model differs from the defaults of FitConfig.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from psfgen.errors import ConfigError, nearest

if TYPE_CHECKING:
    from psftrain.models.base import CVAE

MODELS = {
    "field_cvae": "psftrain.models.field:FieldCVAE",
    "canonical": "psftrain.models.canonical:CanonicalModel",
    "neural_cvae": "psftrain.models.neural:NeuralCVAE",
    "seed_cvae": "psftrain.models.seed:SeedCVAE",
}


def _entry(name: str) -> tuple[Any, str]:
    if name not in MODELS:
        raise ConfigError(f"model.name: unknown model '{name}'{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    module, _, attribute = MODELS[name].partition(":")
    return import_module(module), attribute


def defaults(name: str) -> dict[str, Any]:
    """Config keys in which a model differs from FitConfig's defaults. Raises ConfigError for an unknown name."""
    found: dict[str, Any] = _entry(name)[0].DEFAULTS
    return found


def model_class(name: str) -> type[CVAE]:
    """The class of a model. Raises ConfigError for an unknown name."""
    module, attribute = _entry(name)
    found: type[CVAE] = getattr(module, attribute)
    return found
