"""Which samples are kept to be shown, and the pictures of them."""

from __future__ import annotations

import random
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from nnunet_ima.evaluation import merge, pictures
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.merge import examples_of
from nnunet_ima.evaluation.outcomes import (
    LOTS_KEPT,
    Condition,
    Outcome,
    SampleKey,
    SampleScore,
    drawn_by_lot,
    lost_most,
)
from nnunet_ima.evaluation.protocols import parse_level
from nnunet_ima.evaluation.records import Records


def score_of(case: str, tile: int, size: int, hits: float, clean: float = 0.9) -> SampleScore:
    counts = np.array([[hits * size, 7.0, size - hits * size]])
    return SampleScore(SampleKey(case, tile), counts, hits, clean, 5.0, 5.0, 9, 8)


samples_of_a_run = st.dictionaries(
    st.tuples(st.text(max_size=5), st.integers(0, 30)), st.integers(0, 900), min_size=1, max_size=12
)


@given(sizes=samples_of_a_run, hits=st.tuples(st.floats(0, 1), st.floats(0, 1)), data=st.data())
def test_the_lots_are_the_same_for_all_models_orders_and_parts(sizes, hits, data):
    one, other = ([score_of(*key, size, share) for key, size in sizes.items()] for share in hits)
    drawn = [score.sample for score in drawn_by_lot(one)]
    assert len(drawn) == min(LOTS_KEPT, len(sizes)) == len(set(drawn))
    assert [score.sample for score in drawn_by_lot(data.draw(st.permutations(other)))] == drawn
    part_of = data.draw(st.lists(st.integers(0, 2), min_size=len(one), max_size=len(one)))
    parts = [[score for score, mine in zip(one, part_of, strict=True) if mine == part] for part in range(3)]
    assert [score.sample for score in drawn_by_lot(chain.from_iterable(map(drawn_by_lot, parts)))] == drawn


def test_a_sample_is_drawn_as_likely_as_it_has_voxels_to_be_segmented():
    names = [str(number) for number in range(4000)]
    larger = [drawn_by_lot([score_of(name, 0, 100, 0.5), score_of(name, 1, 300, 0.5)])[0].sample.tile for name in names]
    # Standard deviation 0.7 %.
    assert np.mean(larger) == pytest.approx(0.75, abs=0.025)
    assert drawn_by_lot([score_of("a", 0, 0, 0), score_of("b", 0, 1, 0)])[0].sample.case == "b"


def test_examples_are_kept_of_what_lost_most_and_of_the_lots_however_they_come(tmp_path):
    condition = Condition("pgd", parse_level("5", "l2"))
    draws = random.Random(0)
    scores = [score_of(f"case{number}", number, draws.randint(50, 900), draws.random()) for number in range(30)]
    records = Records(tmp_path / "part", [condition], "run")
    draws.shuffle(scores)
    with records.writing():
        for start in range(0, 30, 4):
            some = scores[start : start + 4]
            records.keep_examples(condition, [example_of(score) for score in some], some)
            records.add_samples(condition, some)
    for choose in (drawn_by_lot, lost_most):
        shown = examples_of(condition, [records], choose)
        assert [(one.case, one.tile) for one in shown] == [score.sample for score in choose(scores)]
    kept = {score.sample for choose in (drawn_by_lot, lost_most) for score in choose(scores)}
    assert len(list(records.folder.glob("examples/*/*.npz"))) == len(kept)


def example_of(score: SampleScore) -> Example:
    image, masks = np.zeros((4, 4), np.float32), np.zeros((1, 4, 4), bool)
    return Example(*score.sample, score.clean_dice, score.dice, image, image, masks, masks, masks)


@pytest.mark.parametrize(
    ("normalisation", "unit"),
    [({"normalization_schemes": ["ZScoreNormalization"]}, "z-scores"),
     ({"normalization_schemes": ["CTNormalization"]}, "units of the normalised scan"),
     (None, "units of the normalised scan")],
)  # fmt: skip
def test_the_picture_of_a_perturbation_is_in_the_unit_of_the_networks_input(tmp_path, monkeypatch, normalisation, unit):
    """None: of a run that was begun before it was noted."""
    score, drawn = score_of("case", 0, 100, 0.2), []
    monkeypatch.setattr(pictures, "_save", lambda figure, _: drawn.append(figure))
    monkeypatch.setattr(merge, "write_all", lambda *_: None)
    monkeypatch.setattr(merge, "draw_dice_against_level", lambda *_: None)
    outcome = Outcome("pgd", parse_level("5", "l2"), [score], worst=[example_of(score)])
    noted = {} if normalisation is None else {"normalisation": normalisation}
    merge._write(tmp_path, [outcome, outcome], {"classes": ["a"], **noted})
    (figure,) = drawn
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"] == [unit]


@pytest.mark.parametrize("name", ["a$b$c", r"$\frac$", "$", "a_b^c"])
def test_names_stand_in_the_pictures_as_they_are(tmp_path, monkeypatch, name):
    """A dollar sign begins no formula: that would be drawn as something else, or not at all."""
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, file: drawn.append((figure, file)))
    level = parse_level("5", "l2")
    score = score_of(name, 0, 100, 0.2)
    outcome = Outcome(f"pgd {name}", level, [score], worst=[example_of(score)])
    pictures.draw_worst(outcome, [name], "z-scores", tmp_path / "worst.png")
    summary = {
        "results": [{"attack": name, "level": "5", "epsilon": 5.0, "tvdi": 0.5}], "clean": {"tvdi": 0.9},
        "criterion": {"dice_threshold": 0.6}, "protocol": {"unit": name, "name": "sound"},
        "model": {"trainer": name, "dataset": name, "configuration": "2d"},
    }  # fmt: skip
    pictures.draw_dice_against_level(summary, tmp_path / "level.png")
    assert len(drawn) == 2
    for figure, file in drawn:
        texts = [text for text in figure.findobj(Text) if name in text.get_text()]
        assert texts
        assert not any(text.get_parse_math() for text in texts)
        figure.savefig(file)
        plt.close(figure)
        assert file.stat().st_size > 1000
