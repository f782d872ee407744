"""Facts about the table of margins."""

import copy
import io
import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_ima.errors import UserError
from nnunet_ima.lp import NORMS
from nnunet_ima.margins import MarginTable, SampleId

SAMPLES: list[SampleId] = [(case, tile) for case in ("a", "b") for tile in range(3)]


class Update(NamedTuple):
    samples: list[SampleId]
    margins: list[float]


updates = st.lists(st.tuples(st.sampled_from(SAMPLES), st.floats(-5, 100, width=32)), min_size=1, max_size=5).map(
    lambda pairs: Update([s for s, _ in pairs], [m for _, m in pairs])
)
histories = st.lists(updates, max_size=6)
maxima = st.sampled_from([0.0, 0.1, 1.0, 15.0])


def table(maximum: float = 15.0, step: float = 2.0, history: list[Update] | None = None) -> MarginTable:
    made = MarginTable(step, maximum, "l2")
    for update in history or []:
        made.update(update.samples, torch.tensor(update.margins))
    return made


def merged(tables: list[MarginTable]) -> list[MarginTable]:
    """The tables of all ranks at the end of an epoch."""
    changes = [t.changes() for t in tables]
    for t in tables:
        t.merge(changes)
    return tables


def contents(t: MarginTable) -> dict[SampleId, tuple[float, int]]:
    pairs = zip(t.margins(SAMPLES).tolist(), t.visits(SAMPLES).tolist(), strict=True)
    return dict(zip(SAMPLES, pairs, strict=True))


def assert_same(one: MarginTable, other: MarginTable) -> None:
    torch.testing.assert_close(one.margins(SAMPLES), other.margins(SAMPLES), rtol=1e-6, atol=0)
    assert torch.equal(one.visits(SAMPLES), other.visits(SAMPLES))


@given(maxima, histories)
def test_margins_stay_between_zero_and_the_maximum(maximum, history):
    made = table(maximum, history=history)
    for margins in (made.margins(SAMPLES), made.all_margins()):
        assert ((margins >= 0) & (margins <= torch.tensor(maximum))).all()


@given(maxima, histories, updates)
def test_only_the_drawn_samples_move(maximum, history, update):
    made = table(maximum, history=history)
    before = contents(made)
    made.update(update.samples, torch.tensor(update.margins))
    after = contents(made)
    for sample in SAMPLES:
        proposals = [min(max(m, 0.0), maximum) for s, m in zip(*update, strict=True) if s == sample]
        if proposals:
            # A sample that stands twice in a batch gets the mean of its clipped margins.
            assert after[sample][0] == pytest.approx(sum(proposals) / len(proposals), rel=1e-6)
            assert after[sample][1] == before[sample][1] + len(proposals)
        else:
            assert after[sample] == before[sample]


@pytest.mark.parametrize(("step", "maximum", "initial"), [(2.0, 15.0, 2.0), (20.0, 15.0, 15.0), (2.0, 0.0, 0.0)])
def test_a_sample_that_was_never_drawn_has_margin_step_clipped(step, maximum, initial):
    made = table(maximum, step)
    assert made.margins(SAMPLES).tolist() == [initial] * len(SAMPLES)
    assert made.visits(SAMPLES).tolist() == [0] * len(SAMPLES)
    assert len(made) == len(made.all_margins()) == len(made.all_visits()) == 0


@given(histories)
def test_all_margins_and_visits_are_those_of_the_drawn_samples(history):
    made = table(history=history)
    drawn = sorted({sample for update in history for sample in update.samples})
    assert len(made) == len(drawn)
    listed = zip(made.all_margins().tolist(), made.all_visits().tolist(), strict=True)
    assert sorted(listed) == sorted(contents(made)[sample] for sample in drawn)
    assert int(made.all_visits().sum()) == sum(len(update.samples) for update in history)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_margin_that_is_no_number_is_refused_and_changes_nothing(bad):
    made = table(history=[Update(SAMPLES, [3.0] * 6)])
    before = contents(made)
    with pytest.raises(ValueError, match="NaN or infinite"):
        made.update(SAMPLES[:2], torch.tensor([1.0, bad]))
    assert contents(made) == before


def test_each_sample_needs_a_margin():
    with pytest.raises(ValueError, match="is shorter than"):
        table().update(SAMPLES, torch.ones(5))


@given(histories)
def test_a_checkpoint_brings_everything_back(history):
    made = table(history=history)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    restored = table()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert contents(restored) == contents(made)
    assert len(restored) == len(made)
    assert restored.changes() == {}


@given(histories)
def test_a_smaller_maximum_clips_what_is_loaded(history):
    made = table(history=history)
    restored = table(maximum=1.0)
    restored.load_state_dict(made.state_dict())
    drawn = sorted({sample for update in history for sample in update.samples})
    assert torch.equal(restored.margins(drawn), made.margins(drawn).clamp(max=1.0))


def state(**changes: object) -> dict[str, object]:
    return {**table(history=[Update(SAMPLES, [3.0] * 6)]).state_dict(), **changes}


DAMAGED: dict[str, dict[str, object]] = {
    "empty": {},
    "a column is missing": {k: v for k, v in state().items() if k != "margins"},
    "no norm": {k: v for k, v in state().items() if k != "norm"},
    "an unknown norm": state(norm="l7"),
    "cases are no list": state(cases="abc"),
    "too few cases": state(cases=["a"]),
    "too many margins": state(margins=torch.ones(7)),
    "margins are no tensor": state(margins=[3.0] * 6),
    "a margin is NaN": state(margins=torch.tensor([3.0, float("nan"), 3.0, 3.0, 3.0, 3.0])),
    "a single margin": state(margins=torch.tensor(3.0)),
    "visits of two axes": state(visits=torch.ones(6, 2)),
    "tiles of two axes": state(tiles=torch.ones(6, 2)),
}


@pytest.mark.parametrize("damage", sorted(DAMAGED))
def test_a_damaged_checkpoint_is_refused_and_the_table_stays(damage):
    made = table(history=[Update(SAMPLES[:2], [3.0, 4.0])])
    before = contents(made)
    with pytest.raises(UserError, match="margins in the checkpoint are damaged"):
        made.load_state_dict(DAMAGED[damage])
    assert contents(made) == before


@pytest.mark.parametrize(("saved", "wanted"), itertools.permutations(NORMS, 2))
def test_margins_of_another_norm_are_refused(saved, wanted):
    with pytest.raises(UserError, match=f"are {saved} distances, but the settings ask for {wanted}"):
        MarginTable(1.0, 5.0, wanted).load_state_dict(state(norm=saved))


@given(histories, st.lists(histories, min_size=1, max_size=3))
def test_all_ranks_hold_the_same_table_after_a_merge(common, per_rank):
    tables = [table(history=common) for _ in per_rank]
    merged(tables)  # every rank did the same here; from now on each sees its own samples
    start = contents(tables[0])
    for rank, history in enumerate(per_rank):
        for update in history:
            tables[rank].update(update.samples, torch.tensor(update.margins))
    own = [copy.deepcopy(t) for t in tables]
    merged(tables)
    for other in tables[1:]:
        assert contents(other) == contents(tables[0])
        assert other.changes() == {}
    after = contents(tables[0])
    for sample in SAMPLES:
        seen = [t.changes()[sample] for t in own if sample in t.changes()]
        assert after[sample][1] == start[sample][1] + sum(visits for _, visits in seen)
        if seen:
            low, high = min(m for m, _ in seen), max(m for m, _ in seen)
            assert low - 1e-5 <= after[sample][0] <= high + 1e-5
        else:
            assert after[sample] == start[sample]


@given(st.lists(histories, min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_a_merge_does_not_depend_on_the_order_of_the_ranks(per_rank, random):
    tables = [table(history=history) for history in per_rank]
    changes = [t.changes() for t in tables]
    shuffled = random.sample(changes, len(changes))
    one, other = tables[0], copy.deepcopy(tables[0])
    one.merge(changes)
    other.merge(shuffled)
    assert_same(one, other)


@given(maxima, histories)
def test_with_one_rank_a_merge_changes_nothing(maximum, history):
    made = table(maximum, history=history)
    alone = copy.deepcopy(made)
    merged([made])
    assert_same(made, alone)
    assert (made.margins(SAMPLES) <= torch.tensor(maximum)).all()
    merged([made])
    assert_same(made, alone)


def test_two_ranks_that_drew_the_same_sample_share_the_mean_of_their_visits():
    """3 visits that ended at margin 2, 1 visit that ended at 6: (3·2 + 6) / 4 = 3."""
    sample = SAMPLES[0]
    ranks = [table(history=[Update([sample], [m]) for m in (9.0, 5.0, 2.0)]), table(history=[Update([sample], [6.0])])]
    for rank in merged(ranks):
        assert contents(rank)[sample] == (3.0, 4)
