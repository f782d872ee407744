"""Checks of results: what one attack's figures say about another's."""

import numpy as np
import pytest

from nnunet_ima.evaluation.outcomes import MemberScore, Outcome, SampleKey, SampleScore
from nnunet_ima.evaluation.protocols import Level
from nnunet_ima.evaluation.trust import check

LEVEL = Level("5", 5.0)
SAMPLES = (SampleKey("a", 0), SampleKey("b", 0))


def outcome(attack: str, dice: float, level: Level | None = LEVEL, **members: tuple[float | None, float]) -> Outcome:
    """Two samples of the same Dice; ``members`` give theirs for each, None where they were not asked."""
    nothing = np.zeros((1, 3))
    found = [
        {
            name.replace("_", "-"): None if (own := values[number]) is None else MemberScore(own, nothing)
            for name, values in members.items()
        }
        for number in range(len(SAMPLES))
    ]
    scores = [
        SampleScore(name, nothing, dice, 0.9, 5.0, 5.0, 1, 1, parts) for name, parts in zip(SAMPLES, found, strict=True)
    ]
    return Outcome(attack, level, scores)


def failed(*attacked: Outcome) -> set[str]:
    return {item["name"] for item in check(outcome("clean", 0.9, None), attacked) if not item["passed"]}


def names(*attacked: Outcome) -> set[str]:
    return {item["name"] for item in check(outcome("clean", 0.9, None), attacked)}


@pytest.mark.parametrize("white", ["pgd:steps=3", "apgd", "apgd:loss=ce", "apgd-t", "ifgsm"])
@pytest.mark.parametrize("black", ["square:n_queries=9", "spsa"])
def test_a_black_box_that_is_stronger_than_the_gradient_attacks_is_flagged(white, black):
    assert "white_box_beats_black_box" in failed(outcome(white, 0.9), outcome(black, 0.1))
    assert "white_box_beats_black_box" not in failed(outcome(white, 0.1), outcome(black, 0.3))
    # One that works is enough.
    assert "white_box_beats_black_box" not in failed(outcome("pgd", 0.8), outcome(white, 0.1), outcome(black, 0.3))


def test_members_of_an_ensemble_count():
    hidden = outcome("autoattack", 0.1, apgd_ce=(0.9, 0.9), apgd_t=(0.8, 0.8), square=(0.1, 0.1))
    assert "white_box_beats_black_box" in failed(hidden)
    hidden = outcome("autoattack", 0.05, apgd_ce=(0.0, 0.9), square=(None, 0.1))
    assert "white_box_beats_black_box" in failed(hidden)
    # Where a member was not asked any more the Dice was 0 before it.
    honest = outcome("autoattack", 0.1, apgd_ce=(0.0, 0.2), square=(None, 0.3))
    assert "white_box_beats_black_box" not in failed(honest)


def test_what_is_content_with_wrong_samples_is_compared_with_nothing():
    content = outcome("apgd:mode=threshold", 0.58)
    assert failed(content, outcome("square", 0.3), outcome("white-noise", 0.5)) == set()
    ensemble = outcome("autoattack:mode=threshold", 0.5, apgd_ce=(0.58, 0.58), square=(None, 0.2))
    assert "white_box_beats_black_box" not in names(ensemble)
    assert failed(outcome("fab", 0.59), outcome("white-noise", 0.5)) == set()


def test_noise_that_is_stronger_than_an_attack_is_flagged():
    assert failed(outcome("apgd", 0.8), outcome("white-noise", 0.5)) == {"gradients_beat_noise"}


@pytest.mark.parametrize("black", ["square:n_queries=50", "spsa"])
def test_noise_that_is_stronger_than_a_black_box_says_nothing_of_gradients(black):
    attacked = [outcome("white-noise", 0.8), outcome(black, 0.85), outcome("apgd", 0.2)]
    assert failed(*attacked) == set()
    assert "gradients_beat_noise" in names(*attacked)
    assert "gradients_beat_noise" not in names(*attacked[:2])


def test_of_several_kinds_of_noise_the_strongest_counts():
    weak, strong = outcome("white-noise", 0.7), outcome("white-noise:draws=1000", 0.3)
    for noises in ((weak, strong), (strong, weak)):
        assert failed(outcome("apgd", 0.6), *noises) == {"gradients_beat_noise"}


FURTHER = Level("10", 10.0)


def test_an_attack_that_gets_weaker_at_a_larger_level_is_flagged():
    assert failed(outcome("apgd", 0.2), outcome("apgd", 0.3, FURTHER)) == {"larger_levels_are_worse"}
    assert failed(outcome("apgd", 0.3), outcome("apgd", 0.2, FURTHER)) == set()


@pytest.mark.parametrize("attack", ["apgd:mode=threshold", "bpgd", "fab:steps=3", "fgsm"])
def test_what_dice_an_attack_leaves_that_is_content_with_wrong_says_nothing_about_levels(attack):
    found = outcome(attack, 0.2), outcome(attack, 0.3, FURTHER)
    assert "larger_levels_are_worse" not in names(*found)
    assert failed(*found, outcome("apgd", 0.2), outcome("apgd", 0.3, FURTHER)) == {"larger_levels_are_worse"}
