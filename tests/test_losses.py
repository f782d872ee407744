"""The per-sample losses are nnU-Net's own."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_networks import IGNORE, KINDS, random_target, seeded
from torch import Tensor, nn

from nnunet_ima.labels import Labels
from nnunet_ima.losses import (
    SegmentationLoss,
    cross_entropy,
    deep_supervision_weights,
    first,
    sample_loss,
    soft_dice,
)

kinds = st.sampled_from(sorted(KINDS))
complete_kinds = st.sampled_from([kind for kind in sorted(KINDS) if "ignore" not in kind])
ignoring_kinds = st.sampled_from([kind for kind in sorted(KINDS) if "ignore" in kind])
seeds = st.integers(0, 10_000)


def nnunet_loss(labels: Labels) -> nn.Module:
    """As nnUNetTrainer._build_loss, with batch_dice off."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": labels.regions, "ddp": False}
    if labels.regions:
        ignore = labels.ignore_label is not None
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, ignore_label=labels.ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


def random_pair(kind: str, seed: int, samples: int = 3, scale: int = 1) -> tuple[Tensor, Tensor, Labels]:
    """Logits and a target; ``scale`` divides the resolution."""
    axes, labels = KINDS[kind]
    generator = seeded(seed)
    shape = (samples, 2 if labels.regions else 3, *[(8 if axes == 2 else 6) // scale] * axes)
    logits = 2 * torch.randn(shape, generator=generator)
    return logits, random_target(logits, labels, 0.7, 0.2, generator), labels


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@given(kinds, seeds)
def test_each_samples_loss_is_nnunets_of_that_sample_alone(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    logits.requires_grad_(True)
    theirs = torch.stack([nnunet_loss(labels)(logits[i : i + 1], target[i : i + 1]) for i in range(len(logits))])
    ours = SegmentationLoss(labels)(logits, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # With a weight of its own for each sample, so that gradients cannot be swapped between samples.
    weights = torch.arange(1.0, len(logits) + 1)
    torch.testing.assert_close(
        gradient_of(ours @ weights, logits), gradient_of(theirs @ weights, logits), rtol=1e-4, atol=1e-7
    )


@given(complete_kinds, seeds)
def test_the_mean_over_the_batch_is_nnunets_loss_of_the_batch(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    torch.testing.assert_close(
        SegmentationLoss(labels)(logits, target).mean(), nnunet_loss(labels)(logits, target), rtol=1e-5, atol=1e-6
    )


@given(complete_kinds, seeds)
def test_deep_supervision_is_nnunets(kind, seed):
    pairs = [random_pair(kind, seed + scale, scale=scale) for scale in (1, 2, 3)]
    outputs, targets, labels = [p[0].requires_grad_(True) for p in pairs], [p[1] for p in pairs], pairs[0][2]
    weights = deep_supervision_weights(3)
    ours = SegmentationLoss(labels, weights)(outputs, targets).mean()
    theirs = DeepSupervisionWrapper(nnunet_loss(labels), weights)(outputs, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours, outputs[:2]), torch.autograd.grad(theirs, outputs[:2]), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("outputs", range(2, 8))
def test_deep_supervision_weights_are_nnunets(outputs):
    """As nnUNetTrainer._build_loss computes them; one output has all the weight."""
    weights = np.array([1 / (2**i) for i in range(outputs)])
    weights[-1] = 0
    assert deep_supervision_weights(outputs) == pytest.approx(weights / weights.sum(), abs=1e-12)
    assert deep_supervision_weights(1) == (1.0,)


@given(kinds, seeds, st.integers(10, 18))
def test_where_hardly_any_foreground_is_left_the_smoothing_is_nnunets(kind, seed, certainty):
    """Then the smoothing term decides: it is as large as what it is added to."""
    logits, target, labels = random_pair(kind, seed)
    if labels.regions:
        logits, target[:, :2] = logits - certainty, 0
    else:
        logits[:, 0] += certainty
        target[target != IGNORE] = 0
    theirs = [nnunet_loss(labels)(logits[i : i + 1], target[i : i + 1]) for i in range(len(logits))]
    torch.testing.assert_close(SegmentationLoss(labels)(logits, target), torch.stack(theirs), rtol=1e-4, atol=1e-6)


def test_the_smoothing_term_is_still_that_of_nnunets_trainer():
    source = inspect.getsource(nnUNetTrainer._build_loss)
    assert source.count("'smooth': 1e-5") == 2


@given(kinds, seeds)
def test_a_list_of_outputs_with_one_target_is_judged_at_full_resolution(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    coarse = random_pair(kind, seed, scale=2)[0]
    loss = SegmentationLoss(labels)
    assert torch.equal(loss([logits, coarse], target), loss(logits, target))
    assert torch.equal(loss(logits, [target, coarse]), loss(logits, target))
    assert first([logits, coarse]) is logits
    assert first(logits) is logits


def test_lists_of_different_lengths_are_refused():
    logits, target, labels = random_pair("2d classes", 0)
    for weights, outputs, targets in (((0.5, 0.5), 3, 3), ((0.5, 0.5), 2, 3), (None, 3, 2)):
        with pytest.raises(ValueError, match=f"deep supervision: {outputs} outputs, {targets} targets and . weights"):
            SegmentationLoss(labels, weights)([logits] * outputs, [target] * targets)


@given(ignoring_kinds, seeds)
def test_ignored_voxels_have_no_influence(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    logits.requires_grad_(True)
    loss = sample_loss(logits, target, labels)
    gradient = gradient_of(loss.sum(), logits)
    ignored = ~labels.valid(target).expand_as(logits)
    assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))
    assert (gradient[~ignored] != 0).any()
    other = torch.where(ignored, torch.randn(logits.shape, generator=seeded(seed)), logits)
    torch.testing.assert_close(sample_loss(other, target, labels), loss)
    if labels.regions:
        relabelled = target.clone()
        relabelled[:, :-1] = torch.where(ignored, 1 - target[:, :-1], target[:, :-1])
        torch.testing.assert_close(sample_loss(logits, relabelled, labels), loss)


@given(ignoring_kinds, seeds)
def test_a_sample_of_ignored_voxels_alone_has_a_finite_loss_and_no_gradient(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    logits.requires_grad_(True)
    if labels.regions:
        target[1, -1] = 1
    else:
        target[1] = IGNORE
    loss = sample_loss(logits, target, labels)
    gradient = gradient_of(loss.sum(), logits)
    assert torch.isfinite(loss).all()
    assert loss[1] == nnunet_loss(labels)(logits[1:2], target[1:2]) == -1
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert torch.isfinite(gradient).all()


@settings(max_examples=10)
@given(kinds, seeds)
def test_half_precision_logits_are_judged_in_single_precision(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    half = logits.half()
    loss = sample_loss(half, target, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sample_loss(half.float(), target, labels))


@given(kinds, seeds)
def test_the_loss_is_made_of_its_parts(kind, seed):
    logits, target, labels = random_pair(kind, seed)
    dice, entropy = soft_dice(logits, target, labels), cross_entropy(logits, target, labels)
    assert ((dice >= 0) & (dice <= 1)).all()
    assert (entropy >= 0).all()
    torch.testing.assert_close(sample_loss(logits, target, labels), entropy - dice)
