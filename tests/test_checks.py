"""Planted defences: each is flagged by name, misleads the plain attack, and is broken by the one then advised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_oracle import state_of, stateful_network
from tiny_networks import KINDS, Problem, make_problem
from torch import Tensor, nn

from nnunet_ima.attacks import APGD, Attack, Square, check_network
from nnunet_ima.attacks.checks import huge
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.lp import NORMS
from nnunet_ima.threat import ThreatModel, image_range


class Wrapped(nn.Module):
    """A network with something before and something behind it."""

    def __init__(self, network: nn.Module, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network, self.before, self.behind = network, before, behind

    def forward(self, images: Tensor) -> Tensor:
        return self.behind(self.network(self.before(images)))


def same(values: Tensor) -> Tensor:
    return values


class Step(nn.Module):
    """A network whose hidden units are 0 or 1: the sign of what they were."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.first, self.last = network[:2], network[4]

    def forward(self, images: Tensor) -> Tensor:
        return self.last((self.first(images) > 0).float())


def quantised(images: Tensor) -> Tensor:
    return (images * 4).round() / 4


def noisy(images: Tensor) -> Tensor:
    # The global generator: a defence does not ask.
    return images + 0.7 * torch.randn(images.shape)


@dataclass(frozen=True)
class Defence:
    plant: Callable[[nn.Module], nn.Module]
    flag: str
    advised: Callable[..., Attack]


DEFENCES = {
    "quantised input": Defence(
        lambda n: Wrapped(n, quantised, same), "gradients_do_not_vanish", lambda *a: Square(*a, n_queries=800)
    ),
    "step function": Defence(Step, "gradients_do_not_vanish", lambda *a: Square(*a, n_queries=800)),
    "added noise": Defence(
        lambda n: Wrapped(n, noisy, same), "same_output_twice", lambda *a: APGD(*a, steps=20, eot=20)
    ),
    "saturated output": Defence(
        lambda n: Wrapped(n, same, lambda logits: 1e5 * logits),
        "outputs_are_not_saturated",
        lambda *a: APGD(*a, loss="dlr", steps=20),
    ),
}


def planted(defence: str, seed: int = 0) -> Problem:
    """A network that is right everywhere, with the defence: its targets are its own prediction."""
    problem = make_problem("2d classes", seed, samples=6, wrong=0.0)
    network = DEFENCES[defence].plant(problem.network.eval())
    with torch.no_grad():
        logits = torch.stack([network(problem.images) for _ in range(16)]).mean(0)
    return Problem(network, problem.images, logits.argmax(1, keepdim=True).float(), problem.criterion)


def mean_dice(problem: Problem, images: Tensor) -> float:
    """Over fresh draws of a network that draws."""
    torch.manual_seed(1)
    with torch.no_grad():
        found = [problem.criterion.dice(problem.network(images), problem.targets) for _ in range(20)]
    return float(torch.stack(found).mean())


def flags(problem: Problem, norm: str = "l2") -> set[str]:
    found = check_network(problem.network, problem.images, problem.targets, ThreatModel(norm, 1.0), problem.criterion)
    assert all(finding.sentence for finding in found)
    return {finding.name for finding in found if not finding.passed}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("defence", sorted(DEFENCES))
def test_a_defence_is_flagged_by_its_name(defence, norm):
    assert DEFENCES[defence].flag in flags(planted(defence), norm)


@pytest.mark.parametrize("defence", sorted(DEFENCES))
def test_a_defence_is_broken_by_the_attack_that_is_advised(defence):
    problem = planted(defence)
    threat = ThreatModel("l2", 6.0)
    clean = mean_dice(problem, problem.images)
    advised = DEFENCES[defence].advised(threat, problem.criterion)
    broken = mean_dice(problem, advised(problem.network, problem.images, problem.targets).images)
    assert broken < 0.6 * clean, (clean, broken)


@pytest.mark.parametrize("defence", ["quantised input", "step function", "saturated output"])
def test_the_plain_attack_is_misled(defence):
    """Otherwise there would be nothing to flag. Noise only makes it weaker."""
    problem = planted(defence)
    plain = APGD(ThreatModel("l2", 2.0), problem.criterion, steps=20)
    left = mean_dice(problem, plain(problem.network, problem.images, problem.targets).images)
    honest = make_problem("2d classes", 0, samples=6, wrong=0.0)
    found = APGD(ThreatModel("l2", 2.0), honest.criterion, steps=20)(honest.network, honest.images, honest.targets)
    assert left > float(found.dice.mean()) + 0.1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_honest_network_passes_all_checks(kind, norm):
    assert flags(make_problem(kind, 3, samples=6), norm) == set()


def test_probabilities_are_flagged():
    problem = make_problem("2d classes", 0)
    problem = Problem(nn.Sequential(problem.network, nn.Softmax(1)), *list(vars(problem).values())[1:])
    assert "outputs_are_logits" in flags(problem)
    problem = make_problem("2d regions", 0)
    problem = Problem(nn.Sequential(problem.network, nn.Sigmoid()), *list(vars(problem).values())[1:])
    assert "outputs_are_logits" in flags(problem)


class Changing(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.runs += 1
        return self.network(images)


class Optimising(nn.Module):
    """Purifies its input by gradient steps before it looks at it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            image = images.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.network(image).square().mean(), image)
        return self.network(images - gradient)


@pytest.mark.parametrize("plant", [Changing, Optimising])
def test_a_network_that_does_more_than_predict_is_flagged(plant):
    problem = make_problem("2d classes", 0)
    problem = Problem(plant(problem.network), *list(vars(problem).values())[1:])
    assert "network_is_static" in flags(problem)


def test_checks_leave_everything_as_it_was():
    problem = make_problem("2d classes", 5)
    network = stateful_network(5)
    functions = torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward
    before, random = state_of(network), torch.get_rng_state()
    check_network(network, problem.images, problem.targets, ThreatModel("l2", 1.0), DiceCriterion())
    assert state_of(network) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward) == functions


@pytest.mark.parametrize("norm", NORMS)
def test_a_huge_epsilon_reaches_every_image_of_the_range(norm):
    problem = make_problem("2d classes", 0)
    low, high = image_range(problem.images)
    threat = huge(ThreatModel(norm, 0.1, low, high), problem.images)
    low, high = (bound.expand_as(problem.images) for bound in threat.bounds(problem.images))
    for corner in (low, high):
        assert torch.allclose(threat.project(corner, problem.images), corner, atol=1e-5)
