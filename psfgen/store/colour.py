"""How the wavelength channels of a kernel become the colours of a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def channels_to_rgb(kernels: NDArray[np.floating]) -> NDArray[np.float64]:
    """Kernels [..., W, y, x], channels ascending in wavelength -> RGB [..., y, x, 3], longest to red.

    One channel gives grey; more than three are shared out evenly over blue, green, red. Weights of each
    colour sum to 1, so a kernel that is equal in every channel is neutral. NaN becomes 0.
    """
    count = kernels.shape[-3]
    position = np.linspace(0, 2, count) if count > 1 else np.ones(1)  # 0 blue, 1 green, 2 red
    weights = np.stack([np.clip(1 - np.abs(position - colour), 0, None) for colour in (2, 1, 0)])
    if count <= 2:  # too few to separate: grey, or cyan against red
        weights = np.ones((3, 1)) if count == 1 else np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    weights = weights / weights.sum(axis=1, keepdims=True)
    rgb: NDArray[np.float64] = np.einsum("cw,...wyx->...yxc", weights, np.nan_to_num(kernels))
    return rgb


def stretch(rgb: NDArray[np.floating], peak: float | None = None, gamma: float = 2.2) -> NDArray[np.float64]:
    """Linear RGB to display values in [0, 1]: divided by `peak` (default: its own), then gamma."""
    top = float(rgb.max()) if peak is None else peak
    shown: NDArray[np.float64] = np.clip(rgb / (top or 1.0), 0, 1) ** (1 / gamma)
    return shown
