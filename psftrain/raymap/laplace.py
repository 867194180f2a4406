"""How unsure a ray map is: how far its kernels move when its coefficients move as far as what it was found from allows.

That is Laplace's approximation of what the kernels and a ridge leave open (MacKay, "Information Theory, Inference, and
Learning Algorithms", ch. 27). Terms that no kernel tells show between rings of the field and beyond the last one.

Legend: V places, T terms, Q modes, k samples a side.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from psftrain.raymap.images import Cells, bins
from psftrain.raymap.modes import Pupil
from psftrain.raymap.search import LAST
from psftrain.raymap.solve import Fit, Problem, Seen, drawn, ridge
from psftrain.raymap.stages import problem_of
from psftrain.raymap.terms import Sites

Array = NDArray[np.float64]

STAGE = replace(LAST[-1], rays=4096)  # by fewer rays the slopes of small kernels are rough
FIRM = 10  # times the ridge of the solver, which is weaker than what terms are worth
DRAWS = 48  # of coefficients
RAYS = 512  # of a kernel that moves


def unsure(found: Fit, seen: Seen, at: Sites, cells: Cells, threads: Executor) -> Array:
    """The root mean square [V] of |dK| / |K| on some cells at places, in units that are the same everywhere.

    `seen` are the kernels of one wavelength that the map was found from. NaN where the map is dark.
    """
    terms = found.terms
    hessian = problem_of(seen, replace(STAGE, reach=terms.reach), threads).normal(found.coefficients)[2]
    root = np.linalg.cholesky(hessian + FIRM * ridge(terms).matrix)
    noise = np.random.default_rng(0).normal(size=(len(terms), DRAWS))
    moves = terms.matrix(solve_triangular(root, noise, lower=True, trans="T").T)

    kernel_px = seen.kernels.shape[-1]
    kernels = drawn(terms, found.coefficients, at, bins(kernel_px, kernel_px), Pupil(RAYS))
    captured = kernels.sum(axis=(1, 2))
    lit = captured > 0
    there = Seen(at[lit], kernels[lit].astype(np.float32), captured[lit])
    problem = Problem(terms, there, cells, Pupil(RAYS), threads)
    _, _, by_modes = problem.normal_of(problem.features @ terms.matrix(found.coefficients).T)
    spread = np.full(len(at), np.nan)
    moved = np.einsum("vs,dqs->dvq", problem.features, moves)
    spread[lit] = np.sqrt(len(there) * np.einsum("dvq,vqp,dvp->v", moved, by_modes, moved, optimize=True) / DRAWS)
    return spread
