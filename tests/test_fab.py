"""FAB: smallest perturbations, known in closed form or found otherwise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import KINDS, make_problem, seeded
from torch import Tensor, nn

from nnunet_ima.attacks import BPGD, FAB
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.lp import NORMS, lp_norm
from nnunet_ima.threat import ThreatModel, image_range

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 200)
few = settings(max_examples=10, deadline=None)
every_norm = pytest.mark.parametrize("norm", NORMS)


class LinearClassifier(nn.Module):
    """One voxel, whose two logits are linear in the channels of the image."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weights[None, :, None, None]).sum(1, keepdim=True)
        return torch.cat([torch.zeros_like(score), score], 1)


@every_norm
@few
@given(seeds, st.booleans())
def test_the_margin_of_a_linear_classifier_is_its_distance_from_the_plane(norm, seed, background):
    """To one percent, however far away it is; for foreground and for background."""
    generator = seeded(seed)
    weights = torch.randn(5, generator=generator)
    images = torch.randn((8, 5, 1, 1), generator=generator) * torch.logspace(-1, 1, 8)[:, None, None, None]
    network = LinearClassifier(weights)
    score = network(images)[:, 1]
    images = torch.where((score < 0)[:, None] == background, images, -images)
    target = torch.full((8, 1, 1, 1), 0.0 if background else 1.0)
    distance = network(images)[:, 1].abs().flatten() / (weights.norm() if norm == "l2" else weights.abs().sum())
    margins = FAB(ThreatModel(norm, 1.0), DiceCriterion(), steps=20).margins(network, images, target)
    assert torch.allclose(margins.norms, distance.detach(), rtol=0.01)


@every_norm
@few
@given(kinds, seeds)
def test_margins_are_those_of_the_images_and_wrong_there(norm, kind, seed):
    problem = make_problem(kind, seed)
    low, high = image_range(problem.images)
    threat = ThreatModel(norm, 0.1, low, high)
    margins = FAB(threat, problem.criterion, steps=8).margins(problem.network, problem.images, problem.targets)
    problem.network.eval()
    with torch.no_grad():
        clean = problem.criterion.is_correct(problem.criterion.dice(problem.network(problem.images), problem.targets))
        dice = problem.criterion.dice(problem.network(margins.images), problem.targets)
    found = torch.isfinite(margins.norms)
    assert not problem.criterion.is_correct(dice[found]).any()
    assert torch.equal(margins.norms == 0, ~clean)
    assert torch.equal(margins.images[~found | ~clean], problem.images[~found | ~clean])
    moved = lp_norm(margins.images - problem.images, norm)
    assert torch.allclose(moved[found], margins.norms[found], rtol=1e-4, atol=1e-6)
    low, high = threat.bounds(problem.images)
    assert ((margins.images >= low) & (margins.images <= high)).all()


@every_norm
@few
@given(seeds)
def test_epsilon_has_no_say_in_the_margins(norm, seed):
    """Nor has the mode."""
    problem = make_problem("2d classes", seed)
    found = [
        FAB(ThreatModel(norm, epsilon), problem.criterion, mode=mode, steps=4, restarts=2).margins(
            problem.network, problem.images, problem.targets
        )
        for epsilon, mode in ((0.0, "dice"), (0.3, "threshold"), (100.0, "threshold"))
    ]
    assert torch.equal(found[0].norms, found[1].norms)
    assert torch.equal(found[1].norms, found[2].norms)


@every_norm
def test_margins_are_not_above_those_of_bpgd_with_fine_steps(norm):
    """The median of the ratios is under 1.1. That FAB's images are wrong, and its norms theirs, is another test.

    Where BPGD crosses depends on ε: far beyond the boundary its sign steps waste most of the norm. So it is run again
    in a ball that is a little smaller than its last crossing, until it finds none.
    """
    ratios = []
    for kind in [kind for kind in sorted(KINDS) if "2d" in kind]:
        problem = make_problem(kind, 0, samples=16, wrong=0.0)
        attacked = problem.network, problem.images, problem.targets
        margins = FAB(ThreatModel(norm, 1.0), problem.criterion, steps=60).margins(*attacked)
        distance = torch.full_like(margins.norms, 1.5 if norm == "linf" else 10.0)
        found = torch.zeros_like(distance, dtype=torch.bool)
        for loss in ("dice-odds", "balanced-ce") * 5:
            threat = ThreatModel(norm, 0.95 * distance)
            crossed = BPGD(threat, problem.criterion, loss, steps=40, bisections=8)(*attacked)
            wrong = ~problem.criterion.is_correct(crossed.dice)
            found |= wrong
            there = lp_norm(crossed.images - problem.images, norm)
            distance = torch.where(wrong, torch.minimum(distance, there), distance)
        ratios += (margins.norms / distance)[found & (distance > 0)].tolist()
    assert len(ratios) > 30
    assert all(math.isfinite(ratio) for ratio in ratios)
    assert sorted(ratios)[len(ratios) // 2] < 1.1, sorted(ratios)


@every_norm
@few
@given(kinds, seeds)
def test_more_restarts_find_no_larger_margins(norm, kind, seed):
    problem = make_problem(kind, seed)
    attacked = problem.network, problem.images, problem.targets
    norms = [
        FAB(ThreatModel(norm, 1.0), problem.criterion, steps=4, bisections=0, restarts=restarts)
        .margins(*attacked)
        .norms
        for restarts in (1, 2, 4)
    ]
    assert (norms[1] <= norms[0]).all()
    assert (norms[2] <= norms[1]).all()


@every_norm
def test_a_boundary_far_away_is_found(norm):
    """Where the range, or the lack of one, lets it be reached."""
    network = LinearClassifier(torch.ones(1))
    images = torch.full((1, 1, 1, 1), 50.0)
    for low, high in ((-1000.0, 1000.0), (-math.inf, math.inf)):
        threat = ThreatModel(norm, 0.1, low, high)
        margins = FAB(threat, DiceCriterion(), steps=30).margins(network, images, torch.ones_like(images))
        assert float(margins.norms) == pytest.approx(50, rel=0.01)


def test_as_an_attack_it_makes_wrong_what_its_margins_allow():
    problem = make_problem("2d classes", 3, samples=6, wrong=0.0)
    margins = FAB(ThreatModel("l2", 1.0), problem.criterion).margins(problem.network, problem.images, problem.targets)
    epsilon = float(margins.norms.median()) * 1.001
    result = FAB(ThreatModel("l2", epsilon), problem.criterion)(problem.network, problem.images, problem.targets)
    assert torch.equal(problem.criterion.is_correct(result.dice), margins.norms > epsilon)


@pytest.mark.parametrize("mode", ["dice", "threshold"])
def test_a_sample_from_which_nothing_more_can_be_gained_costs_no_further_pass(mode):
    """One voxel: its Dice is 0 as soon as it is wrong, which it is after the first steps."""
    network = LinearClassifier(torch.ones(1))
    images = torch.full((2, 1, 1, 1), 0.5)
    attack = FAB(ThreatModel("l2", torch.tensor([1.0, 0.1])), DiceCriterion(), mode=mode, steps=50, targets=1)
    result = attack(network, images, torch.ones_like(images))
    assert result.dice.tolist() == [0.0, 1.0]
    assert int(result.forward_passes[0]) < 20
    assert int(result.forward_passes[1]) > 100


@every_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_closest_images_are_wrong_as_they_are(norm, dtype):
    found = 0
    for seed in range(6):
        problem = make_problem("2d classes", seed, samples=6, wrong=0.05)
        network, images = problem.network.eval().to(dtype), (4 * problem.images).to(dtype)
        margins = FAB(ThreatModel(norm, 1.0), problem.criterion, steps=10, targets=1).margins(
            network, images, problem.targets
        )
        assert torch.equal(margins.images, margins.images.to(dtype).float())
        with torch.no_grad():
            dice = problem.criterion.dice(network(margins.images.to(dtype)), problem.targets)
        reached = torch.isfinite(margins.norms)
        assert not problem.criterion.is_correct(dice)[reached].any()
        assert torch.allclose(lp_norm(margins.images - images.float(), norm)[reached], margins.norms[reached])
        found += int(reached.sum())
    assert found > 10
