"""Square and SPSA: what they do without a gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import KINDS, make_problem, seeded
from torch import nn

from nnunet_ima.attacks import SPSA, WhiteNoise
from nnunet_ima.attacks.draws import AHEAD, Draws
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.attacks.square import (
    Square,
    _fitting,
    _l2_proposals,
    _linf_proposals,
    _pyramid,
    _tiles,
    _two_pyramids,
    covered_share,
    draws_per_query,
    odd_side,
    side,
)
from nnunet_ima.lp import NORMS, lp_norm
from nnunet_ima.seeds import sample_generators
from nnunet_ima.threat import ThreatModel, image_range

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 200)
few = settings(max_examples=10, deadline=None)


class NoGradient(nn.Module):
    """A network that cannot be differentiated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.network(images)


class Seen(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, []

    def forward(self, images):
        self.images.append(images.clone())
        return self.network(images)


class Noting(Oracle):
    """Remembers which scores it gave."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scores: list[tuple[torch.Tensor, torch.Tensor]] = []

    def score(self, images, index, progress=0.0):
        answer = super().score(images, index, progress)
        self.scores.append((images.clone(), answer[0]))
        return answer


@pytest.mark.parametrize("attack", [Square, SPSA])
@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_is_asked_for(attack, norm):
    problem = make_problem("3d classes", 0)
    budget = {"n_queries": 5} if attack is Square else {"steps": 2, "samples": 4}
    result = attack(ThreatModel(norm, 1.0), problem.criterion, **budget)(
        NoGradient(problem.network), problem.images, problem.targets
    )
    assert (result.backward_passes == 0).all()
    assert (result.forward_passes > 4).all()


def test_the_squares_shrink_as_in_the_paper():
    """p after 10,000 queries' share of each mark; the area is a share of the image, in 3D the volume."""
    marks = {1: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for query, divisor in marks.items():
        assert covered_share(0.8, query, 10_000) == pytest.approx(0.8 / divisor)
        assert covered_share(0.8, query, 10_000) == covered_share(0.8, 2 * query, 20_000)
    assert covered_share(0.8, 26, 5_000) == pytest.approx(0.8 / 4)
    assert side(0.25, (40, 40)) == 20
    assert side(0.125, (40, 40, 40)) == 20
    assert side(1e-9, (40, 56)) == 1
    assert side(1.0, (4, 400)) == 3
    assert [odd_side(0.25, (n, n)) for n in (40, 42, 4, 2)] == [21, 21, 3, 2]


@few
@given(st.sampled_from(["2d classes", "3d classes"]), seeds, st.integers(2, 40))
def test_linf_perturbations_are_at_the_surface_everywhere(kind, seed, queries):
    """Each voxel is at ±ε, or at the end of the range on that side."""
    problem = make_problem(kind, seed)
    low, high = image_range(problem.images)
    threat = ThreatModel("linf", 0.3, low, high)
    network = Seen(problem.network)
    Square(threat, problem.criterion, n_queries=queries, seed=seed)(network, problem.images, problem.targets)
    low, high = threat.bounds(problem.images)
    above, below = (problem.images + 0.3).minimum(high), (problem.images - 0.3).maximum(low)
    # After the clean image; later ones may be fewer, when samples have left.
    points = [point for point in network.images[1:] if len(point) == len(problem.images)]
    assert points
    for point in points:
        assert (torch.isclose(point, above) | torch.isclose(point, below)).all()


@few
@given(st.sampled_from(["2d classes", "3d classes"]), seeds)
def test_l2_perturbations_use_all_of_epsilon(kind, seed):
    problem = make_problem(kind, seed)
    network = Seen(problem.network)
    Square(ThreatModel("l2", 2.0), problem.criterion, n_queries=30)(network, problem.images, problem.targets)
    for point in network.images[1:]:
        if len(point) == len(problem.images):
            assert torch.allclose(lp_norm(point - problem.images, "l2"), torch.tensor(2.0), rtol=1e-3)


@few
@given(st.integers(1, 3), st.integers(5, 12), seeds, st.floats(0.01, 0.8))
def test_an_l2_proposal_moves_mass_and_keeps_the_norm(channels, size, seed, share):
    for axes in (2, 3):
        generator = seeded(seed)
        delta = _tiles(torch.zeros((channels, *[size] * axes)), generator)
        delta = delta / delta.norm()
        draws = torch.rand(
            (1, draws_per_query("l2", channels, *[size] * axes)), generator=generator, dtype=torch.double
        )
        tried = _l2_proposals(delta[None], share, draws)[0]
        # Few voxels may cancel out; the attack then scales the whole to norm ε.
        assert float(tried.norm()) < 1.001
        assert odd_side(share, [size] * axes) < 4 or float(tried.norm()) == pytest.approx(1.0, abs=1e-3)
        changed = (tried != delta).flatten(1).sum(1)
        assert (changed <= 2 * odd_side(share, [size] * axes) ** axes).all()


def slow_corner(length, spatial, numbers):
    """Of all places where the square fits, each as likely as any other along an axis."""
    places = [range(max(1, size - length + 1)) for size in spatial]
    return [along[math.floor(float(number) * len(along))] for along, number in zip(places, numbers, strict=True)]


def slow_signs(numbers):
    return torch.tensor([-1.0 if float(number) < 0.5 else 1.0 for number in numbers])


def slow_l2(delta, share, numbers):
    """Algorithm 3 for one sample (C, *spatial), window by window."""
    channels, *spatial = delta.shape
    axes, length = len(spatial), odd_side(share, spatial)
    place, emptied_at = (slow_corner(length, spatial, numbers[first : first + axes]) for first in (0, axes))
    along = math.floor(float(numbers[2 * axes]) * axes) if length > 1 else 0
    cuts = [
        (slice(None), *(slice(c, c + min(length, size)) for c, size in zip(corner, spatial, strict=True)))
        for corner in (place, emptied_at)
    ]
    signs = slow_signs(numbers[2 * axes + 1 :]).reshape(channels, *[1] * axes).to(delta)
    both = torch.zeros_like(delta, dtype=torch.bool)
    for cut in cuts:
        both[cut] = True
    tried, old = delta.clone(), delta[cuts[0]]
    free = (1 - delta.square().sum()) / channels + (delta.square() * both).flatten(1).sum(1)
    pattern = _fitting(_two_pyramids(length, axes).transpose(0, along)[None], old)
    fresh = pattern * signs + old / (1e-10 + old.flatten(1).norm(dim=1).reshape(signs.shape))
    fresh = fresh / (1e-10 + fresh.flatten(1).norm(dim=1).reshape(signs.shape))
    tried[cuts[1]] = 0
    tried[cuts[0]] = fresh * free.clamp_min(0).sqrt().reshape(signs.shape)
    return tried


@few
@given(st.integers(1, 3), st.lists(st.integers(2, 12), min_size=2, max_size=3), seeds, st.floats(0.001, 0.9))
def test_proposals_for_many_samples_are_those_for_each(channels, spatial, seed, share):
    delta = torch.randn((3, channels, *spatial), generator=seeded(seed))
    delta = delta / lp_norm(delta, "l2").reshape(-1, *[1] * (delta.ndim - 1))
    l2, linf = (
        torch.rand((3, draws_per_query(norm, channels, *spatial)), generator=seeded(seed), dtype=torch.double)
        for norm in ("l2", "linf")
    )
    slow = torch.stack([slow_l2(one, share, numbers) for one, numbers in zip(delta, l2, strict=True)])
    torch.testing.assert_close(_l2_proposals(delta, share, l2), slow, atol=1e-5, rtol=1e-5)
    tried = _linf_proposals(delta.sign(), share, linf)
    for change, before, numbers in zip(tried, delta.sign(), linf, strict=True):
        length, axes = side(share, spatial), len(spatial)
        corner = slow_corner(length, spatial, numbers[:axes])
        signs = slow_signs(numbers[axes:]).reshape(channels, *[1] * axes)
        before[(slice(None), *(slice(c, c + length) for c in corner))] = signs
        assert torch.equal(change, before)


@pytest.mark.parametrize("spatial", [(7, 5), (6, 4, 9)])
def test_squares_fall_everywhere_equally_often_and_their_signs_are_even(spatial):
    """Of 4,000 squares; the bounds are six standard deviations."""
    tried, length = 4000, 2
    numbers = torch.rand((tried, draws_per_query("linf", 1, *spatial)), generator=seeded(0), dtype=torch.double)
    share = length ** len(spatial) / math.prod(spatial)
    assert side(share, spatial) == length
    change = _linf_proposals(torch.zeros((tried, 1, *spatial)), share, numbers)[:, 0]
    for axis, size in enumerate(spatial):
        others = [other + 1 for other in range(len(spatial)) if other != axis]
        corner = change.abs().amax(others).argmax(1)
        counts = torch.bincount(corner, minlength=size - length + 1).double()
        expected = tried / (size - length + 1)
        assert len(counts) == size - length + 1
        assert ((counts - expected).abs() < 6 * expected**0.5).all()
    ups = float((change.flatten(1).sum(1) > 0).sum())
    assert abs(ups - tried / 2) < 6 * (tried / 4) ** 0.5


@few
@given(st.data())
def test_a_samples_numbers_do_not_depend_on_the_others_nor_on_when_these_leave(data):
    """Compared with numbers that each sample draws alone, one query at a time."""
    samples, width, queries = 4, 3, 2 * AHEAD + 5
    leaves = [data.draw(st.integers(1, queries)) for _ in range(samples)]
    alone = [
        torch.cat([torch.rand((1, width), generator=one, dtype=torch.double) for _ in range(queries)])
        for one in map(seeded, range(samples))
    ]
    draws, there = Draws([seeded(number) for number in range(samples)], width), list(range(samples))
    for query in range(queries):
        kept = [place for place, number in enumerate(there) if leaves[number] > query]
        if len(kept) < len(there):
            draws, there = draws.of(kept), [there[place] for place in kept]
        if not there:
            return
        assert torch.equal(draws.next(), torch.stack([alone[number][query] for number in there]))


@few
@given(st.integers(2, 15), st.integers(2, 3))
def test_the_pattern_is_two_pyramids_of_opposite_sign(length, axes):
    pattern = _two_pyramids(length, axes)
    assert float(pattern.norm()) == pytest.approx(1.0)
    assert (pattern > 0).any()
    assert (pattern < 0).any()
    one = _pyramid((length,) * axes)
    assert (one > 0).all()
    assert float(one.max()) == float(one[(length // 2,) * axes])


def test_a_pyramid_is_the_sum_of_nested_boxes():
    """Built up box by box, around the voxel ⌊n / 2⌋, cut off at the edge."""
    for shape in ((5, 5), (4, 9), (3, 7), (5, 6, 4), (1, 3)):
        slow = torch.zeros(shape)
        for k in range(1, max(shape) // 2 + 2):
            box = tuple(slice(max(0, n // 2 - k + 1), n // 2 + k) for n in shape)
            slow[box] += 1 / k**2
        assert torch.allclose(_pyramid(shape), slow)


@few
@given(seeds)
def test_each_candidate_is_a_square_away_from_the_best_so_far(seed):
    """Of all that were scored, the one with the highest loss is kept, and the next is that one but for a square."""
    problem = make_problem("2d classes", seed, samples=1)
    problem.network.eval()
    attack = Square(ThreatModel("linf", 0.05), problem.criterion, n_queries=60, seed=seed)
    oracle = Noting(problem.network, problem.targets, attack.loss_function(), problem.criterion)
    best_so_far = BestSoFar(problem.images)
    attack.run(oracle, problem.images, best_so_far)
    best, highest = oracle.scores[0]
    for query, (point, loss) in enumerate(oracle.scores[1:], 1):
        changed = (~torch.isclose(point, best)).any(1)[0].nonzero()
        length = side(covered_share(0.8, query, 60), (8, 8))
        if len(changed):
            assert ((changed.amax(0) - changed.amin(0)) < length).all()
        if loss > highest:
            best, highest = point, loss


def test_the_estimate_points_along_the_gradient():
    """With as many directions as voxels and more; the cosine of a mean over n random signs is about √(n / (n + d))."""
    problem = make_problem("2d classes", 1, samples=2)
    problem.network.eval()
    attack = SPSA(ThreatModel("l2", 1.0), problem.criterion, samples=3000, delta=0.01)
    oracle = Oracle(problem.network, problem.targets, attack.loss_function(), problem.criterion)
    index = torch.arange(2)
    true = oracle.ascent(problem.images, index).gradient
    estimate = attack._estimate(
        oracle, attack.threat, problem.images, problem.images, index, sample_generators(problem.images, 0)
    )
    cosine = torch.nn.functional.cosine_similarity(true.flatten(1), estimate.flatten(1))
    assert (cosine > 0.9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_black_boxes_are_stronger_than_noise(norm):
    """Over many samples, at budgets of some hundred passes."""
    totals = {"noise": 0.0, "square": 0.0, "spsa": 0.0}
    epsilon = 0.15 if norm == "linf" else 1.5
    for seed in range(2):
        problem = make_problem("2d classes", seed, samples=16)
        attacked = problem.network, problem.images, problem.targets
        threat = ThreatModel(norm, epsilon)
        totals["noise"] += float(WhiteNoise(threat, problem.criterion, draws=200)(*attacked).dice.sum())
        totals["square"] += float(Square(threat, problem.criterion, n_queries=200)(*attacked).dice.sum())
        totals["spsa"] += float(SPSA(threat, problem.criterion, steps=5, samples=300)(*attacked).dice.sum())
    assert totals["square"] < totals["noise"] - 1
    assert totals["spsa"] < totals["noise"] - 1
