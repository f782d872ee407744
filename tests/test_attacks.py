"""Facts about all attacks, and what is particular to each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oracle import CountingNetwork, counting, state_of, stateful_network
from tiny_networks import KINDS, Problem, make_problem, seeded
from torch import Tensor, nn

from nnunet_ima.attack_losses import LOSSES
from nnunet_ima.attacks import (
    APGD,
    ATTACKS,
    BPGD,
    FAB,
    FGSM,
    IFGSM,
    PGD,
    SPSA,
    Attack,
    AttackResult,
    AutoAttack,
    AutoAttackResult,
    Square,
    TargetedAPGD,
    WhiteNoise,
)
from nnunet_ima.attacks.apgd import checkpoints
from nnunet_ima.attacks.autoattack import VERSIONS
from nnunet_ima.attacks.bpgd import BOUNDARY_SEARCHES, Boundary, bisect, generate_adversarial
from nnunet_ima.attacks.oracle import Oracle
from nnunet_ima.attacks.pgd import ascend
from nnunet_ima.attacks.rounding import InwardRounding
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.losses import SegmentationLoss
from nnunet_ima.lp import NORMS
from nnunet_ima.threat import ThreatModel, image_range

SMALL_BUDGET: dict[str, Callable[..., Attack]] = {
    "white-noise": lambda *a, **k: WhiteNoise(*a, draws=4, **k),
    "pgd": lambda *a, **k: PGD(*a, steps=4, restarts=2, step_size=0.3, **k),
    "bpgd": lambda *a, **k: BPGD(*a, steps=5, bisections=4, **k),
    "bpgd-origin": lambda *a, **k: BPGD(*a, steps=5, bisections=4, boundary_search="origin", **k),
    "apgd": lambda *a, **k: APGD(*a, steps=6, restarts=2, **k),
    "apgd-t": lambda *a, **k: TargetedAPGD(*a, steps=5, **k),
    "fgsm": FGSM,
    "ifgsm": lambda *a, **k: IFGSM(*a, steps=4, **k),
    "fab": lambda *a, **k: FAB(*a, steps=3, restarts=2, targets=1, **k),
    "spsa": lambda *a, **k: SPSA(*a, steps=2, samples=6, **k),
    "square": lambda *a, **k: Square(*a, n_queries=12, **k),
    "apgd-shrinking": lambda *a, **k: APGD(*a, steps=10, schedule="shrinking", **k),
    "autoattack": lambda *a, **k: AutoAttack(*a, members=SMALL_ENSEMBLE, **k),
}
ANYWHERE = ThreatModel("l2", 0.0)
SMALL_ENSEMBLE = {
    "apgd-dlr": APGD(ANYWHERE, loss="dlr", steps=2),
    "fab": FAB(ANYWHERE, steps=1, targets=0, bisections=1),
    "square": Square(ANYWHERE, n_queries=3),
}
# FAB looks for the smallest perturbation, whatever ε; SPSA's probes are points that earn nothing.
LOOKS_OUTSIDE = ("fab", "spsa", "apgd-shrinking", "autoattack")
EPSILONS = (0.0, 0.5, 1000.0)
RANGES = ("none", "own", "zero to one")

every_attack = pytest.mark.parametrize("attack_name", SMALL_BUDGET)
every_norm = pytest.mark.parametrize("norm", NORMS)
kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 200)
norms = st.sampled_from(NORMS)
few = settings(max_examples=10)


def test_every_attack_is_tested_here():
    assert set(ATTACKS) <= set(SMALL_BUDGET)


def test_the_docs_name_every_attack_loss_and_version():
    text = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text(encoding="utf-8")
    for name in (*ATTACKS, *LOSSES, *VERSIONS):
        assert f"`{name}`" in text, name


def threat_for(images: Tensor, norm: str, epsilon: float | Tensor, kind: str = "own") -> ThreatModel:
    """``zero to one`` is the paper's protocol, in which images lie outside the range."""
    low, high = {"none": (-math.inf, math.inf), "own": image_range(images), "zero to one": (0.0, 1.0)}[kind]
    return ThreatModel(norm, epsilon, low, high)


def tensors_of(result: AttackResult) -> list[Tensor]:
    """All tensors of a result, and of its parts if it is an ensemble's; NaN stands as −1."""
    parts = [value for value in vars(result).values() if isinstance(value, Tensor)]
    if isinstance(result, AutoAttackResult):
        parts += [tensor for part in result.by_attack.values() for tensor in tensors_of(part)]
    return [part.nan_to_num(-1.0) for part in parts]


def dice_of(problem: Problem, images: Tensor) -> Tensor:
    with torch.no_grad():
        return problem.criterion.dice(problem.network(images), problem.targets)


@every_attack
@every_norm
@few
@given(kinds, seeds, st.sampled_from(EPSILONS), st.sampled_from(RANGES))
def test_no_attack_leaves_the_threat_model_or_does_worse_than_nothing(
    attack_name, norm, kind, seed, epsilon, range_kind
):
    problem = make_problem(kind, seed)
    threat = threat_for(problem.images, norm, epsilon, range_kind)
    attack = SMALL_BUDGET[attack_name](threat, problem.criterion, seed=seed)
    result = attack(problem.network, problem.images, problem.targets)
    assert threat.contains(result.images, problem.images, tolerance=1e-5).all()
    low, high = threat.bounds(problem.images)
    assert ((result.images >= low) & (result.images <= high)).all()
    assert torch.equal(result.dice, dice_of(problem, result.images))
    clean = problem.images.maximum(low).minimum(high)
    assert torch.equal(result.clean_dice, dice_of(problem, clean))
    assert (result.dice <= result.clean_dice).all()
    # What did not help is not done.
    unharmed = result.dice == result.clean_dice
    assert torch.equal(result.images[unharmed], clean[unharmed])
    if epsilon == 0:
        assert torch.equal(result.images, clean)


class Watched(nn.Module):
    """Keeps every image the network is asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.network(images)


@pytest.mark.parametrize("attack_name", sorted(set(SMALL_BUDGET) - set(LOOKS_OUTSIDE)))
@every_norm
@few
@given(seeds, st.sampled_from(RANGES))
def test_no_attack_so_much_as_tries_a_point_outside_the_threat_model(attack_name, norm, seed, range_kind):
    problem = make_problem("2d classes", seed, samples=1)
    threat = threat_for(problem.images, norm, 1.0, range_kind)
    network = Watched(problem.network)
    SMALL_BUDGET[attack_name](threat, problem.criterion)(network, problem.images, problem.targets)
    for point in network.seen:
        assert threat.contains(point, problem.images, tolerance=1e-5).all()


@every_attack
@few
@given(kinds, seeds, norms)
def test_frozen_channels_are_not_touched(attack_name, kind, seed, norm):
    problem = make_problem(kind, seed)
    low, high = (bound.clone() for bound in image_range(problem.images))
    frozen = problem.images.clone()
    frozen[:, 1] = 0.5
    low[:, 1] = high[:, 1] = 0.5
    threat = ThreatModel(norm, 1.0, low, high)
    result = SMALL_BUDGET[attack_name](threat, problem.criterion)(problem.network, frozen, problem.targets)
    assert torch.equal(result.images[:, 1], frozen[:, 1])


@every_attack
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_and_networks_of_any_precision(attack_name, dtype, norm):
    for seed in range(4):
        problem = make_problem("2d classes", seed, samples=6)
        # Large intensities, whose neighbours in half precision are far apart.
        images, network = (4 * problem.images).to(dtype), problem.network.eval().to(dtype)
        threat = ThreatModel(norm, {"l2": 4.0, "linf": 0.3}[norm])
        result = SMALL_BUDGET[attack_name](threat, problem.criterion)(network, images, problem.targets)
        assert result.images.dtype == dtype
        with torch.no_grad():
            found = problem.criterion.dice(network(result.images), problem.targets)
        assert torch.allclose(result.dice, found.float())
        assert threat.contains(result.images.double(), images.double(), tolerance=1e-6).all()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16]), norms, seeds, st.floats(1e-3, 2.0), st.floats(0.1, 30),
    st.sampled_from(RANGES),
)  # fmt: skip
def test_rounding_inwards_leaves_neither_ball_nor_range(dtype, norm, seed, epsilon, size, kind):
    generator = torch.Generator().manual_seed(seed)
    images = (size * torch.randn(3, 2, 5, 4, generator=generator)).to(dtype).float()
    # Ends that are no numbers of the type.
    low, high = {"none": (-math.inf, math.inf), "own": image_range(images), "zero to one": (0.1, 0.7)}[kind]
    threat = ThreatModel(norm, epsilon, low, high)
    rounding, index = InwardRounding(threat, images, dtype), torch.tensor([2, 0, 1])
    noise = 2 * epsilon * torch.randn(3, 2, 5, 4, generator=generator)
    part = threat.select(index)
    perturbed = part.project(images[index] + noise, images[index])
    rounded = rounding(perturbed, index)
    assert torch.equal(rounded, rounded.to(dtype).float())
    smallest, largest = part.bounds(rounded)
    assert ((rounded >= smallest) & (rounded <= largest)).all()
    # No further from the clean image, which is in the range itself, than the point was.
    start = rounding(part.project(images[index], images[index]), index)
    assert ((rounded - start).abs() <= (perturbed - start).abs()).all()
    if kind != "zero to one":
        assert torch.equal(start, images[index])
        assert (part.distance(rounded, images[index]) <= part.distance(perturbed, images[index])).all()
    # And no further from the point than the next number.
    step = (torch.nextafter(rounded.to(dtype), torch.full_like(rounded, torch.inf).to(dtype)).float() - rounded).abs()
    assert ((rounded - perturbed).abs() <= 2 * step).all()


@pytest.mark.parametrize("norm", NORMS)
def test_in_half_precision_every_image_of_an_ensemble_is_the_one_the_network_saw(norm):
    problem = make_problem("2d classes", 4)
    images, network = (4 * problem.images).bfloat16(), problem.network.eval().bfloat16()
    threat = threat_for(images.float(), norm, {"l2": 2.0, "linf": 0.3}[norm])
    members = {"apgd": APGD(threat, steps=10), "fab": FAB(threat, steps=10, targets=1)}
    result = AutoAttack(threat, problem.criterion, members=members)(network, images, problem.targets)
    for found in result.by_attack.values():
        assert torch.equal(found.images, found.images.bfloat16().float())
        assert threat.contains(found.images, images.float(), tolerance=1e-6).all()
    assert (result.dice < result.clean_dice).all()


def test_in_double_precision_ball_and_range_are_those_that_were_given():
    problem = make_problem("2d classes", 4)
    images, network = problem.images.double().clamp(-0.1, 0.1), problem.network.eval().double()
    threat = ThreatModel("linf", 0.1, -0.1, 0.1)
    result = APGD(threat, problem.criterion, steps=5)(network, images, problem.targets)
    assert float(result.images.max()) <= 0.1
    assert float(result.images.min()) >= -0.1
    assert float((result.images - images).abs().max()) <= 0.1 + 1e-15


@pytest.mark.parametrize("make", [PGD, WhiteNoise])
def test_where_no_gradient_can_be_had_an_attack_says_so(make):
    """Instead of finding nothing, which would read as robust; without gradients of the caller's own it works."""
    problem = make_problem("2d classes", 0)
    attack = make(ThreatModel("l2", 3.0), problem.criterion)
    with torch.inference_mode(), pytest.raises(ValueError, match="attack outside of it"):
        attack(problem.network, problem.images, problem.targets)
    with torch.no_grad():
        quiet = attack(problem.network, problem.images, problem.targets)
    assert torch.equal(quiet.images, attack(problem.network, problem.images, problem.targets).images)


@every_attack
def test_a_batch_of_none_is_attacked_without_complaint(attack_name):
    problem = make_problem("2d classes", 0)
    attack = SMALL_BUDGET[attack_name](ThreatModel("l2", 1.0), problem.criterion)
    result = attack(problem.network, problem.images[:0], problem.targets[:0])
    assert result.images.shape == problem.images[:0].shape
    assert result.dice.shape == (0,)


class Blind(nn.Module):
    """Its output does not depend on the image as far as autograd knows, and is NaN for perturbed images."""

    def __init__(self, images: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.images, self.logits = images, logits

    def forward(self, images: Tensor) -> Tensor:
        known, logits = self.images[: len(images)], self.logits[: len(images)]
        return torch.where(torch.isclose(images, known).all(), logits, torch.nan)


def test_nan_is_no_success_without_a_gradient_either():
    problem = make_problem("2d classes", 0)
    network = Blind(problem.images, problem.network.eval()(problem.images).detach())
    with pytest.raises(UserError, match="NaN or infinite"):
        APGD(ThreatModel("l2", 1.0), problem.criterion)(network, problem.images, problem.targets)


@every_attack
@few
@given(kinds, seeds, norms)
def test_in_threshold_mode_a_sample_that_is_wrong_costs_nothing(attack_name, kind, seed, norm):
    problem = make_problem(kind, seed, wrong=0.6)
    attack = SMALL_BUDGET[attack_name](threat_for(problem.images, norm, 1.0), problem.criterion, mode="threshold")
    result = attack(problem.network, problem.images, problem.targets)
    wrong = ~problem.criterion.is_correct(result.clean_dice)
    assert (result.forward_passes[wrong] == 1).all()
    assert (result.backward_passes[wrong] == 0).all()


@every_attack
@few
@given(kinds, seeds, norms, st.integers(1, 3))
def test_results_do_not_depend_on_the_batch(attack_name, kind, seed, norm, chunk):
    problem = make_problem(kind, seed, samples=4)
    epsilon = torch.tensor([0.3, 100.0, 0.0, 3.0])
    threat = threat_for(problem.images, norm, epsilon)
    attack = SMALL_BUDGET[attack_name](threat, problem.criterion, seed=seed, chunk=chunk)
    together = attack(problem.network, problem.images, problem.targets)
    for chosen in ([0, 1], [3, 2], [1]):
        index = torch.tensor(chosen)
        part = replace(attack, threat=threat.select(index))
        alone = part(problem.network, problem.images[index], problem.targets[index])
        for one, many in zip(tensors_of(alone), tensors_of(together), strict=True):
            assert torch.equal(one, many[index])


@every_attack
@few
@given(kinds, seeds, norms)
def test_the_same_seed_gives_the_same_result(attack_name, kind, seed, norm):
    problem = make_problem(kind, seed)
    attack = SMALL_BUDGET[attack_name](threat_for(problem.images, norm, 1.0), problem.criterion, seed=seed)
    first, second = (attack(problem.network, problem.images, problem.targets) for _ in range(2))
    for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attack_name", ["white-noise", "pgd", "apgd"])
def test_another_seed_tries_other_points(attack_name):
    problem = make_problem("2d classes", 2, samples=1)

    def tried(seed: int) -> list[Tensor]:
        network = Watched(problem.network)
        attack = SMALL_BUDGET[attack_name](ThreatModel("l2", 0.3), problem.criterion, seed=seed)
        attack(network, problem.images, problem.targets)
        return network.seen

    assert not torch.equal(tried(0)[-1], tried(1)[-1])


@every_attack
@few
@given(kinds, seeds, norms, st.sampled_from([None, 2]))
def test_passes_are_counted_for_each_sample(attack_name, kind, seed, norm, chunk):
    problem = make_problem(kind, seed)
    network, images = counting(problem)
    threat = threat_for(images, norm, 1.0)
    result = SMALL_BUDGET[attack_name](threat, problem.criterion, chunk=chunk)(network, images, problem.targets)
    assert torch.equal(result.forward_passes, network.forward_runs)
    assert torch.equal(result.backward_passes, network.backward_runs)


class Breaking(nn.Module):
    def __init__(self, network: nn.Module, after: int) -> None:
        super().__init__()
        self.network, self.left = network, after

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("something broke")
        return self.network(images)


@every_attack
@pytest.mark.parametrize("breaks", [False, True])
def test_network_and_global_random_state_are_left_as_they_were(attack_name, breaks):
    problem = make_problem("2d classes", 5)
    network = stateful_network(5)
    before = state_of(network)
    attack = SMALL_BUDGET[attack_name](threat_for(problem.images, "l2", 1.0), DiceCriterion(threshold=0.0))
    if breaks:
        with pytest.raises(RuntimeError, match="something broke"):
            attack(Breaking(network, 2), problem.images, problem.targets)
    else:
        attack(network, problem.images, problem.targets)
    assert state_of(network) == before


@every_attack
def test_the_input_is_left_as_it_was(attack_name):
    problem = make_problem("2d classes", 5)
    images, targets = problem.images.clone(), problem.targets.clone()
    result = SMALL_BUDGET[attack_name](ThreatModel("l2", 1.0), problem.criterion)(problem.network, images, targets)
    assert torch.equal(images, problem.images)
    assert torch.equal(targets, problem.targets)
    result.images.zero_()
    assert torch.equal(images, problem.images)


@every_attack
def test_the_attack_sees_the_network_in_evaluation_mode(attack_name):
    """With dropout on, a Dice could not be found again at the image that is returned."""
    problem = make_problem("2d classes", 5)
    problem.network.train()
    attack = SMALL_BUDGET[attack_name](threat_for(problem.images, "linf", 0.3), problem.criterion)
    result = attack(problem.network, problem.images, problem.targets)
    problem.network.eval()
    assert torch.equal(result.dice, dice_of(problem, result.images))


@every_attack
@few
@given(st.sampled_from([kind for kind in sorted(KINDS) if "ignore" in kind]), seeds, norms)
def test_a_sample_of_ignored_voxels_alone_is_left_in_peace(attack_name, kind, seed, norm):
    problem = make_problem(kind, seed)
    targets = problem.targets.clone()
    targets[1, -1:] = 1 if problem.criterion.labels.regions else problem.criterion.labels.ignore_label
    attack = SMALL_BUDGET[attack_name](threat_for(problem.images, norm, 1.0), problem.criterion)
    result = attack(problem.network, problem.images, targets)
    assert result.dice[1] == 1
    assert torch.equal(result.images[1], problem.images[1])


@every_attack
def test_what_cannot_be_attacked_is_refused_with_a_sentence(attack_name):
    attack = SMALL_BUDGET[attack_name](ThreatModel("l2", 1.0))
    network, targets = make_problem("2d classes", 0).network, torch.zeros(2, 1, 8, 8)
    images = torch.zeros(2, 2, 8, 8)
    with pytest.raises(ValueError, match=r"images have shape \(2, 8, 8\)"):
        attack(network, images[0], targets)
    with pytest.raises(ValueError, match=r"targets have shape \(2, 1, 4, 8\)"):
        attack(network, images, targets[:, :, :4])
    with pytest.raises(ValueError, match=r"targets have shape \(1, 1, 8, 8\)"):
        attack(network, images, targets[:1])
    for bad in (math.nan, math.inf):
        images[1, 1, 3, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinite intensities"):
            attack(network, images, targets)


def results(problem: Problem, *attacks: Attack) -> list[AttackResult]:
    return [attack(problem.network, problem.images, problem.targets) for attack in attacks]


@few
@given(kinds, seeds, norms, st.sampled_from(RANGES))
def test_more_budget_is_never_weaker(kind, seed, norm, range_kind):
    problem = make_problem(kind, seed)
    threat = threat_for(problem.images, norm, 0.5, range_kind)
    options = {"threat": threat, "criterion": problem.criterion, "seed": seed}
    growing: list[list[Attack]] = [
        [PGD(steps=steps, **options) for steps in (0, 1, 3, 6)],
        [PGD(steps=3, restarts=restarts, **options) for restarts in (1, 2, 4)],
        [APGD(steps=5, restarts=restarts, **options) for restarts in (1, 2, 4)],
        [WhiteNoise(draws=draws, **options) for draws in (0, 1, 4, 8)],
    ]
    for attacks in growing:
        dice = [result.dice for result in results(problem, *attacks)]
        for weaker, stronger in pairwise(dice):
            assert (stronger <= weaker).all()


def test_attacks_are_stronger_than_noise_and_a_huge_epsilon_leaves_nothing():
    """Not for all inputs, but on the whole; otherwise an attack that does nothing would pass the tests above."""
    total = dict.fromkeys(("clean", "noise", "pgd", "apgd", "huge"), 0.0)
    for seed in range(6):
        problem = make_problem("2d classes", seed, wrong=0.05)
        threat = ThreatModel("l2", 1.0)
        noise, pgd, apgd, huge = results(
            problem,
            WhiteNoise(threat, draws=20),
            PGD(threat, steps=20),
            APGD(threat, steps=20),
            PGD(threat.with_epsilon(50.0), steps=20),
        )
        total["clean"] += float(noise.clean_dice.mean()) / 6
        for name, result in {"noise": noise, "pgd": pgd, "apgd": apgd, "huge": huge}.items():
            total[name] += float(result.dice.mean()) / 6
    assert total["clean"] > total["noise"] > total["pgd"] + 0.1
    assert abs(total["pgd"] - total["apgd"]) < 0.1
    assert total["huge"] < 0.3 * total["clean"]


def test_a_sample_whose_dice_is_zero_costs_no_further_pass():
    problem = make_problem("2d classes", 0)
    targets = torch.ones_like(problem.targets)

    class Background(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([images[:, :1] * 0 + 1, images[:, :1] * 0], 1)

    for make in SMALL_BUDGET.values():
        result = make(ThreatModel("l2", 1.0))(Background(), problem.images, targets)
        assert result.clean_dice.tolist() == [0.0] * 3
        assert result.forward_passes.tolist() == [1] * 3
        assert result.backward_passes.tolist() == [0] * 3


class Same(nn.Module):
    """Two channels of intensities are the logits of two classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize("make", [partial(PGD, steps=12), partial(APGD, steps=12, restarts=2)])
def test_a_sample_that_leaves_on_the_way_changes_nothing_for_the_others(make):
    images = torch.randn((4, 2, 8, 8), generator=seeded(0))
    targets = (images[:, :1] < images[:, 1:]).float()
    threat = ThreatModel("linf", torch.tensor([4.0, 0.3, 20.0, 0.5]))
    attack = make(threat)
    together = attack(Same(), images, targets)
    left = together.dice == 0
    assert left.tolist() == [True, False, True, False]
    assert together.backward_passes[left].max() < together.backward_passes[~left].min()
    assert together.backward_passes[left].max() > 1
    for sample in range(4):
        index = torch.tensor([sample])
        alone = replace(attack, threat=threat.select(index))(Same(), images[index], targets[index])
        assert torch.equal(alone.images, together.images[index])
        assert torch.equal(alone.forward_passes, together.forward_passes[index])


# White noise


@few
@given(seeds, st.floats(0.1, 5), norms)
def test_white_noise_has_the_promised_size(seed, epsilon, norm):
    problem = make_problem("2d classes", seed, samples=1)
    network = Watched(problem.network)
    WhiteNoise(ThreatModel(norm, epsilon), seed=seed, draws=3)(network, problem.images, problem.targets)
    for noisy in network.seen[1:]:
        noise = noisy - problem.images
        if norm == "l2":
            assert noise.norm().item() == pytest.approx(epsilon, rel=1e-4)
        else:
            assert noise.abs().max() <= epsilon + 1e-5
        # Each voxel on its own, on both sides of zero.
        assert 0.3 < (noise > 0).float().mean() < 0.7
        assert len(noise.unique()) > noise.numel() / 2


# PGD


@every_norm
@pytest.mark.parametrize("seed", range(3))
def test_pgd_visits_the_points_of_equation_3(norm, seed):
    problem = make_problem("2d classes", seed, samples=1)
    problem = replace(problem, images=problem.images.double(), network=problem.network.double())
    epsilon, steps = 0.5, 8
    threat = threat_for(problem.images, norm, epsilon)
    network = Watched(problem.network)
    PGD(threat, problem.criterion, steps=steps, step_size=0.3)(network, problem.images, problem.targets)
    point, expected = problem.images, [problem.images]
    for _ in range(steps):
        point = point.clone().requires_grad_(True)
        loss = SegmentationLoss()(problem.network(point), problem.targets).sum()
        (gradient,) = torch.autograd.grad(loss, point)
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        point = threat.project(point.detach() + 0.3 * epsilon * direction, problem.images)
        expected.append(point)
    # The clean image, asked about once more as the start, and a last look at where the last step ended.
    assert len(network.seen) == 1 + steps + 1
    for found, wanted in zip(network.seen[1:], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@given(seeds, kinds, st.floats(0.1, 0.9))
def test_frozen_voxels_do_not_shorten_the_step_of_the_others(seed, kind, step_size):
    images = make_problem(kind, seed).images
    low, high = images - 10, images + 10
    low[:, 1] = high[:, 1] = images[:, 1]
    threat = ThreatModel("l2", 2.0, low, high)
    gradient = torch.randn(images.shape, generator=seeded(seed))
    moved = ascend(threat, images, images, gradient, step_size) - images
    assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx([2.0 * step_size] * 3, rel=1e-4)


# APGD


def test_checkpoints_of_100_steps_are_those_of_the_paper():
    """Croce & Hein, Section 3.1: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max{p_j − p_{j−1} − 0.03, 0.06}.

    By hand the differences are 22, 19, 16, 13, 10, 7, 6, 6 hundredths, and then 6 each; 105 is beyond the end.
    """
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


@given(st.integers(1, 500))
def test_checkpoints_are_those_of_the_formula_in_whole_hundredths(steps):
    hundredths = [0, 22]
    while hundredths[-1] <= 100:
        hundredths.append(hundredths[-1] + max(hundredths[-1] - hundredths[-2] - 3, 6))
    expected = {-(-share * steps // 100) for share in hundredths}
    assert checkpoints(steps) == sorted(mark for mark in expected if mark <= steps)


def slow_apgd(
    loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]],
    project: Callable[[Tensor], Tensor],
    start: Tensor,
    epsilon: float,
    norm: str,
    steps: int,
) -> list[Tensor]:
    """Algorithm 1 of Croce & Hein for one sample, line by line; all points x^(0) to x^(steps)."""

    def towards(point: Tensor, gradient: Tensor, size: float) -> Tensor:
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        return project(point + size * direction)

    marks = checkpoints(steps)
    eta = 2 * epsilon
    point, previous = start, None
    points, losses = [start], []
    best, best_gradient, best_loss = start, start, -math.inf
    etas, tops = {0: eta}, {0: -math.inf}
    for k in range(steps):
        loss, gradient = loss_and_gradient(point)
        losses.append(loss)
        if loss > best_loss:
            best, best_gradient, best_loss = point, gradient, loss
        if k in marks[1:]:
            earlier = marks[marks.index(k) - 1]
            raised = sum(losses[i + 1] > losses[i] for i in range(earlier, k))
            etas[k], tops[k] = eta, best_loss
            if raised < 0.75 * (k - earlier) or (etas[earlier] == eta and tops[earlier] == best_loss):
                eta /= 2
                point, gradient = best, best_gradient
        z = towards(point, gradient, eta)
        new = z if previous is None else project(point + 0.75 * (z - point) + 0.25 * (point - previous))
        previous, point = point, new
        points.append(new)
    return points


@every_norm
@pytest.mark.parametrize("seed", range(6))
def test_apgd_visits_the_points_of_a_slow_algorithm_1(norm, seed):
    problem = make_problem("2d classes", seed, samples=1, wrong=0.05)
    problem = replace(problem, images=problem.images.double(), network=problem.network.double())
    epsilon, steps = 0.4, 25
    threat = threat_for(problem.images, norm, epsilon)
    network = Watched(problem.network)
    APGD(threat, problem.criterion, steps=steps)(network, problem.images, problem.targets)
    seen = network.seen[1:]  # without the clean image

    def loss_and_gradient(point: Tensor) -> tuple[float, Tensor]:
        point = point.clone().requires_grad_(True)
        loss = SegmentationLoss()(problem.network(point), problem.targets)
        return loss.item(), torch.autograd.grad(loss.sum(), point)[0]

    expected = slow_apgd(loss_and_gradient, lambda p: threat.project(p, problem.images), seen[0], epsilon, norm, steps)
    assert len(seen) == steps + 1
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@every_norm
def test_apgd_halves_its_step_where_the_highest_loss_stays_though_most_steps_raise_it(norm):
    """Condition 2 alone: after a first high loss, a slow climb that never gets there again."""
    problem = make_problem("2d classes", 0, samples=1)
    images, steps, epsilon = problem.images.double(), 25, 0.4
    gradient = torch.randn(images.shape, generator=seeded(1)).double()
    heights = [100.0, *(float(step) for step in range(steps))]
    calls = iter(heights)

    def scripted(outputs: Tensor, targets: Tensor) -> Tensor:
        slope = (outputs * gradient).flatten(1).sum(1)
        return slope - slope.detach() + next(calls)

    network = Watched(Same())
    threat = ThreatModel(norm, epsilon)
    targets = (images[:, :1] < images[:, 1:]).double()
    APGD(threat, DiceCriterion(), scripted, steps=steps)(network, images, targets)
    seen = network.seen[1:]
    again = iter(heights)
    expected = slow_apgd(
        lambda _: (next(again), gradient), lambda p: threat.project(p, images), seen[0], epsilon, norm, steps
    )
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


# The optimum of a linear network


@dataclass(frozen=True)
class Score(DiceCriterion):
    """In place of a Dice a number that falls as the loss of the linear problem rises, so that the best is kept."""

    def dice(self, logits: Tensor, target: Tensor) -> Tensor:
        return torch.sigmoid(-score(logits, target) / 100).double()

    def check(self, logits: Tensor, target: Tensor) -> None:
        """Any number will do."""


def score(outputs: Tensor, targets: Tensor) -> Tensor:
    """Linear loss (B,): the logit of the wrong class above that of the right one, weighted by the target."""
    return ((outputs[:, 0] - outputs[:, 1]) * targets[:, 0]).flatten(1).sum(1)


def optimum(threat: ThreatModel, images: Tensor, gradient: Tensor) -> Tensor:
    """Highest rise of a linear loss over ball and box: δ = clip(λ g) with the λ that uses up the ball (KKT)."""
    low, high = (bound - images for bound in threat.bounds(images))
    epsilon = threat.epsilon
    if threat.norm == "linf":
        best = (epsilon * gradient.sign()).maximum(low).minimum(high)
    else:
        less, more = 0.0, 1e6
        for _ in range(200):
            middle = (less + more) / 2
            norm = (middle * gradient).maximum(low).minimum(high).norm()
            less, more = (middle, more) if norm < epsilon else (less, middle)
        best = (less * gradient).maximum(low).minimum(high)
    return (best * gradient).sum()


@every_norm
@pytest.mark.parametrize("range_kind", ["none", "own"])
@pytest.mark.parametrize("attack", ["pgd", "apgd", "apgd-shrinking", "autoattack"])
@pytest.mark.parametrize("epsilon", [0.1, 2.0, 6.0])
def test_the_optimum_of_a_linear_network_is_reached(norm, range_kind, attack, epsilon):
    for seed in range(3):
        generator = seeded(seed)
        images = torch.randn((1, 2, 6, 6), generator=generator).double()
        targets = torch.randn((1, 1, 6, 6), generator=generator).double()
        network = nn.Conv2d(2, 2, 1).double()
        with torch.no_grad():
            network.weight.copy_(torch.randn(network.weight.shape, generator=generator))
        threat = threat_for(images, norm, epsilon, range_kind)
        chosen = {
            "pgd": PGD(threat, Score(), score),
            "apgd": APGD(threat, Score(), score),
            "apgd-shrinking": APGD(threat, Score(), score, schedule="shrinking"),
            "autoattack": AutoAttack(
                threat, Score(), members=[PGD(ANYWHERE, loss=score, steps=5), APGD(ANYWHERE, loss=score)]
            ),
        }[attack]
        result = (chosen if attack == "autoattack" else replace(chosen, steps=100))(network, images, targets)
        assert threat.contains(result.images, images, tolerance=1e-9).all()
        weight = (network.weight[0] - network.weight[1]).detach()
        gradient = (weight[None] * targets).reshape(images.shape)
        with torch.no_grad():
            rise = score(network(result.images), targets) - score(network(images), targets)
        best = optimum(threat, images, gradient)
        assert 0.98 * best <= rise.item() <= best * (1 + 1e-6)


# GenAdv and BPGD


class Outcome(NamedTuple):
    image: Tensor
    crossed: bool
    correct_end: Tensor
    wrong_end: Tensor
    ascents: int


def slow_genadv(
    problem: Problem, sample: int, threat: ThreatModel, start: Tensor, steps: int, bisections: int, search: str
) -> Outcome:
    """Algorithm 2 for one sample, as the paper writes it; the start counts as a point of the path too."""
    image, target = problem.images[sample : sample + 1], problem.targets[sample : sample + 1]
    epsilon = float(threat.epsilon)
    low, high = threat.bounds(image)

    def is_correct(point: Tensor) -> bool:
        with torch.no_grad():
            return bool(problem.criterion.dice(problem.network(point), target) > problem.criterion.threshold)

    def gradient_at(point: Tensor) -> Tensor:
        point = point.clone().requires_grad_(True)
        loss = SegmentationLoss(problem.criterion.labels)(problem.network(point), target).sum()
        return torch.autograd.grad(loss, point)[0]

    def project(point: Tensor) -> Tensor:
        delta = point - image
        if threat.norm == "l2":
            delta = delta * min(1.0, epsilon / max(float(delta.norm()), 1e-30))
        else:
            delta = delta.clamp(-epsilon, epsilon)
        return (image + delta).maximum(low).minimum(high)

    alpha = 4 * epsilon / steps
    previous, point, crossed = image, start, not is_correct(start)
    taken = 0
    while not crossed and taken < steps:
        gradient = gradient_at(point)
        h = gradient.sign() if threat.norm == "linf" else gradient / gradient.norm()
        previous, point = point, project(point + alpha * h)
        crossed = not is_correct(point)
        taken += 1
    if not crossed:
        return Outcome(point, False, previous, point, taken)
    first, second = (image if search == "origin" else previous), point
    middle = (first + second) / 2
    for _ in range(bisections):
        if is_correct(middle):
            first = middle
        else:
            second = middle
        middle = (first + second) / 2
    return Outcome(middle, True, image if search == "origin" else previous, point, taken)


def correct_problem(kind: str, seed: int, samples: int) -> Problem:
    """A problem in which every clean sample is correct, and some by little."""
    problem = make_problem(kind, seed, samples)
    dice = dice_of(problem, problem.images)
    threshold = max(0.0, min(0.75, float(dice.min()) - 0.02))
    return replace(problem, criterion=replace(problem.criterion, threshold=threshold))


class Setup(NamedTuple):
    problem: Problem
    threat: ThreatModel
    start: Tensor
    oracle: Oracle
    network: CountingNetwork


def genadv_setup(kind: str, seed: int, norm: str) -> Setup:
    """Margins from none over hardly any to large, a start with noise, and a network that counts its runs."""
    problem = correct_problem(kind, seed, samples=4)
    sizes = torch.tensor([0.05, 0.4, 1.5, 4.0]) * (1.0 if norm == "l2" else 0.1)
    network, images = counting(problem)
    low, high = image_range(images)
    threat = ThreatModel(norm, sizes, low, high)
    noise = torch.randn(images.shape, generator=seeded(seed))
    start = threat.project(images + noise * 0.3 * threat.radius(images), images)
    loss = SegmentationLoss(problem.criterion.labels)
    oracle = Oracle(network, problem.targets, loss, problem.criterion, chunk=1)
    return Setup(replace(problem, network=network, images=images), threat, start, oracle, network)


STEPS, BISECTIONS = 6, 7


def genadv(setup: Setup, search: str, index: Tensor | None = None) -> Boundary:
    index = torch.arange(4) if index is None else index
    return generate_adversarial(
        setup.oracle,
        setup.problem.criterion,
        setup.threat.select(index),
        setup.problem.images[index],
        setup.start[index],
        index,
        steps=STEPS,
        bisections=BISECTIONS,
        boundary_search=search,
    )


@pytest.mark.parametrize("search", BOUNDARY_SEARCHES)
@settings(max_examples=20)
@given(kinds, seeds, norms)
def test_genadv_is_algorithm_2(search, kind, seed, norm):
    setup = genadv_setup(kind, seed, norm)
    problem, threat = setup.problem, setup.threat
    found = genadv(setup, search)
    runs = setup.network.forward_runs.clone(), setup.network.backward_runs.clone()
    assert torch.equal(setup.oracle.forward_passes, runs[0])
    assert torch.equal(setup.oracle.backward_passes, runs[1])
    assert threat.contains(found.images, problem.images, tolerance=1e-5).all()
    for sample in range(4):
        own = threat.select(torch.tensor([sample]))
        slow = slow_genadv(problem, sample, own, setup.start[sample : sample + 1], STEPS, BISECTIONS, search)
        assert bool(found.crossed[sample]) == slow.crossed
        torch.testing.assert_close(found.images[sample : sample + 1], slow.image, rtol=0, atol=1e-4)
        # A sample that crossed costs the passes up to there, and the bisections.
        assert runs[0][sample] == slow.ascents + 1 + (BISECTIONS if slow.crossed else 0)
        assert runs[1][sample] == min(slow.ascents + 1, STEPS)
        if slow.crossed:
            gap = (slow.wrong_end - slow.correct_end).norm()
            assert_next_to_the_boundary(problem, sample, found.images[sample], slow, float(gap) / 2**BISECTIONS)


def assert_next_to_the_boundary(problem: Problem, sample: int, point: Tensor, slow: Outcome, within: float) -> None:
    """Along the searched line there is a correct and a wrong point no further away than ``within``."""
    along = slow.wrong_end - slow.correct_end
    unit = along / along.norm()
    target = problem.targets[sample : sample + 1].expand(2, *problem.targets.shape[1:])
    ends = torch.cat([point[None] - within / 2 * unit, point[None] + within / 2 * unit])
    with torch.no_grad():
        correct = problem.criterion.is_correct(problem.criterion.dice(problem.network(ends), target))
    # The two ends of the last interval lie half its length to each side.
    assert correct.tolist() == [True, False]


def test_genadv_meets_all_cases_in_these_tests():
    """Crossings at the start, on the way and not at all: otherwise the test above would prove little."""
    ascents = []
    for seed in range(12):
        for kind in ("2d classes", "2d regions"):
            setup = genadv_setup(kind, seed, "l2")
            found = genadv(setup, "path")
            passes = setup.oracle.forward_passes - found.crossed * BISECTIONS
            ascents += [int(p) if crossed else None for p, crossed in zip(passes, found.crossed, strict=True)]
    assert ascents.count(None) > 5
    assert ascents.count(1) > 0
    assert sum(a is not None and 1 < a <= STEPS for a in ascents) > 5


@pytest.mark.parametrize("search", BOUNDARY_SEARCHES)
@few
@given(kinds, seeds, norms)
def test_genadv_of_some_samples_is_that_of_each_alone(search, kind, seed, norm):
    setup = genadv_setup(kind, seed, norm)
    together = genadv(setup, search)
    index = torch.tensor([3, 0])
    some = genadv(setup, search, index)
    assert torch.equal(some.images, together.images[index])
    assert torch.equal(some.crossed, together.crossed[index])


@pytest.mark.parametrize("search", BOUNDARY_SEARCHES)
def test_genadv_of_no_samples_is_nothing(search):
    setup = genadv_setup("2d classes", 0, "l2")
    found = genadv(setup, search, torch.zeros(0, dtype=torch.long))
    assert len(found.images) == len(found.crossed) == 0
    assert int(setup.oracle.forward_passes.sum()) == 0


@given(seeds, st.integers(0, 12))
def test_bisection_ends_at_the_boundary(seed, halvings):
    """On a network that is wrong once the image's mean exceeds a level, the boundary is known."""
    generator = seeded(seed)
    level = 0.1 + 0.8 * torch.rand(1, generator=generator).item()

    class Level(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            excess = images.mean((1, 2, 3), keepdim=True).expand(-1, 1, 2, 2) - level
            return torch.cat([excess, -excess], 1)

    targets = torch.ones(1, 1, 2, 2)
    oracle = Oracle(Level(), targets, SegmentationLoss(), DiceCriterion())
    correct_side, wrong_side = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    index = torch.arange(1)
    middle = bisect(oracle, DiceCriterion(), correct_side, wrong_side, index, halvings)
    assert abs(middle.mean().item() - level) <= 0.5 / 2**halvings + 1e-6
    assert oracle.forward_passes.tolist() == [halvings]


@few
@given(kinds, seeds, norms)
def test_bpgd_leaves_samples_alone_that_are_wrong_already(kind, seed, norm):
    problem = make_problem(kind, seed)
    criterion = replace(problem.criterion, threshold=0.999)
    attack = SMALL_BUDGET["bpgd"](threat_for(problem.images, norm, 1.0), criterion)
    result = attack(problem.network, problem.images, problem.targets)
    wrong = ~criterion.is_correct(result.clean_dice)
    assert torch.equal(result.images[wrong], problem.images[wrong])
    assert (result.forward_passes[wrong] == 1).all()
