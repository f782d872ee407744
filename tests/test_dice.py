"""Facts about the Dice of each sample."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import DiceMetric
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from tiny_networks import IGNORE, KINDS, make_problem, seeded
from torch import Tensor

from nnunet_ima.dice import REDUCTIONS, Confusion, DiceCriterion, class_dice, confusion, sample_dice
from nnunet_ima.labels import Labels, likeliest_class

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 10_000)
reductions = st.sampled_from(REDUCTIONS)


def random_case(kind: str, seed: int, samples: int = 3) -> tuple[Tensor, Tensor, Labels]:
    """Logits and a target that agree in part; in some samples one of them, or both, lack a class or all."""
    problem = make_problem(kind, seed % 50, samples, wrong=0.1 + seed % 7 / 10)
    labels = problem.criterion.labels
    with torch.no_grad():
        logits = problem.network(problem.images)
    generator = seeded(seed)
    absent, silent = (torch.rand((samples, *[1] * (logits.ndim - 1)), generator=generator) < 0.25 for _ in range(2))
    target = torch.where(absent, without_foreground(problem.targets, labels), problem.targets)
    if seed % 3 == 0:  # a class that occurs nowhere, beside one that may
        logits[:, -1] = -9.0
        target = target.clone()
        if labels.regions:
            target[:, 1] = 0
        else:
            target[target == 2] = 0
    nothing = torch.full_like(logits, -5.0)
    if not labels.regions:
        nothing[:, 0] = 5.0
    return torch.where(silent, nothing, logits), target, labels


def without_foreground(target: Tensor, labels: Labels) -> Tensor:
    if not labels.regions:
        return torch.where(target == IGNORE, target, 0.0)
    empty = target.clone()
    empty[:, :2] = 0
    return empty


def slow_counts(logits: Tensor, target: Tensor, labels: Labels) -> list[list[tuple[int, int, int]]]:
    """True positives, false positives and false negatives, voxel by voxel."""
    samples, heads = logits.shape[:2]
    outputs, truths = logits.flatten(2).tolist(), target.flatten(2).tolist()
    counts = []
    for sample in range(samples):
        rows = []
        for head in range(0 if labels.regions else 1, heads):
            hits = false_alarms = misses = 0
            for voxel in range(len(outputs[sample][0])):
                scores = [outputs[sample][k][voxel] for k in range(heads)]
                if labels.regions:
                    ignored = labels.ignore_label is not None and truths[sample][-1][voxel] == 1
                    true, found = truths[sample][head][voxel] == 1, scores[head] > 0
                else:
                    ignored = truths[sample][0][voxel] == labels.ignore_label
                    true, found = truths[sample][0][voxel] == head, scores.index(max(scores)) == head
                if not ignored:
                    hits += true and found
                    false_alarms += found and not true
                    misses += true and not found
            rows.append((hits, false_alarms, misses))
        counts.append(rows)
    return counts


def slow_dice(counts: list[tuple[int, int, int]], reduction: str) -> float:
    present = [2 * hits / (2 * hits + alarms + misses) for hits, alarms, misses in counts if hits + alarms + misses]
    if not present:
        return 1.0
    return {"mean": sum(present) / len(present), "max": max(present), "min": min(present)}[reduction]


@given(kinds, seeds, reductions)
def test_dice_is_that_of_counting_voxel_by_voxel(kind, seed, reduction):
    logits, target, labels = random_case(kind, seed)
    expected = slow_counts(logits, target, labels)
    counts = confusion(logits, target, labels)
    assert torch.stack(counts, -1).tolist() == [[list(row) for row in rows] for rows in expected]
    dice = DiceCriterion(reduction=reduction, labels=labels).dice(logits, target)
    assert dice.tolist() == pytest.approx([slow_dice(rows, reduction) for rows in expected], abs=1e-6)
    assert ((dice >= 0) & (dice <= 1)).all()


@given(kinds, seeds)
def test_counts_are_nnunets(kind, seed):
    logits, target, labels = random_case(kind, seed)
    if labels.regions:
        hard = (logits.sigmoid() > 0.5).float()
        mask = None if labels.ignore_label is None else 1 - target[:, -1:]
        truth = target[:, : logits.shape[1]]
    else:
        hard = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
        mask = None if labels.ignore_label is None else (target != labels.ignore_label).float()
        truth = target if mask is None else target * mask
    tp, fp, fn, _ = get_tp_fp_fn_tn(hard, truth, mask=mask)
    start = 0 if labels.regions else 1
    for ours, theirs in zip(confusion(logits, target, labels), (tp, fp, fn), strict=True):
        assert torch.equal(ours.float(), theirs[:, start:])


@given(st.sampled_from(["2d classes", "3d classes", "2d regions"]), seeds)
def test_dice_of_each_class_is_monais_where_the_target_holds_it(kind, seed):
    logits, target, labels = random_case(kind, seed)
    heads = logits.shape[1]
    if labels.regions:
        hard, truth = (logits > 0).float(), target
    else:
        hard, truth = (
            torch.zeros_like(logits).scatter_(1, classes.long(), 1)
            for classes in (logits.argmax(1, keepdim=True), target)
        )
    metric = DiceMetric(include_background=labels.regions, reduction="none")
    monai = metric(hard, truth)
    ours = class_dice(confusion(logits, target, labels))
    held = labels.foreground(target, heads).flatten(2).any(2)
    torch.testing.assert_close(ours[held], monai[held])


@given(st.integers(2, 5), st.integers(1, 6), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seeds)
def test_the_likeliest_class_is_that_of_argmax_also_among_equals(classes, values, dtype, seed):
    """Few different values: many voxels with equal logits; some are NaN or infinite."""
    generator = seeded(seed)
    logits = torch.randint(0, values, (2, classes, 7, 5), generator=generator).to(dtype)
    for strange in (torch.nan, torch.inf, -torch.inf):
        where = torch.rand(logits.shape, generator=generator) < 0.05
        logits = logits.masked_fill(where, strange)
    assert torch.equal(likeliest_class(logits), logits.argmax(1, keepdim=True))


def test_an_empty_target():
    """Nothing to find and nothing found is perfect; every false alarm where nothing is to be found is a failure."""
    logits = torch.zeros(2, 3, 2, 2)
    logits[:, 0] = 1.0
    logits[1, 2, 0, 0] = 2.0
    for reduction in REDUCTIONS:
        assert DiceCriterion(reduction=reduction).dice(logits, torch.zeros(2, 1, 2, 2)).tolist() == [1.0, 0.0]


def test_the_three_ways_to_put_classes_together():
    """Class 1: 2·3 / (2·3 + 1 + 1) = 3/4; class 2: 2·1 / (2·1 + 1 + 1) = 1/2; class 3 occurs nowhere."""
    counts = Confusion(*(torch.tensor([row]) for row in ([3, 1, 0], [1, 1, 0], [1, 1, 0])))
    assert class_dice(counts)[0, :2].tolist() == [0.75, 0.5]
    assert math.isnan(class_dice(counts)[0, 2])
    reduced = {reduction: float(sample_dice(counts, reduction)) for reduction in REDUCTIONS}
    assert reduced == {"mean": 0.625, "max": 0.75, "min": 0.5}


@given(st.sampled_from(["2d classes, ignore label", "3d regions, ignore label"]), seeds, reductions)
def test_predictions_at_ignored_voxels_do_not_count(kind, seed, reduction):
    logits, target, labels = random_case(kind, seed)
    criterion = DiceCriterion(reduction=reduction, labels=labels)
    other = torch.where(labels.valid(target), logits, torch.randn(logits.shape, generator=seeded(seed)))
    assert torch.equal(criterion.dice(other, target), criterion.dice(logits, target))
    if labels.regions:
        relabelled = target.clone()
        relabelled[:, :-1] = torch.where(labels.valid(target), target[:, :-1], 1 - target[:, :-1])
        assert torch.equal(criterion.dice(logits, relabelled), criterion.dice(logits, target))
        assert torch.equal(criterion.has_foreground(relabelled, 2), criterion.has_foreground(target, 2))


@given(kinds, seeds)
def test_a_sample_has_foreground_if_something_can_be_missed(kind, seed):
    logits, target, labels = random_case(kind, seed)
    everything_missed = torch.full_like(logits, -5.0)
    if not labels.regions:
        everything_missed[:, 0] = 5.0
    missed = [any(row[2] for row in rows) for rows in slow_counts(everything_missed, target, labels)]
    assert DiceCriterion(labels=labels).has_foreground(target, logits.shape[1]).tolist() == missed


def test_a_region_target_of_bool_is_read_like_one_of_float():
    logits, target, labels = random_case("3d regions, ignore label", 4)
    criterion = DiceCriterion(labels=labels)
    assert torch.equal(criterion.dice(logits, target.bool()), criterion.dice(logits, target))


def test_correct_is_above_the_threshold_not_at_it():
    dice = torch.tensor([0.0, 0.5, 0.5 + 1e-6, 1.0])
    assert DiceCriterion(threshold=0.5).is_correct(dice).tolist() == [False, False, True, True]


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 60.0, math.nan])
def test_a_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="must be at least 0 and under 1"):
        DiceCriterion(threshold=threshold)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'median'; it must be one of mean, max, min"):
        DiceCriterion(reduction="median")
