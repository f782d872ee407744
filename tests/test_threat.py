"""Facts about what an attacker may do."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import seeded
from torch import Tensor

from nnunet_ima.lp import NORMS, lp_norm
from nnunet_ima.threat import Bound, ThreatModel, freeze_channels, image_range

EPSILONS = ("number", "(B,)", "(B, C)")
RANGES = ("none", "number", "(C,)", "(1, C)", "(B, C)", "full")


class Situation(NamedTuple):
    threat: ThreatModel
    images: Tensor
    perturbed: Tensor
    """Anywhere, mostly far outside."""


def random_epsilon(form: str, samples: int, channels: int, generator: torch.Generator) -> Bound:
    shape = {"number": (), "(B,)": (samples,), "(B, C)": (samples, channels)}[form]
    values = 2 * torch.rand(shape, generator=generator)
    values = torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, values)
    return float(values) if form == "number" else values


def random_range(form: str, images: Tensor, generator: torch.Generator) -> tuple[Bound, Bound]:
    samples, channels = images.shape[:2]
    if form == "none":
        return float("-inf"), float("inf")
    shape = {
        "number": (),
        "(C,)": (channels,),
        "(1, C)": (1, channels),
        "(B, C)": (samples, channels),
        "full": tuple(images.shape),
    }[form]
    low = -2 * torch.rand(shape, generator=generator)
    width = 3 * torch.rand(shape, generator=generator)
    width = torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, width)
    return (float(low), float(low + width)) if form == "number" else (low, low + width)


@st.composite
def situations(draw: st.DrawFn, outside: bool = False) -> Situation:
    """A threat model of any form with images in its range, or with ``outside`` anywhere."""
    norm = draw(st.sampled_from(NORMS))
    epsilon_form = draw(st.sampled_from(EPSILONS if norm == "linf" else EPSILONS[:2]))
    range_form = draw(st.sampled_from(RANGES))
    shape = draw(st.sampled_from([(1, 1, 2, 3), (1, 3, 4, 4), (3, 1, 2, 2), (3, 2, 3, 3), (2, 2, 2, 3, 2)]))
    generator = seeded(draw(st.integers(0, 10_000)))
    images = 2 * torch.randn(shape, generator=generator)
    epsilon = random_epsilon(epsilon_form, *shape[:2], generator)
    threat = ThreatModel(norm, epsilon, *random_range(range_form, images, generator))
    if not outside:
        low, high = threat.bounds(images)
        images = images.maximum(low).minimum(high)
    size = 3.0 ** draw(st.integers(-6, 4))
    return Situation(threat, images, images + size * torch.randn(shape, generator=generator))


def smallest_delta(point: float, voxel: float, low: float, high: float) -> float:
    """Smallest |δ| with point = clamp(voxel + δ)."""
    clamped = min(max(voxel, low), high)
    return 0.0 if point == clamped else abs(point - voxel)


def slow_distance(threat: ThreatModel, perturbed: Tensor, images: Tensor) -> list[float]:
    """Per sample, voxel by voxel."""
    low, high = (bound.expand_as(images).double() for bound in threat.bounds(images))
    distances = []
    for sample in zip(perturbed.double(), images.double(), low, high, strict=True):
        deltas = [smallest_delta(*voxel) for voxel in zip(*(t.flatten().tolist() for t in sample), strict=True)]
        distances.append(max(deltas) if threat.norm == "linf" else sum(d * d for d in deltas) ** 0.5)
    return distances


def assert_allowed(threat: ThreatModel, point: Tensor, images: Tensor) -> None:
    """The point lies in the range, exactly, and is clamp(x + δ) of a δ in the ball, up to rounding."""
    low, high = threat.bounds(images)
    assert ((point >= low) & (point <= high)).all()
    slack = 1e-5 * (1 + images.abs().max())
    if threat.norm == "linf" and torch.as_tensor(threat.epsilon).ndim == 2:
        epsilon = torch.as_tensor(threat.epsilon)
        for channel in range(images.shape[1]):
            part = (slice(None), slice(channel, channel + 1))
            alone = ThreatModel("linf", epsilon[:, channel], low.expand_as(images)[part], high.expand_as(images)[part])
            assert_allowed(alone, point[part], images[part])
        return
    radius = threat.radius(images).flatten()
    for distance, allowed in zip(slow_distance(threat, point, images), radius, strict=True):
        assert distance <= allowed + slack


@given(situations())
def test_a_projected_point_is_allowed(situation):
    threat, images, perturbed = situation
    point = threat.project(perturbed, images)
    assert_allowed(threat, point, images)
    assert threat.contains(point, images, tolerance=1e-5).all()


@given(situations(outside=True))
def test_a_projected_point_is_allowed_for_images_outside_the_range(situation):
    threat, images, perturbed = situation
    point = threat.project(perturbed, images)
    assert_allowed(threat, point, images)
    assert threat.contains(point, images, tolerance=1e-5).all()
    again = threat.project(point, images)
    assert_allowed(threat, again, images)


@given(situations())
def test_projecting_twice_is_projecting_once(situation):
    threat, images, perturbed = situation
    point = threat.project(perturbed, images)
    torch.testing.assert_close(threat.project(point, images), point, rtol=1e-5, atol=1e-5)


@given(situations(outside=True))
def test_frozen_voxels_keep_the_one_value_they_may_have(situation):
    threat, images, perturbed = situation
    low, high = (bound.expand_as(images) for bound in threat.bounds(images))
    point = threat.project(perturbed, images)
    frozen = low == high
    assert torch.equal(point[frozen], low[frozen])
    assert torch.equal(threat.perturbable(images).expand_as(images), ~frozen)


@given(situations())
def test_the_clean_image_is_allowed_and_comes_back_as_it_is(situation):
    threat, images, _ = situation
    assert torch.equal(threat.project(images, images), images)
    assert torch.equal(threat.distance(images, images), torch.zeros(len(images)))
    assert threat.contains(images, images, tolerance=0).all()


@given(situations(outside=True))
def test_with_epsilon_zero_there_is_only_the_clamped_image(situation):
    threat, images, perturbed = situation
    low, high = threat.bounds(images)
    clamped = images.maximum(low).minimum(high)
    nothing = threat.with_epsilon(0.0)
    assert torch.equal(nothing.project(perturbed, images), clamped)
    assert torch.equal(nothing.distance(clamped, images), torch.zeros(len(images)))


@given(situations())
def test_distance_is_the_norm_of_the_difference_for_images_in_the_range(situation):
    threat, images, perturbed = situation
    low, high = threat.bounds(images)
    point = perturbed.maximum(low).minimum(high)
    torch.testing.assert_close(threat.distance(point, images), lp_norm(point - images, threat.norm))


@given(situations(outside=True))
def test_distance_is_the_smallest_perturbation_that_the_clamp_turns_into_the_point(situation):
    threat, images, perturbed = situation
    low, high = threat.bounds(images)
    point = perturbed.maximum(low).minimum(high)
    expected = torch.tensor(slow_distance(threat, point, images))
    torch.testing.assert_close(threat.distance(point, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_against_every_perturbation_of_a_tiny_image(norm):
    """All δ on a grid of quarters are tried; intensities lie on that grid, so the smallest is among them."""
    grid = [step / 4 for step in range(-8, 9)]
    images = torch.tensor([[[[-0.75, 0.5, 1.25]]]])
    threat = ThreatModel(norm, 1.0, 0.0, 1.0)
    smallest: dict[tuple[float, ...], float] = {}
    for delta in itertools.product(grid, repeat=3):
        point = tuple((images.flatten() + torch.tensor(delta)).clamp(0, 1).tolist())
        size = max(map(abs, delta)) if norm == "linf" else sum(d * d for d in delta) ** 0.5
        smallest[point] = min(size, smallest.get(point, size))
    points = torch.tensor(list(smallest)).reshape(-1, 1, 1, 3)
    expected = torch.tensor(list(smallest.values()))
    everywhere = images.expand_as(points)
    torch.testing.assert_close(threat.distance(points, everywhere), expected)
    assert torch.equal(threat.contains(points, everywhere, tolerance=1e-6), expected <= 1.0)


@given(situations(), st.sampled_from([1.01, 3.0, 100.0]))
def test_what_lies_outside_the_ball_or_the_range_is_not_contained(situation, factor):
    threat, images, _ = situation
    unbounded = ThreatModel(threat.norm, threat.epsilon)
    radius = unbounded.radius(images) + 0.1
    beyond = images.clone()
    beyond[(slice(None), slice(0, 1), *[0] * (images.ndim - 2))] += (factor * radius[:, :1]).flatten(1)
    assert not unbounded.contains(beyond, images, tolerance=1e-5).any()
    huge = threat.with_epsilon(1e6)
    low, high = huge.bounds(images)
    for wrong in (low.expand_as(images) - 0.1, high.expand_as(images) + 0.1):
        if torch.isfinite(wrong).all():
            assert not huge.contains(wrong, images, tolerance=1e-5).any()


def test_no_number_is_not_contained():
    images = torch.zeros(2, 1, 2, 2)
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    for norm in NORMS:
        assert ThreatModel(norm, 1.0).contains(broken, images).tolist() == [True, False]


@given(situations(outside=True), st.data())
def test_selecting_samples_is_slicing(situation, data):
    threat, images, perturbed = situation
    chosen = data.draw(st.lists(st.integers(0, len(images) - 1), max_size=4))
    index = torch.tensor(chosen, dtype=torch.long)
    selected = threat.select(index)
    assert torch.equal(selected.project(perturbed[index], images[index]), threat.project(perturbed, images)[index])
    whole = (threat.radius(images), *threat.bounds(images))
    parts = (selected.radius(images[index]), *selected.bounds(images[index]))
    for one, many in zip(parts, whole, strict=True):
        sample_shape = images.shape[1:]
        assert torch.equal(one.expand(len(index), *sample_shape), many.expand(len(images), *sample_shape)[index])


@given(situations(outside=True), st.data())
def test_selecting_twice_is_selecting_once(situation, data):
    threat, images, _ = situation
    first = torch.tensor(data.draw(st.lists(st.integers(0, len(images) - 1), min_size=1, max_size=4)))
    second = torch.tensor(data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=4)))
    twice, once = threat.select(first).select(second), threat.select(first[second])
    chosen = images[first[second]]
    for one, other in zip(
        (twice.radius(chosen), *twice.bounds(chosen)), (once.radius(chosen), *once.bounds(chosen)), strict=True
    ):
        assert torch.equal(one.expand_as(chosen), other.expand_as(chosen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1", "epsilon": 1.0}, "norm is 'l1'; it must be one of l2, linf"),
        ({"norm": "l2", "epsilon": -1.0}, "epsilon is -1.0; it must be finite and not negative"),
        ({"norm": "l2", "epsilon": float("nan")}, "finite"),
        ({"norm": "l2", "epsilon": float("inf")}, "finite"),
        ({"norm": "l2", "epsilon": torch.tensor([1.0, -0.1])}, "not negative"),
        ({"norm": "l2", "epsilon": torch.ones(2, 3)}, r"shape \(2, 3\); \(B,\) is allowed"),
        ({"norm": "linf", "epsilon": torch.ones(2, 3, 1)}, r"shape \(2, 3, 1\)"),
        ({"norm": "l2", "epsilon": 1.0, "low": 1.0, "high": 0.0}, "range is empty"),
        ({"norm": "l2", "epsilon": 1.0, "low": float("nan")}, "not a number"),
        ({"norm": "l2", "epsilon": 1.0, "high": torch.tensor([1.0, torch.nan])}, "not a number"),
        ({"norm": "l2", "epsilon": 1.0, "low": torch.tensor([0.0, 1.0]), "high": 0.5}, "range is empty"),
    ],
)
def test_bad_values_are_refused_with_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(**arguments)


def test_epsilon_must_be_given_for_each_sample():
    with pytest.raises(ValueError, match="epsilon is given for 2 samples, but the batch has 3"):
        ThreatModel("l2", torch.ones(2)).radius(torch.zeros(3, 1, 2, 2))


@given(situations())
def test_image_range_is_each_channels_own(situation):
    images = situation.images
    low, high = image_range(images)
    for sample, channel in itertools.product(range(images.shape[0]), range(images.shape[1])):
        assert low[sample, channel] == images[sample, channel].min()
        assert high[sample, channel] == images[sample, channel].max()


@given(situations())
def test_frozen_channels_stay_and_the_others_are_as_free_as_before(situation):
    threat, images, perturbed = situation
    assert freeze_channels(threat, images, []) is threat
    frozen = freeze_channels(threat, images, [0])
    assert torch.equal(frozen.project(perturbed, images)[:, 0], images[:, 0])
    others = perturbed.clone()
    others[:, 0] = images[:, 0]
    torch.testing.assert_close(frozen.project(others, images), threat.project(others, images), rtol=0, atol=0)
