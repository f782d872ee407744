"""On classifiers, seen as segmentations of one voxel, attacks reach the success of two libraries at the same budget.

Success is compared sample by sample: those that only we break against those that only they break. If neither were
better, the difference of the two counts would have a standard deviation of the root of their sum.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

from nnunet_ima.attacks import APGD, FAB, Attack, Square
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.labels import Labels
from nnunet_ima.lp import lp_norm
from nnunet_ima.threat import ThreatModel

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed (make test does it)")
# When it is imported, ART writes into the home folder; of two processes that do so at once for the first time, one
# finds the file there that it neither read nor wrote, and ends with a NameError.
with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, {"HOME": home}):
    art_attacks = pytest.importorskip("art.attacks.evasion", reason="adversarial-robustness-toolbox is not installed")

SAMPLES = 200
STEPS = 30
QUERIES = 300


@dataclass(frozen=True)
class Task:
    """A classifier (B, 1, H, W) → (B, K), images in [0, 1], their classes, and ε at which about half can be broken."""

    classifier: nn.Module
    images: Tensor
    classes: Tensor
    n_classes: int
    epsilon: dict[str, float]


class AsSegmentation(nn.Module):
    """The class of an image as the class of each of its voxels."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(images)
        return logits[:, :, None, None].expand(-1, -1, *images.shape[2:])


def fit(images: Tensor, classes: Tensor, n_classes: int) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(images[0].numel(), 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, n_classes),
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), classes).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module", params=["moons", "digits"])
def task(request) -> Task:
    state = torch.get_rng_state()
    if request.param == "moons":
        points, labels = make_moons(2000, noise=0.1, random_state=0)
        points = (points - points.min(0)) / (points.max(0) - points.min(0))
        # Each coordinate fills half of the image: Square has no room in one of 1 × 2.
        images = torch.tensor(points).float()[:, None, None].repeat_interleave(3, -1).expand(-1, -1, 6, -1).clone()
        n_classes, epsilon = 2, {"l2": 0.5, "linf": 0.09}
    else:
        pictures, labels = load_digits(return_X_y=True)
        images = torch.tensor(pictures).float().reshape(-1, 1, 8, 8) / 16
        n_classes, epsilon = 10, {"l2": 0.6, "linf": 0.1}
    classes = torch.tensor(labels).long()
    network = fit(images[:-SAMPLES], classes[:-SAMPLES], n_classes)
    torch.set_rng_state(state)
    return Task(network, images[-SAMPLES:], classes[-SAMPLES:], n_classes, epsilon)


def right(task: Task, images: Tensor) -> Tensor:
    with torch.no_grad():
        return task.classifier(images).argmax(1) == task.classes


def ours(task: Task, norm: str, make: Callable[..., Attack]) -> Tensor:
    """Which images we break; only one voxel counts, the others are to be ignored."""
    labels = Labels(ignore_label=task.n_classes)
    target = torch.full_like(task.images, float(task.n_classes))
    target[:, 0, 0, 0] = task.classes.float()
    threat = ThreatModel(norm, task.epsilon[norm], 0.0, 1.0)
    attack = make(threat, DiceCriterion(labels=labels), mode="threshold")
    result = attack(AsSegmentation(task.classifier), task.images, target)
    broken = ~right(task, result.images)
    assert torch.equal(broken, result.dice == 0)
    return broken


def theirs(task: Task, norm: str, images: Tensor) -> Tensor:
    """Which images they break, if they keep to the ball."""
    inside = lp_norm(images - task.images, norm) <= task.epsilon[norm] * (1 + 1e-4)
    return ~right(task, images) & inside


def assert_at_least_as_strong(mine: Tensor, other: Tensor) -> None:
    only_we, only_they = int((mine & ~other).sum()), int((~mine & other).sum())
    assert only_they - only_we <= 2 * math.sqrt(only_they + only_we), (int(mine.sum()), int(other.sum()))


def art_classifier(task: Task):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        task.classifier,
        nn.CrossEntropyLoss(),
        tuple(task.images.shape[1:]),
        task.n_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


NORM_OF = {"l2": ("L2", 2), "linf": ("Linf", "inf")}


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd(task, norm, loss):
    if loss == "dlr" and task.n_classes == 2:
        pytest.skip("DLR needs three classes")
    mine = ours(task, norm, lambda *a, **k: APGD(*a, loss=loss, steps=STEPS, **k))
    clean = right(task, task.images)
    assert 0.2 < float(mine[clean].float().mean()) < 0.95  # else there is nothing to compare
    attack = torchattacks.APGD(
        task.classifier, norm=NORM_OF[norm][0], eps=task.epsilon[norm], steps=STEPS, n_restarts=1, seed=0, loss=loss
    )
    assert_at_least_as_strong(mine, theirs(task, norm, attack(task.images, task.classes)))
    attack = art_attacks.AutoProjectedGradientDescent(
        art_classifier(task),
        norm=NORM_OF[norm][1],
        eps=task.epsilon[norm],
        eps_step=2 * task.epsilon[norm],
        max_iter=STEPS,
        nb_random_init=1,
        batch_size=SAMPLES,
        loss_type={"ce": "cross_entropy", "dlr": "difference_logits_ratio"}[loss],
        verbose=False,
    )
    found = torch.tensor(attack.generate(task.images.numpy(), task.classes.numpy()))
    assert_at_least_as_strong(mine, theirs(task, norm, found))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fab(task, norm):
    """At the same number of passes: theirs differentiates every logit in every step, ours one number. ART has none."""
    # A step of theirs: K backward and 2 forward passes; of ours: 1 and 2, in one run and one for each target.
    targets = {2: 0, 10: 3}[task.n_classes]
    assert (1 + targets) * 3 <= task.n_classes + 2
    mine = ours(task, norm, lambda *a, **k: FAB(*a, steps=STEPS, targets=targets, **k))
    attack = torchattacks.FAB(
        task.classifier,
        norm=NORM_OF[norm][0],
        eps=task.epsilon[norm],
        steps=STEPS,
        n_restarts=1,
        seed=0,
        n_classes=task.n_classes,
    )
    assert_at_least_as_strong(mine, theirs(task, norm, attack(task.images, task.classes)))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square(task, norm):
    mine = ours(task, norm, lambda *a, **k: Square(*a, n_queries=QUERIES, **k))
    attack = torchattacks.Square(
        task.classifier, norm=NORM_OF[norm][0], eps=task.epsilon[norm], n_queries=QUERIES, n_restarts=1, seed=0
    )
    assert_at_least_as_strong(mine, theirs(task, norm, attack(task.images, task.classes)))
    attack = art_attacks.SquareAttack(
        art_classifier(task),
        norm=NORM_OF[norm][1],
        eps=task.epsilon[norm],
        max_iter=QUERIES,
        p_init=0.8,
        nb_restarts=1,
        batch_size=SAMPLES,
        verbose=False,
    )
    found = torch.tensor(attack.generate(task.images.numpy(), task.classes.numpy()))
    assert_at_least_as_strong(mine, theirs(task, norm, found))
