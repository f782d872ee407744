"""The geometry of FAB, against SciPy's solvers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linprog, minimize
from tiny_networks import seeded
from torch import Tensor

from nnunet_ima.hyperplane import relative_radius, step_to_hyperplane
from nnunet_ima.lp import NORMS
from nnunet_ima.threat import ThreatModel

seeds = st.integers(0, 500)
few = settings(max_examples=30, deadline=None)


def problem(seed: int, norm: str, bounded: bool) -> tuple[Tensor, Tensor, ThreatModel]:
    """Two samples of two channels and six voxels, a normal with a zero in it, and a range with a frozen voxel."""
    generator = seeded(seed)
    points = torch.rand((2, 2, 2, 3), generator=generator)
    normal = torch.randn(points.shape, generator=generator)
    normal[:, 0, 0, 0] = 0
    low = torch.full_like(points, 0.0 if bounded else -torch.inf)
    high = torch.full_like(points, 1.0 if bounded else torch.inf)
    low[:, 1, 1, 1] = high[:, 1, 1, 1] = points[:, 1, 1, 1]
    epsilon = torch.tensor([[1.0, 0.5], [0.2, 0.8]]) if norm == "linf" else torch.tensor([1.0, 2.0])
    return points, normal, ThreatModel(norm, epsilon, low, high)


@pytest.mark.parametrize("norm", NORMS)
@few
@given(seeds, st.booleans(), st.floats(-6, 6))
def test_the_step_is_the_smallest_that_reaches_the_plane_within_the_range(norm, seed, bounded, gap):
    points, normal, threat = problem(seed, norm, bounded)
    step = step_to_hyperplane(points, normal, torch.full((2,), gap), threat)
    low, high = threat.bounds(points)
    assert ((points + step >= low - 1e-6) & (points + step <= high + 1e-6)).all()
    reached = (step * normal).flatten(1).sum(1)
    scale = relative_radius(threat, points).expand_as(points) if norm == "linf" else torch.ones_like(points)
    for i in range(2):
        w, x, s = (value[i].flatten().double().numpy() for value in (normal, points, scale))
        floor, ceiling = low[i].flatten().numpy() - x, high[i].flatten().numpy() - x
        helps = w * np.sign(gap)
        farthest = sum(h * (c if h > 0 else f) for h, c, f in zip(helps, ceiling, floor, strict=True) if h) * np.sign(
            gap
        )
        if abs(gap) >= abs(farthest):  # out of reach: everything that helps goes to its end
            assert float(reached[i]) == pytest.approx(farthest, rel=1e-3, abs=1e-4)
            continue
        assert float(reached[i]) == pytest.approx(gap, rel=1e-3, abs=1e-4)
        found = step[i].flatten().numpy()
        if norm == "l2":
            free = floor < ceiling
            solved = minimize(
                lambda d: (d**2).sum(), np.zeros(free.sum()), jac=lambda d: 2 * d, method="SLSQP",
                bounds=list(zip(floor[free], ceiling[free], strict=True)), options={"maxiter": 500, "ftol": 1e-12},
                constraints=LinearConstraint(w[free], gap, gap),
            )  # fmt: skip
            assert solved.success
            assert np.linalg.norm(found) <= np.sqrt(solved.fun) * 1.001 + 1e-4
            continue
        n = len(x)  # smallest t with |d| <= t s
        both = np.vstack([np.hstack([np.eye(n), -s[:, None]]), np.hstack([-np.eye(n), -s[:, None]])])
        limits = [(a if np.isfinite(a) else None, b if np.isfinite(b) else None)
                  for a, b in zip(floor, ceiling, strict=True)]  # fmt: skip
        solved = linprog(
            np.r_[np.zeros(n), 1.0], both, np.zeros(2 * n), np.r_[w, 0.0][None], [gap], [*limits, (0, None)]
        )
        assert np.abs(found / s).max() <= solved.fun * 1.001 + 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_slope_nothing_moves(norm):
    points, normal, threat = problem(0, norm, bounded=True)
    step = step_to_hyperplane(points, torch.zeros_like(normal), torch.ones(2), threat)
    assert (step == 0).all()
