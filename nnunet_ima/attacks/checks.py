"""Signs that a network hides from attacks instead of resisting them.

The reasoning is that of AutoAttack's own flags (https://github.com/fra31/auto-attack, flags_doc.md) and of Carlini et
al. 2019, https://arxiv.org/abs/1902.06705. A check that fails says that figures of gradient attacks are not to be
trusted, and what to do; docs/attacks.md has an example of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ima.attack_losses import LOSSES
from nnunet_ima.attack_losses.voxels import look_at
from nnunet_ima.attacks.apgd import APGD
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.hyperplane import farthest
from nnunet_ima.losses import Outputs
from nnunet_ima.lp import per_sample
from nnunet_ima.threat import ThreatModel

RUNS = 3
# 1 − p below this is lost in single precision: cross entropy and soft Dice are flat there.
SATURATED = 2.0**-126
STEPS_AT_HUGE_EPSILON = 20
# Kernels that add in another order differ in the last digits; noise differs in the first.
SAME = 1e-3
# Of a network that says how sure it is, not so many voxels of the structures have the same margin. Of fewer than FEW
# voxels nothing is said.
PILE, FEW = 0.5, 20
# Of the clean Dice, what may be left at a huge ε.
LEFT_AT_HUGE_EPSILON = 0.25


class Finding(NamedTuple):
    """A check by name, whether it passed, and what that means in a sentence."""

    name: str
    passed: bool
    sentence: str


def check_network(
    network: nn.Module,
    images: Tensor,
    targets: Outputs,
    threat: ThreatModel,
    criterion: DiceCriterion,
    seed: int = 0,
    chunk: int | None = None,
) -> list[Finding]:
    """Look for defences that mislead attacks, on a few samples.

    Args:
        network: (B, C, *spatial) to logits.
        images: (B, C, *spatial), some eight that the network segments well.
        targets: as the criterion reads them.
        threat: norm and range; ε does not matter.
        criterion: how targets are read.
        seed: of the attack at a huge ε.
        chunk: as for attacks.

    Raises:
        ValueError, UserError: as an attack does.
    """
    # Far away from the image the margin is the loss that loses its way least: it never fades.
    if not len(images):
        return []
    attack = APGD(huge(threat, images), criterion, "margin", seed=seed, chunk=chunk, steps=STEPS_AT_HUGE_EPSILON)
    index = torch.arange(len(images), device=images.device)
    with attack.session(network, images, targets) as (oracle, best):
        start, before = best.images.clone(), _state(network)
        with watched() as used:
            runs = [oracle.logits(start, index) for _ in range(RUNS)]
        # A batch of the same size: others are rounded differently, and half precision makes much of that.
        others = per_sample(index > 0, start)
        alone = oracle.logits(torch.where(others, torch.zeros_like(start), start), index)[:1]
        gradient = oracle.under(LOSSES["dice-ce"](criterion.labels)).ascent(start, index).gradient
        clean = best.dice.clone()
        attack.run(oracle, images.detach().to(start), best)
        # A defence may wait until it sees something unusual.
        with watched() as used_there:
            there = [oracle.logits(best.images, index) for _ in range(RUNS)]
        stays, calls = _same_state(before, _state(network)), used | used_there
    moves = torch.where(threat.perturbable(images), gradient, torch.zeros_like(gradient)).flatten(1).abs().amax(1) > 0
    # Of a sample whose Dice is 0, or all of whose voxels are ignored, nothing is wanted.
    flat = ~moves & (clean > 0) & criterion.labels.valid(oracle.target).flatten(1).any(1)
    return [
        _same_output(runs, there),
        _samples_apart(runs, alone),
        _logits(runs[0]),
        _not_saturated(runs[0], oracle.target, criterion),
        _not_squashed(runs[0], oracle.target, criterion),
        _finding(
            "gradients_do_not_vanish",
            not bool(flat.any()),
            "the loss has a gradient at every clean sample",
            f"the loss has no gradient at all at {int(flat.sum())} of {len(flat)} clean samples: gradient attacks are "
            f"blind there; use square or spsa, and attack without the step that hides the gradient",
        ),
        _finding(
            "network_is_static",
            stays and not calls,
            "the network neither changes nor optimises anything while it predicts",
            f"the network {'calls ' + ', '.join(sorted(calls)) if stays else 'changes its weights or buffers'} "
            f"while it predicts: an attack meets another network at each step; attack a copy that does not",
        ),
        _finding(
            "huge_epsilon_leaves_nothing",
            float(best.dice.sum()) <= LEFT_AT_HUGE_EPSILON * float(clean.sum()),
            "a perturbation without limit drives Dice towards 0",
            f"perturbations as large as the range leave a Dice of {float(best.dice.mean()):.2f} (clean "
            f"{float(clean.mean()):.2f}): the attack does not work on this network; try square or another loss",
        ),
    ]


def huge(threat: ThreatModel, images: Tensor) -> ThreatModel:
    """The same threat model with an ε that reaches every image of the range, or with no range, ten times the image."""
    return threat.with_epsilon(farthest(threat.with_epsilon(0.0), images))


def _spread(runs: list[Tensor]) -> float:
    """The largest difference between answers to the same question, as a share of the largest logit."""
    scale = float(runs[0].abs().max().clamp_min(1e-12))
    return max(float((run - runs[0]).abs().max()) for run in runs[1:]) / scale


def _same_output(*asked: list[Tensor]) -> Finding:
    return _finding(
        "same_output_twice",
        max(_spread(runs) for runs in asked) < SAME,
        "the network gives the same output twice",
        "the network gives another output for the same image: a lucky draw looks like an attack's success, and one "
        "gradient is noise; use apgd:eot=20, which averages",
    )


def _samples_apart(runs: list[Tensor], alone: Tensor) -> Finding:
    # What differs from run to run differs here, too, and has a check of its own.
    return _finding(
        "samples_are_apart",
        _spread([runs[0][:1], alone]) < max(SAME, 2 * _spread(runs)),
        "a sample's output does not depend on the others in its batch",
        "a sample's output depends on the other samples in its batch, as with batch norm without running statistics: "
        "its Dice is that of this batch alone, and an attack on one sample disturbs the others; give the network one "
        "sample at a time (chunk=1)",
    )


def _logits(logits: Tensor) -> Finding:
    return _finding(
        "outputs_are_logits",
        not bool(((logits >= 0) & (logits <= 1)).all()),
        "outputs are logits, not probabilities",
        "outputs are probabilities: softmax or sigmoid would be applied twice, which flattens every loss; give the "
        "network without its last activation",
    )


def _not_saturated(logits: Tensor, target: Tensor, criterion: DiceCriterion) -> Finding:
    voxels = look_at(logits, target, criterion.labels)
    surest = torch.minimum(voxels.log_wrong, voxels.log_truth).exp() < SATURATED
    share = float((surest & voxels.valid).sum()) / max(1.0, float(voxels.valid.expand_as(surest).sum()))
    return _finding(
        "outputs_are_not_saturated",
        share < 0.99,
        "not every output is certain to all digits",
        f"{100 * share:.1f} % of the outputs are certain to all digits of single precision: cross entropy and Dice "
        f"have no gradient there; use apgd:loss=dlr or apgd:loss=margin, which do not depend on the logits' scale",
    )


def _not_squashed(logits: Tensor, target: Tensor, criterion: DiceCriterion) -> Finding:
    """Margins that pile up at one value have been pressed against a bound, where a function is flat.

    Background is left out: where an image is empty an honest network, too, says the same everywhere.
    """
    voxels = look_at(logits, target, criterion.labels)
    structure = criterion.labels.foreground(target, logits.shape[1])
    structure = structure if criterion.labels.regions else structure.any(1, keepdim=True)
    margins = voxels.margin[structure & voxels.valid].abs()
    share = _largest_pile(margins)
    return _finding(
        "outputs_are_not_squashed",
        share < PILE,
        "the margins of the structures' voxels differ from each other",
        f"{100 * share:.0f} % of the structures' voxels have the same margin to a thousandth: something presses the "
        f"logits against a bound, where they have next to no gradient; attack without it, or use square",
    )


def _largest_pile(values: Tensor) -> float:
    """The largest share of ``values`` (n,) that lies within a thousandth of the largest one of each other."""
    if len(values) < FEW:
        return 0.0
    # On the CPU, as MPS knows no double precision.
    ordered = values.cpu().double().sort().values
    ends = torch.searchsorted(ordered, ordered + float(ordered[-1]) / 1000, right=True)
    return float((ends - torch.arange(len(ordered))).max()) / len(ordered)


def _finding(name: str, passed: bool, good: str, bad: str) -> Finding:
    return Finding(name, passed, good if passed else bad)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal entry by entry, where NaN equals NaN."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _same_state(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """A bank of examples may have grown."""
    return before.keys() == now.keys() and all(
        was.shape == now[name].shape and _equal(was, now[name]) for name, was in before.items()
    )


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not stored belong to it, too."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def watched() -> Iterator[set[str]]:
    """The names of those functions of autograd that are called meanwhile: a prediction needs none of them.

    A network that has imported such a function by name calls it unseen.
    """
    used: set[str] = set()
    places: list[tuple[Any, str, str]] = [
        (torch.autograd, "grad", "torch.autograd.grad"),
        (torch.autograd, "backward", "torch.autograd.backward"),
        (torch.Tensor, "backward", "Tensor.backward"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]

    def noting(original: Any, title: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            used.add(title)
            return original(*args, **kwargs)

        return call

    for (owner, name, title), original in zip(places, originals, strict=True):
        setattr(owner, name, noting(original, title))
    try:
        yield used
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
