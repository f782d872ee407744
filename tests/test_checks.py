"""Planted defences: each is flagged by name, misleads the plain attack, and is broken by the one then advised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_oracle import state_of, stateful_network
from tiny_networks import KINDS, Problem, make_problem
from torch import Tensor, nn

from nnunet_ima.attacks import APGD, Attack, Square, check_network
from nnunet_ima.attacks.checks import FEW, _largest_pile, huge
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
    "squashed output": Defence(
        lambda n: Wrapped(n, same, lambda logits: 5 * torch.tanh(100 * logits)),
        "outputs_are_not_squashed",
        lambda *a: Square(*a, n_queries=800),
    ),
    "sharpened softmax": Defence(
        lambda n: Wrapped(n, same, lambda logits: 10 * (100 * logits).softmax(1)),
        "outputs_are_not_squashed",
        lambda *a: Square(*a, n_queries=800),
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
def test_the_attack_that_is_advised_breaks_what_misleads_the_plain_one(defence):
    """Both with the same ε, over several networks, judged by fresh draws."""
    clean = plain = advised = 0.0
    for seed in range(3):
        problem = planted(defence, seed)
        attacked = problem.network, problem.images, problem.targets
        threat = ThreatModel("l2", 3.0)
        clean += mean_dice(problem, problem.images)
        plain += mean_dice(problem, APGD(threat, problem.criterion, steps=20)(*attacked).images)
        advised += mean_dice(problem, DEFENCES[defence].advised(threat, problem.criterion)(*attacked).images)
    assert advised < plain - 0.05, (clean, plain, advised)
    assert advised < 0.75 * clean, (clean, plain, advised)


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


@pytest.mark.parametrize("norm", NORMS)
def test_an_honest_network_passes_where_images_lie_outside_the_range(norm):
    """As under the protocol ``paper``; an ε that reaches the range counts from the image, not from its clamped self."""
    problem = make_problem("2d classes", 0, samples=6)
    threat = ThreatModel(norm, 1.0, 0.0, 1.0)
    images = 3 * problem.images
    for corner in (torch.zeros_like(images), torch.ones_like(images)):
        assert torch.allclose(huge(threat, images).project(corner, images), corner, atol=1e-5)
    with torch.no_grad():
        targets = problem.network.eval()(images.clamp(0, 1)).argmax(1, keepdim=True).float()
    found = check_network(problem.network, images, targets, threat, problem.criterion)
    assert {"huge_epsilon_leaves_nothing", "gradients_do_not_vanish"} <= {f.name for f in found if f.passed}


def test_what_has_nothing_to_be_attacked_is_not_flagged():
    problem = make_problem("2d classes, ignore label", 0)
    targets = problem.targets.clone()
    targets[0] = 3.0
    found = check_network(problem.network, problem.images, targets, ThreatModel("l2", 1.0), problem.criterion)
    assert "gradients_do_not_vanish" in {f.name for f in found if f.passed}
    nothing = problem.images[:0], problem.targets[:0]
    assert check_network(problem.network, *nothing, ThreatModel("l2", 1.0), problem.criterion) == []


def with_network(problem: Problem, network: nn.Module) -> Problem:
    return Problem(network, problem.images, problem.targets, problem.criterion)


@example([0.0] * 25)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.0004, 1.0011, 2.0, 2.0019, 2.0021, 5.0]) | st.floats(0, 9), max_size=40))
def test_the_largest_pile_is_that_of_comparing_each_with_each(values):
    within = max(values, default=0.0) / 1000
    # What lies on the edge may fall out either way.
    piles = [[sum(0 <= b - a <= within + slack for b in values) for a in values] for slack in (-1e-7, 1e-7)]
    least, most = (max(pile, default=0) for pile in piles)
    share = _largest_pile(torch.tensor(values))
    assert share == 0 if len(values) < FEW else max(least, 1) <= round(share * len(values)) <= most


class Remembering(nn.Module):
    """Keeps what it was shown: in one buffer that grows, or in a new one each time."""

    def __init__(self, network: nn.Module, new: bool) -> None:
        super().__init__()
        self.network, self.new, self.number = network, new, 0
        self.register_buffer("bank", torch.zeros(0, 8, 8))

    def forward(self, images: Tensor) -> Tensor:
        if self.new:
            self.register_buffer(f"seen_{self.number}", images[:, 0].clone())
            self.number += 1
        else:
            self.bank = torch.cat([self.bank, images[:, 0]])
        return self.network(images)


class ChangingUnstored(nn.Module):
    """As ``Changing``, in a buffer that no checkpoint holds."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("runs", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.runs += 1
        return self.network(images)


@pytest.mark.parametrize(
    "plant", [lambda n: Remembering(n, new=False), lambda n: Remembering(n, new=True), ChangingUnstored]
)
def test_a_network_that_remembers_is_flagged(plant):
    problem = make_problem("2d classes", 0)
    assert "network_is_static" in flags(with_network(problem, plant(problem.network)))


class Detecting(nn.Module):
    """Behaves, until an image looks attacked: then it draws noise, adapts, or purifies."""

    def __init__(self, network: nn.Module, images: Tensor, then: str) -> None:
        super().__init__()
        self.network, self.usual, self.then = network, images.flatten(1).norm(dim=1).max(), then
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if bool((images.flatten(1).norm(dim=1) > 1.5 * self.usual).any()):
            if self.then == "noise":
                return self.network(images + torch.randn(images.shape))
            if self.then == "purify":
                return Optimising(self.network)(images)
            self.shift += 0.01
        return self.network(images + self.shift)


@pytest.mark.parametrize(
    ("then", "flag"),
    [("noise", "same_output_twice"), ("adapt", "network_is_static"), ("purify", "network_is_static")],
)
def test_a_network_that_waits_for_an_attack_is_flagged(then, flag):
    problem = make_problem("2d classes", 0)
    assert flag in flags(with_network(problem, Detecting(problem.network.eval(), problem.images, then)))


def test_a_network_whose_samples_depend_on_each_other_is_flagged():
    problem = make_problem("2d classes", 0, samples=6)
    own = nn.Sequential(problem.network[0], nn.BatchNorm2d(4, track_running_stats=False), *problem.network[2:])
    assert "samples_are_apart" in flags(with_network(problem, own))


class DependsOnSize(nn.Module):
    """Rounds differently in batches of another size, as half precision on a GPU may; but a sample is a sample."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) * (1 + 0.01 * len(images))


def test_kernels_that_differ_with_the_size_of_a_batch_are_no_defence():
    problem = make_problem("2d classes", 0, samples=6)
    assert flags(with_network(problem, DependsOnSize(problem.network))) == set()


def test_probabilities_that_do_not_sum_to_one_are_probabilities():
    problem = make_problem("2d classes", 0)
    assert "outputs_are_logits" in flags(with_network(problem, nn.Sequential(problem.network, nn.Sigmoid())))


def test_an_honest_network_that_is_very_sure_passes_all_checks():
    """Nearly everywhere 1 − p is below 2⁻²⁴, but not lost: the gradient is small, and steps have unit length."""
    problem = make_problem("2d classes", 3, samples=6, wrong=0.0)
    with torch.no_grad():
        best, second = problem.network.eval()(problem.images).topk(2, dim=1).values.unbind(1)
    factor = 18 / float((best - second).flatten().quantile(0.005))
    sure = Wrapped(problem.network, same, lambda logits: factor * logits)
    assert flags(with_network(problem, sure)) == set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_checked(dtype):
    problem = make_problem("2d classes", 3, samples=6)
    half = Problem(problem.network.eval().to(dtype), problem.images.to(dtype), problem.targets, problem.criterion)
    assert flags(half) == set()


def test_a_buffer_of_nan_is_no_change():
    problem = make_problem("2d classes", 0)
    problem.network.register_buffer("unused", torch.tensor(torch.nan))
    assert "network_is_static" not in flags(problem)


def test_of_a_network_that_draws_the_mean_counts_and_not_a_lucky_draw():
    """At ε = 0 nothing can be gained."""
    problem = planted("added noise")
    apgd = APGD(ThreatModel("l2", 0.0), problem.criterion, steps=10, eot=20)
    torch.manual_seed(0)
    result = apgd(problem.network, problem.images, problem.targets)
    true = mean_dice(problem, problem.images)
    assert float(result.dice.mean()) > true - 0.06
    lucky = APGD(ThreatModel("l2", 0.0), problem.criterion, steps=200)(problem.network, problem.images, problem.targets)
    assert float(lucky.dice.mean()) < true - 0.06
    assert (result.forward_passes % 20 == 0).all()


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
