"""On two moons IMA puts the decision boundary nearer the middle than SAT with too large an epsilon (Figure 7)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

NOISE, SEED = 0.05, 0


def load_script() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "moons.py"
    spec = importlib.util.spec_from_file_location("benchmark_moons", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


class NearestMoon(nn.Module):
    """The class of the noise-free moon that is nearer: its boundary is the middle line."""

    def forward(self, images: Tensor) -> Tensor:
        points = images.flatten(1).double().numpy()
        away = [torch.from_numpy(points - script.nearest_on_moon(points, moon)).norm(dim=1) for moon in (0, 1)]
        return -torch.stack(away, 1)[:, :, None, None]


class Always(nn.Module):
    """The same class everywhere."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, 1, 1)
        logits[:, self.label] = 1
        return logits


class Scores(NamedTuple):
    offset: float
    clean: float
    attacked: float  # PGD, L2 0.2
    attacked_hard: float  # PGD, L2 0.3


@pytest.fixture(scope="module")
def scores() -> dict[str, Scores]:
    points, unseen = script.moons(1500, NOISE, SEED), script.moons(800, NOISE, SEED + 10_000)
    recipe = script.Recipe(epsilon=0.35, delta_epsilon=0.035, epochs=30, steps=10, seed=SEED)
    middle = script.middle_line(0.02)
    measured = {}
    for method in script.METHODS:
        network = script.train(method, points, recipe)
        measured[method] = Scores(
            script.boundary_offset(network, middle),
            script.accuracy(network, unseen),
            script.accuracy(network, unseen, epsilon=0.2, steps=40),
            script.accuracy(network, unseen, epsilon=0.3, steps=40),
        )
    return measured


def test_ima_lies_nearer_the_middle_than_sat_with_too_large_an_epsilon(scores):
    # Measured: 0.23 and 0.49; 0.46 where IMA neither bisects nor shrinks its margins.
    assert scores["IMA"].offset < 0.6 * scores["SAT"].offset


def test_ima_gives_up_no_clean_accuracy(scores):
    assert scores["IMA"].clean >= scores["SAT"].clean
    assert scores["IMA"].clean > 0.99


def test_ima_withstands_more_attacks_than_sat_with_too_large_an_epsilon(scores):
    # Measured: 0.985 and 0.950; 0.970 where margins never shrink, 0.960 without bisection, 0.953 without either.
    assert scores["IMA"].attacked > scores["SAT"].attacked + 0.025


def test_ima_withstands_more_attacks_than_clean_training(scores):
    # Measured: 0.965 and 0.855. At 0.2 the two are about as good: clean training lies near the middle by itself.
    assert scores["IMA"].attacked_hard > scores["STD"].attacked_hard + 0.04


def test_a_right_point_of_either_class_has_dice_1_and_a_wrong_one_0():
    points = script.moons(40, NOISE, SEED)
    dice = script.CRITERION.dice(Always(1)(points.images), points.targets)
    assert torch.equal(dice, points.targets.flatten())
    dice = script.CRITERION.dice(Always(0)(points.images), points.targets)
    assert torch.equal(dice, 1 - points.targets.flatten())


def test_offset_is_0_in_the_middle_and_1_where_a_class_is_lost():
    middle = script.middle_line(0.02)
    assert script.boundary_offset(NearestMoon(), middle) < 0.01
    for label, side in ((0, 1), (1, -1)):
        assert script.boundary_offset(Always(label), middle) == 1
        assert (script.wrong_side(Always(label), middle) == side).all()


def test_middle_line_is_equally_far_from_both_moons():
    middle = script.middle_line()
    away = np.linalg.norm(middle.points - middle.nearest, axis=-1)
    np.testing.assert_allclose(away[0], away[1], atol=1e-3)
    noise_free = script.moons(2000, 0.0, SEED)
    for moon in (0, 1):
        mine = noise_free.images[noise_free.targets[:, 0, 0, 0] == moon].flatten(1).double()
        brute = torch.cdist(torch.from_numpy(middle.points), mine).amin(1).numpy()
        np.testing.assert_allclose(brute, middle.half_gap, atol=2e-3)
    # The narrowest places are half a unit wide: each moon's inner end from the other moon.
    assert middle.half_gap.min() == pytest.approx(0.25, abs=1e-3)
