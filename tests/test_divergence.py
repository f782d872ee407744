"""TRADES' divergence is torch's own, and what TE pulls with is a mean square; ignored voxels have no say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_losses import random_pair
from tiny_networks import KINDS, seeded
from torch import distributions

from nnunet_ima.divergence import Divergence, kl_divergence, probabilities_of, squared_distance
from nnunet_ima.losses import deep_supervision_weights

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 10_000)


def pair(kind, seed, scale=1):
    clean, target, labels = random_pair(kind, seed, scale=scale)
    return clean, 2 * torch.randn(clean.shape, generator=seeded(seed + 1)), target, labels


def slow_divergence(clean, perturbed, valid, regions):
    """torch.distributions, a voxel at a time."""
    values = []
    for c, p, v in zip(clean, perturbed, valid, strict=True):
        places = v[0].nonzero()
        found = []
        for place in places:
            at = (slice(None), *place.tolist())
            if regions:
                both = zip(c[at], p[at], strict=True)
                each = [distributions.kl_divergence(*(distributions.Bernoulli(logits=z) for z in zs)) for zs in both]
                found.append(torch.stack(each).mean())
            else:
                found.append(distributions.kl_divergence(*(distributions.Categorical(logits=z[at]) for z in (c, p))))
        values.append(torch.stack(found).mean() if found else torch.zeros(()))
    return torch.stack(values)


@given(kinds, seeds)
def test_the_divergence_is_that_of_torchs_distributions(kind, seed):
    clean, perturbed, target, labels = pair(kind, seed, scale=2)
    valid = labels.valid(target)
    ours = kl_divergence(clean, perturbed, valid, labels.regions)
    torch.testing.assert_close(ours, slow_divergence(clean, perturbed, valid, labels.regions), rtol=1e-4, atol=1e-5)


@given(kinds, seeds)
def test_it_is_zero_between_equals_and_nowhere_negative(kind, seed):
    clean, perturbed, target, labels = pair(kind, seed)
    valid = labels.valid(target)
    assert kl_divergence(clean, clean, valid, labels.regions).abs().max() < 1e-5
    assert kl_divergence(clean, perturbed, valid, labels.regions).min() >= 0


@given(kinds, seeds)
def test_what_is_ignored_has_no_say_and_no_gradient(kind, seed):
    clean, perturbed, target, labels = pair(kind, seed)
    valid = labels.valid(target)
    perturbed.requires_grad_(True)
    for measure in (
        lambda p: kl_divergence(clean, p, valid, labels.regions),
        lambda p: squared_distance(probabilities_of(p, labels.regions), torch.zeros_like(clean), valid),
    ):
        (gradient,) = torch.autograd.grad(measure(perturbed).sum(), perturbed)
        assert not gradient.masked_select(~valid.expand_as(gradient)).any()
        other = torch.where(valid, perturbed, 1e4)
        torch.testing.assert_close(measure(other), measure(perturbed))


def test_a_sample_without_any_valid_voxel_is_zero():
    logits = torch.randn(2, 3, 4, 4)
    nowhere = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    assert kl_divergence(logits, -logits, nowhere).tolist() == [0, 0]
    assert squared_distance(logits, -logits, nowhere).tolist() == [0, 0]


@given(kinds, seeds, st.sampled_from([None, (0.75, 0.25)]))
def test_outputs_of_deep_supervision_are_weighted_as_the_loss_weights_them(kind, seed, weights):
    full, half = pair(kind, seed), pair(kind, seed, scale=2)
    labels = full[3]
    reference = Divergence.reference([full[0], half[0]], [full[2], half[2]])
    found = Divergence(labels, weights)([full[1], half[1]], reference)
    each = [kl_divergence(c, p, labels.valid(t), labels.regions) for c, p, t, _ in (full, half)]
    first, second = weights or deep_supervision_weights(2)
    torch.testing.assert_close(found, first * each[0] + second * each[1])


@given(kinds, seeds)
def test_a_network_with_one_output_needs_no_list(kind, seed):
    clean, perturbed, target, labels = pair(kind, seed)
    found = Divergence(labels)(perturbed, Divergence.reference(clean, target))
    torch.testing.assert_close(found, kl_divergence(clean, perturbed, labels.valid(target), labels.regions))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_single(dtype):
    clean, perturbed = (torch.randn(2, 3, 8, 8).to(dtype) for _ in range(2))
    valid = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    found = kl_divergence(clean, perturbed, valid)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kl_divergence(clean.float(), perturbed.float(), valid))
