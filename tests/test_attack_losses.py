"""Losses of attacks: each against a slow one written voxel by voxel from its paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import KINDS, make_problem, seeded
from torch import Tensor

from nnunet_ima.attack_losses import (
    LOSSES,
    DiceLogOdds,
    JensenShannon,
    SegPGD,
    TargetedDiceLogOdds,
    TargetedDLR,
    likely_others,
)
from nnunet_ima.attack_losses.voxels import look_at, true_class
from nnunet_ima.labels import Labels

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 200)
few = settings(max_examples=15, deadline=None)
OURS = sorted(set(LOSSES) - {"dice-ce"})  # that one is nnU-Net's, tested in test_losses.py


class Question(NamedTuple):
    """What one voxel (and region) is about: logits of all answers, the true one, and a weight's group."""

    logits: list[float]
    truth: int
    region: int


def questions(logits: Tensor, target: Tensor, labels: Labels) -> list[list[Question]]:
    """For each sample all voxels that are not ignored; a region is a question with the answers no (0) and yes."""
    samples = []
    for sample in range(len(logits)):
        found = []
        for place in torch.cartesian_prod(*[torch.arange(n) for n in logits.shape[2:]]).tolist():
            values = [float(v) for v in logits[(sample, slice(None), *place)]]
            truths = [int(v) for v in target[(sample, slice(None), *place)]]
            if labels.regions:
                if labels.ignore_label is not None and truths[-1]:
                    continue
                found += [Question([0.0, v], t, r) for r, (v, t) in enumerate(zip(values, truths, strict=False))]
            elif truths[0] != labels.ignore_label:
                found.append(Question(values, truths[0], 0))
        samples.append(found)
    return samples


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def entropy(q: Question) -> float:
    return -math.log(softmax(q.logits)[q.truth])


def margin(q: Question) -> float:
    return max(v for i, v in enumerate(q.logits) if i != q.truth) - q.logits[q.truth]


def is_correct(q: Question) -> bool:
    return q.logits.index(max(q.logits)) == q.truth


def dlr(q: Question) -> float:
    ordered = sorted(q.logits, reverse=True)
    return margin(q) if len(ordered) < 3 else margin(q) / (ordered[0] - ordered[2])


def divergence(q: Question) -> float:
    total, truth = 0.0, [float(i == q.truth) for i in range(len(q.logits))]
    for p, y in zip(softmax(q.logits), truth, strict=True):
        total += sum(v * math.log(v / ((p + y) / 2)) for v in (p, y) if v > 0)
    return total / 2


def cosine(q: Question) -> float:
    p = softmax(q.logits)
    return entropy(q) * p[q.truth] / math.sqrt(sum(v * v for v in p))


SLOW: dict[str, Callable[[Question], float]] = {
    "ce": entropy,
    "margin": margin,
    "dlr": dlr,
    "masked-ce": lambda q: entropy(q) * is_correct(q),
    "js": divergence,
    "segpgd": lambda q: entropy(q) * is_correct(q),
    "cospgd": cosine,
}


@pytest.mark.parametrize("name", sorted(SLOW))
@few
@given(kinds, seeds)
def test_a_loss_is_the_mean_over_voxels_of_what_its_paper_says(name, kind, seed):
    problem = make_problem(kind, seed)
    logits, labels = problem.network(problem.images).detach(), problem.criterion.labels
    found = LOSSES[name](labels)(logits, problem.targets)
    voxels = int(labels.valid(problem.targets)[0].numel())
    for value, asked in zip(found.tolist(), questions(logits, problem.targets, labels), strict=True):
        slow = sum(map(SLOW[name], asked)) / max(1, len(asked))
        if name == "ce" and labels.regions and labels.ignore_label is not None:
            slow *= logits.shape[1]  # nnU-Net's own scale: see nnunet_ima.losses
        assert value == pytest.approx(slow, rel=1e-4, abs=1e-5), voxels


@few
@given(kinds, seeds)
def test_balanced_cross_entropy_gives_each_class_of_a_sample_the_same_weight(kind, seed):
    problem = make_problem(kind, seed)
    logits, labels = problem.network(problem.images).detach(), problem.criterion.labels
    found = LOSSES["balanced-ce"](labels)(logits, problem.targets)
    for value, asked in zip(found.tolist(), questions(logits, problem.targets, labels), strict=True):
        regions = sorted({q.region for q in asked})
        total = 0.0
        for region in regions:
            mine = [q for q in asked if q.region == region]
            classes = {q.truth for q in mine}
            for truth in classes:
                of_class = [q for q in mine if q.truth == truth]
                total += sum(entropy(q) * is_correct(q) for q in of_class) / len(of_class) / len(classes)
        assert value == pytest.approx(total / len(regions), rel=1e-4, abs=1e-5)


@few
@given(kinds, seeds, st.floats(0, 1))
def test_segpgd_moves_its_weight_to_wrong_voxels(kind, seed, progress):
    problem = make_problem(kind, seed)
    logits, labels = problem.network(problem.images).detach(), problem.criterion.labels
    found = SegPGD(labels).at(progress)(logits, problem.targets)
    weight = progress / 2
    for value, asked in zip(found.tolist(), questions(logits, problem.targets, labels), strict=True):
        slow = sum(entropy(q) * (1 - weight if is_correct(q) else weight) for q in asked) / max(1, len(asked))
        assert value == pytest.approx(slow, rel=1e-4, abs=1e-5)


@few
@given(kinds, seeds)
def test_dice_log_odds_are_those_of_the_soft_dice(kind, seed):
    problem = make_problem(kind, seed)
    logits, labels = problem.network(problem.images).detach(), problem.criterion.labels
    found = DiceLogOdds(labels)(logits, problem.targets)
    for value, asked in zip(found.tolist(), questions(logits, problem.targets, labels), strict=True):
        hits = errors = 0.0
        for q in asked:
            probability = softmax(q.logits)
            for c in range(1, len(probability)):
                hits += probability[c] * (c == q.truth)
                errors += 1 - probability[c] if c == q.truth else probability[c]
        dice = 2 * hits / (2 * hits + errors)
        assert value == pytest.approx(math.log((1 - dice) / dice), rel=1e-3, abs=1e-4)


@few
@given(seeds, st.integers(2, 5), st.floats(1, 60))
def test_for_one_voxel_dice_log_odds_are_about_the_logit_margin_however_sure_the_network_is(seed, classes, scale):
    """Whatever the true class, background included: FAB on a classifier needs it."""
    logits = (scale * torch.randn((6, classes, 1, 1), generator=seeded(seed))).requires_grad_(True)
    target = torch.randint(0, classes, (6, 1, 1, 1), generator=seeded(seed + 1)).float()
    loss = DiceLogOdds(Labels())(logits, target)
    others = logits.scatter(1, target.long(), -torch.inf).amax(1)
    margin_of = (others - logits.gather(1, target.long())[:, 0])[:, 0, 0]
    # The soft maximum of K − 1 logits is up to log(K − 1) higher; a false class may count beside the missed one.
    assert torch.allclose(loss, margin_of, atol=math.log(max(2, classes - 1)) + 1e-3, rtol=1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient.abs().amax(1) > 0.4).all()


@few
@given(st.integers(3, 6), seeds)
def test_targeted_dlr_is_that_of_the_paper(classes, seed):
    logits = 3 * torch.randn((2, classes, 3, 3), generator=seeded(seed))
    target = torch.randint(0, classes, (2, 1, 3, 3), generator=seeded(seed + 1)).float()
    ranking = likely_others(logits, target, Labels())
    assert ranking.shape == (2, classes - 1, 3, 3)
    for rank in range(classes - 1):
        found = TargetedDLR(Labels())(logits, [target, ranking[:, rank : rank + 1]])
        for sample in range(2):
            total = 0.0
            for place in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
                values = [float(v) for v in logits[(sample, slice(None), *place)]]
                truth = int(target[(sample, 0, *place)])
                others = sorted((v for i, v in enumerate(values) if i != truth), reverse=True)
                ordered = sorted(values, reverse=True)
                third = ordered[2] if classes == 3 else (ordered[2] + ordered[3]) / 2
                total += (others[rank] - values[truth]) / (ordered[0] - third)
            assert float(found[sample]) == pytest.approx(total / 9, rel=1e-4, abs=1e-5)


@few
@given(seeds)
def test_for_regions_each_target_is_a_region(seed):
    problem = make_problem("2d regions", seed)
    logits, labels = problem.network(problem.images).detach(), problem.criterion.labels
    ranking = likely_others(logits, problem.targets, labels)
    for region in range(logits.shape[1]):
        found = TargetedDLR(labels)(logits, [problem.targets, ranking[:, region : region + 1]])
        signed = torch.where(problem.targets[:, region].bool(), -logits[:, region], logits[:, region])
        assert torch.allclose(found, signed.flatten(1).mean(1), atol=1e-5)


@pytest.mark.parametrize("name", OURS)
@few
@given(st.sampled_from([kind for kind in sorted(KINDS) if "ignore" in kind]), seeds)
def test_ignored_voxels_have_no_influence_and_no_gradient(name, kind, seed):
    problem = make_problem(kind, seed)
    labels = problem.criterion.labels
    logits = problem.network(problem.images).detach().requires_grad_(True)
    loss = LOSSES[name](labels)(logits, problem.targets)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    ignored = ~labels.valid(problem.targets).expand_as(logits)
    assert (gradient[ignored] == 0).all()
    other = torch.where(ignored, 7 * torch.randn(logits.shape, generator=seeded(seed)), logits)
    assert torch.allclose(LOSSES[name](labels)(other, problem.targets), loss, atol=1e-6)
    nothing = problem.targets.clone()
    nothing[:, -1:] = 1.0 if labels.regions else float(labels.ignore_label or 0)
    loss = LOSSES[name](labels)(logits, nothing)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (loss == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", OURS)
@few
@given(kinds, seeds, st.sampled_from([1.0, 30.0, 1000.0]))
def test_losses_and_gradients_are_finite_however_sure_the_network_is(name, kind, seed, scale):
    problem = make_problem(kind, seed)
    logits = (scale * problem.network(problem.images)).detach().requires_grad_(True)
    loss = LOSSES[name](problem.criterion.labels)(logits, problem.targets)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@few
@given(kinds, seeds)
def test_cospgd_has_the_gradient_of_cross_entropy_in_each_voxel_times_a_weight(kind, seed):
    problem = make_problem(kind, seed)
    labels = problem.criterion.labels
    logits = problem.network(problem.images).detach().requires_grad_(True)
    voxels = look_at(logits, problem.targets, labels)
    (entropy,) = torch.autograd.grad(-voxels.log_truth.sum(), logits)
    (found,) = torch.autograd.grad(LOSSES["cospgd"](labels)(logits, problem.targets).sum(), logits)
    counted = labels.valid(problem.targets).expand_as(logits) & (entropy.abs() > 1e-4)
    assert ((found / entropy)[counted] > 0).all()


@few
@given(kinds, seeds)
def test_targeted_dice_log_odds_are_those_of_a_network_without_the_other_classes(kind, seed):
    problem = make_problem(kind, seed)
    labels = problem.criterion.labels
    logits = problem.network(problem.images).detach()
    ranking = likely_others(logits, problem.targets, labels)
    found = TargetedDiceLogOdds(labels)(logits, [problem.targets, ranking[:, :1]])
    if labels.regions:  # region 0 alone, and the channel of what is ignored
        alone = torch.cat([problem.targets[:, :1], problem.targets[:, 2:]], 1)
        expected = DiceLogOdds(labels)(logits[:, :1], alone)
    else:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ranking[:, :1], True)
        kept = kept.scatter(1, true_class(problem.targets, labels), True)
        expected = DiceLogOdds(labels)(torch.where(kept, logits, -1e6), problem.targets)
    assert torch.allclose(found, expected, atol=1e-4)


def test_integer_targets_of_deep_supervision_are_no_classes_to_aim_at():
    problem = make_problem("2d classes", 0)
    logits = problem.network(problem.images).detach()
    lists = [
        [problem.targets.to(kind), problem.targets[:, :, ::2, ::2].to(kind)] for kind in (torch.float, torch.int16)
    ]
    one, other = (DiceLogOdds(Labels())([logits, logits[:, :, ::2, ::2]], targets) for targets in lists)
    assert torch.equal(one, other)


@few
@given(kinds, seeds, st.sampled_from([1.0, 30.0, 1000.0, 1e6]))
def test_dice_log_odds_have_a_gradient_however_sure_a_network_is_that_is_right(kind, seed, scale):
    """There the soft Dice has none: its gradient is 0 in single precision."""
    problem = make_problem(kind, seed, wrong=0.0)
    labels = problem.criterion.labels
    logits = (scale * problem.network(problem.images)).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(DiceLogOdds(labels)(logits, problem.targets).sum(), logits)
    # A voxel whose two highest logits differ by little is never sure.
    assert (gradient.flatten(1).abs().amax(1) > 1e-4).all()


@few
@given(kinds, seeds, st.floats(0.1, 50))
def test_jensen_shannon_is_bounded(kind, seed, scale):
    problem = make_problem(kind, seed)
    loss = JensenShannon(problem.criterion.labels)(scale * problem.network(problem.images), problem.targets)
    assert (loss >= 0).all()
    assert (loss <= math.log(2) + 1e-6).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
@few
@given(kinds, seeds, st.permutations(range(3)))
def test_a_samples_loss_is_its_own(name, kind, seed, order):
    problem = make_problem(kind, seed)
    logits = problem.network(problem.images).detach()
    loss = LOSSES[name](problem.criterion.labels)
    index = torch.tensor(order)
    assert torch.allclose(loss(logits[index], problem.targets[index]), loss(logits, problem.targets)[index], atol=1e-6)
    alone = loss(logits[:1], problem.targets[:1])
    assert torch.allclose(alone, loss(logits, problem.targets)[:1], atol=1e-6)
