"""Facts about the geometry of Lp balls."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import optimize, stats
from tiny_networks import seeded
from torch import Tensor

from nnunet_ima.lp import (
    NORMS,
    Norm,
    draw_normal,
    draw_uniform,
    lp_norm,
    per_sample,
    project_ball,
    random_in_ball,
    random_on_sphere,
    steepest_direction,
)

norms = st.sampled_from(NORMS)
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(1, 1, 1, 1), (3, 1, 4, 5), (2, 3, 3, 3), (2, 2, 3, 2, 4), (4, 2, 8, 8)])
exponents = st.integers(-30, 30)


def perturbations(seed: int, shape: tuple[int, ...], exponent: float = 0) -> Tensor:
    """Random perturbations of different sizes, a tenth of their voxels exactly zero."""
    generator = seeded(seed)
    values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)
    sizes = 3 ** torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return values * sizes * 10.0**exponent


def radii(seed: int, like: Tensor, per_channel: bool = False) -> Tensor:
    """Radii between 0 and 3, one a sample or one a channel; every fifth is 0."""
    shape = like.shape[: 2 if per_channel else 1]
    values = 3 * torch.rand(shape, generator=seeded(seed + 1))
    values[values < 0.6] = 0
    return per_sample(values, like)


def length(values: Tensor, norm: Norm) -> Tensor:
    """Norm in double precision, by numpy."""
    flat = values.double().flatten(1).numpy()
    return torch.from_numpy(np.linalg.norm(flat, ord=2 if norm == "l2" else np.inf, axis=1))


def largest_product(values: Tensor, norm: Norm, radius: Tensor) -> Tensor:
    """Largest inner product (B,) of ``values`` with any point of the ball: Hölder's inequality, which is sharp."""
    values, radius = values.double(), radius.double()
    if norm == "linf":
        return (values.abs() * radius).flatten(1).sum(1)
    return values.flatten(1).norm(dim=1) * radius.flatten()


def product(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).flatten(1).sum(1)


@given(seeds, shapes, norms, exponents)
def test_norm_is_numpys(seed, shape, norm, exponent):
    values = perturbations(seed, shape, exponent)
    torch.testing.assert_close(lp_norm(values, norm).double(), length(values, norm), rtol=1e-6, atol=0)


@given(seeds, shapes, st.integers(1, 3))
def test_per_sample_values_broadcast_over_what_follows(seed, shape, axes):
    values = torch.rand(shape[:axes], generator=seeded(seed))
    like = torch.zeros(shape)
    spread = per_sample(values, like).expand_as(like)
    for place in np.ndindex(*shape):
        assert spread[place] == values[place[:axes]]


@given(seeds, shapes, norms, st.booleans())
def test_projection_lands_in_the_ball(seed, shape, norm, per_channel):
    delta = perturbations(seed, shape)
    radius = radii(seed, delta, per_channel and norm == "linf")
    projected = project_ball(delta, norm, radius)
    if norm == "linf":
        assert (projected.abs() <= radius).all()
    else:
        assert (length(projected, norm) <= radius.flatten() * (1 + 1e-6)).all()


@given(seeds, shapes, norms, st.booleans())
def test_projection_gives_the_nearest_point(seed, shape, norm, per_channel):
    """p is the nearest point of a convex set to d exactly if ⟨d − p, p⟩ is the largest ⟨d − p, y⟩ of its points y."""
    delta = perturbations(seed, shape)
    radius = radii(seed, delta, per_channel and norm == "linf")
    projected = project_ball(delta, norm, radius)
    rest = delta - projected
    largest = largest_product(rest, norm, radius)
    slack = 1e-5 * (1 + delta.double().square().flatten(1).sum(1))
    assert (product(rest, projected) >= largest - slack).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(5))
def test_projection_agrees_with_numerical_optimisation(norm, seed):
    delta = torch.randn((1, 1, 2, 2), generator=seeded(seed))
    radius = 0.6
    wanted = delta.flatten().double().numpy()
    inside = (
        [{"type": "ineq", "fun": lambda p: radius**2 - p @ p, "jac": lambda p: -2 * p}]
        if norm == "l2"
        else [
            {"type": "ineq", "fun": lambda p: radius - p},
            {"type": "ineq", "fun": lambda p: radius + p},
        ]
    )
    found = optimize.minimize(lambda p: np.sum((p - wanted) ** 2), np.zeros(4), constraints=inside, tol=1e-12)
    projected = project_ball(delta, norm, torch.full((1, 1, 1, 1), radius))
    np.testing.assert_allclose(projected.flatten().numpy(), found.x, atol=1e-4)


@given(seeds, shapes, norms)
def test_projecting_twice_is_projecting_once(seed, shape, norm):
    delta = perturbations(seed, shape)
    radius = radii(seed, delta)
    once = project_ball(delta, norm, radius)
    torch.testing.assert_close(project_ball(once, norm, radius), once, rtol=1e-6, atol=0)


@given(seeds, shapes, norms, st.integers(-20, 20))
def test_points_inside_keep_their_exact_bits(seed, shape, norm, exponent):
    delta = perturbations(seed, shape, exponent)
    radius = per_sample(lp_norm(delta, norm), delta) * (1 + torch.rand(shape[0], generator=seeded(seed)).max())
    assert torch.equal(project_ball(delta, norm, radius), delta)


@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_of_radius_zero_holds_only_its_centre(norm):
    delta = torch.randn(2, 1, 3, 3, generator=seeded(0))
    assert torch.equal(project_ball(delta, norm, torch.zeros(2, 1, 1, 1)), torch.zeros_like(delta))
    assert torch.equal(project_ball(torch.zeros_like(delta), norm, torch.zeros(2, 1, 1, 1)), torch.zeros_like(delta))


@given(seeds, shapes, norms, st.integers(-40, 37))
@example(0, (2, 3, 3, 3), "l2", -43)  # below the normal numbers of single precision
@example(0, (4, 2, 8, 8), "l2", 38)  # the norm itself is above the largest of them
def test_steepest_direction_has_norm_one_and_rises_fastest(seed, shape, norm, exponent):
    gradient = perturbations(seed, shape)
    # Never wholly zero, and never above what single precision holds, whatever the exponent.
    gradient = gradient / gradient.abs().max().clamp_min(1e-3)
    gradient[:, 0, 0, 0] += 1
    gradient = gradient * 10.0**exponent
    direction = steepest_direction(gradient, norm)
    ones = torch.ones(shape[0], dtype=torch.float64)
    torch.testing.assert_close(length(direction, norm), ones, rtol=1e-6, atol=0)
    best = largest_product(gradient, norm, per_sample(ones, gradient))
    torch.testing.assert_close(product(gradient, direction), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_has_no_direction_and_disturbs_no_other(norm):
    gradient = torch.randn(3, 2, 4, 4, generator=seeded(1))
    alone = steepest_direction(gradient, norm)
    gradient[1] = 0
    direction = steepest_direction(gradient, norm)
    assert torch.equal(direction[1], torch.zeros_like(direction[1]))
    assert torch.equal(direction[[0, 2]], alone[[0, 2]])


@given(seeds, shapes, norms)
def test_random_points_lie_on_the_sphere(seed, shape, norm):
    like = torch.zeros(shape)
    radius = radii(seed, like)
    noise = random_on_sphere(like, norm, radius, seeded(seed))
    torch.testing.assert_close(length(noise, norm), radius.flatten().double(), rtol=1e-5, atol=0)


@given(seeds, shapes, norms, st.booleans())
def test_random_points_lie_in_the_ball(seed, shape, norm, per_channel):
    like = torch.zeros(shape)
    radius = radii(seed, like, per_channel and norm == "linf")
    noise = random_in_ball(like, norm, radius, seeded(seed))
    if norm == "linf":
        assert (noise.abs() <= radius).all()
    else:
        assert (length(noise, norm) <= radius.flatten() * (1 + 1e-5)).all()


def test_random_points_are_spread_as_promised():
    generator = seeded(3)
    like = torch.zeros(3000, 1, 2, 2)
    radius = torch.full((3000, 1, 1, 1), 2.0)
    uniform = random_in_ball(like, "linf", radius, generator).flatten().numpy()
    assert stats.kstest(uniform, stats.uniform(-2, 4).cdf).pvalue > 0.01
    noise = random_in_ball(like, "l2", radius, generator)
    assert stats.kstest(length(noise, "l2").numpy(), stats.uniform(0, 2).cdf).pvalue > 0.01
    angle = torch.atan2(noise[:, 0, 0, 0], noise[:, 0, 0, 1]).numpy()
    assert stats.kstest(angle, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.01


@given(seeds, norms, st.sampled_from([draw_uniform, draw_normal, "ball", "sphere"]))
def test_with_a_generator_each_a_draw_does_not_depend_on_the_batch(seed, norm, draw):
    def drawn(samples: list[int]) -> Tensor:
        like, generators = torch.zeros(len(samples), 2, 3, 4), [seeded(seed + s) for s in samples]
        if callable(draw):
            return draw(like, generators)
        radius = torch.ones(len(samples), 1, 1, 1)
        return (random_in_ball if draw == "ball" else random_on_sphere)(like, norm, radius, generators)

    together = drawn([0, 1, 2])
    assert torch.equal(drawn([2, 0]), together[[2, 0]])
    assert not torch.equal(together[0], together[1])


def test_an_empty_batch_is_drawn_too():
    like = torch.zeros(0, 2, 3, 3)
    for norm in NORMS:
        assert random_in_ball(like, norm, torch.zeros(0, 1, 1, 1), []).shape == like.shape
        assert random_on_sphere(like, norm, torch.zeros(0, 1, 1, 1), []).shape == like.shape


def test_one_generator_for_every_sample_or_none():
    with pytest.raises(ValueError, match="2 random generators were given for 3 samples"):
        draw_uniform(torch.zeros(3, 1, 2, 2), [seeded(0), seeded(1)])
