"""What an ensemble's TVDI is made of, and that everything downstream shows the same."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_of_runs import ATTACK, ENSEMBLE, make_run

from nnunet_ima.attacks import APGD
from nnunet_ima.attacks.autoattack import VERSIONS
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import members_of_choice, parse_attack
from nnunet_ima.evaluation.baseline import baseline_of, read_baseline, write_baseline
from nnunet_ima.evaluation.ensembles import figures_of_members, points_for_tvdi
from nnunet_ima.evaluation.identity import differences, sealed
from nnunet_ima.evaluation.merge import merge
from nnunet_ima.evaluation.metrics import Array, tvdi
from nnunet_ima.evaluation.outcomes import CLEAN, KEPT, MemberScore, Outcome, Point, SampleKey, SampleScore
from nnunet_ima.evaluation.protocols import Level
from nnunet_ima.evaluation.report import write_report
from nnunet_ima.evaluation.results import Results, read_results
from nnunet_ima.evaluation.statistics import units

LEVEL = Level("5", 5.0)
MEMBERS = {"apgd-dice-ce": {"2": 0.72, "8": 0.42}, "apgd-balanced-ce": {"2": 0.7, "8": 0.4}}


def score(tile: int, counts: Array, members: dict[str, MemberScore | None]) -> SampleScore:
    return SampleScore(SampleKey("case", tile), counts, dice_of(counts), 1.0, 5.0, 5.0, 9, 8, members)


def dice_of(counts: Array) -> float:
    """Of one class."""
    ((tp, fp, fn),) = counts
    return float(2 * tp / (2 * tp + fp + fn))


def found_by(hits: int, false: int, size: int) -> MemberScore:
    counts = np.array([[hits, false, size - hits]], float)
    return MemberScore(dice_of(counts), counts)


def outcomes(seed: int, samples: int, members: int, asked: float = 0.8) -> tuple[Outcome, Outcome]:
    """Untouched, and under an ensemble that keeps the lowest Dice of each sample; not all members are asked."""
    draws = np.random.default_rng(seed)
    clean, attacked = [], []
    for tile in range(samples):
        size = int(draws.integers(5, 400))
        before = found_by(size - int(draws.integers(0, 3)), int(draws.integers(0, 40)), size)
        found: dict[str, MemberScore | None] = {
            f"member {number}": found_by(int(draws.integers(0, size + 1)), int(draws.integers(0, 300)), size)
            if draws.random() < asked
            else None
            for number in range(members)
        }
        lowest = min([before, *(part for part in found.values() if part)], key=lambda part: part.dice)
        clean.append(score(tile, before.counts, {}))
        attacked.append(score(tile, lowest.counts, found))
    return Outcome(CLEAN, None, clean), Outcome("autoattack", LEVEL, attacked)


def pooled(points: list[Point]) -> float:
    return tvdi(np.array([point.counts for point in points]))


@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 4))
def test_tvdi_is_at_or_below_the_kept_images_and_every_members(seed, samples, members):
    untouched, attacked = outcomes(seed, samples, members)
    attacked.points = points_for_tvdi(attacked, untouched)
    found = pooled(attacked.points)
    assert found <= tvdi(np.array([one.counts for one in attacked.samples]))
    figures = figures_of_members(attacked, 0.6)
    assert len(figures["by_attack"]) == members
    for name, part in figures["by_attack"].items():
        asked = [one.by_attack[name] for one in attacked.samples if one.by_attack[name] is not None]
        own = [one.counts if (p := one.by_attack[name]) is None else p.counts for one in attacked.samples]
        assert found <= part["tvdi"] == tvdi(np.array(own))
        assert part["attacked_samples"] == len(asked)
        if asked:
            assert part["adi"] == pytest.approx(np.mean([p.dice for p in asked if p]))
            assert part["robust_share"] == pytest.approx(np.mean([p.dice > 0.6 for p in asked if p]))
    assert sum(figures["tvdi_points"].values()) == samples


@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 4))
def test_a_point_is_one_that_the_attacker_holds_and_says_which(seed, samples, members):
    untouched, attacked = outcomes(seed, samples, members, asked=0.5)
    for before, after, point in zip(
        untouched.samples, attacked.samples, points_for_tvdi(attacked, untouched), strict=True
    ):
        held = {KEPT: after.counts, CLEAN: before.counts}
        held |= {name: part.counts for name, part in after.by_attack.items() if part is not None}
        assert np.array_equal(held[point.name], point.counts)
        # Another name only for other voxels.
        assert point.name == KEPT or not np.array_equal(point.counts, after.counts)


@given(st.integers(0, 10**9), st.integers(1, 12))
def test_of_a_single_attack_tvdi_is_that_of_its_images(seed, samples):
    untouched, attacked = outcomes(seed, samples, 2)
    alone = Outcome("apgd", LEVEL, [score(one.sample.tile, one.counts, {}) for one in attacked.samples])
    points = points_for_tvdi(alone, untouched)
    assert [point.name for point in points] == [KEPT] * samples
    assert pooled(points) == tvdi(np.array([one.counts for one in alone.samples]))
    assert figures_of_members(alone, 0.6) == {}


def test_an_untouched_sample_with_many_false_positives_may_be_left_alone():
    before, after = found_by(1, 90, 2), found_by(0, 0, 2)
    other = found_by(50, 50, 100)
    untouched = Outcome(CLEAN, None, [score(0, before.counts, {}), score(1, other.counts, {})])
    attacked = Outcome(
        "autoattack", LEVEL, [score(0, after.counts, {"a": after}), score(1, other.counts, {"a": other})]
    )
    assert [point.name for point in points_for_tvdi(attacked, untouched)] == [CLEAN, KEPT]
    # A single attack is judged by what it returns.
    alone = Outcome("apgd", LEVEL, [score(0, after.counts, {}), score(1, other.counts, {})])
    assert [point.name for point in points_for_tvdi(alone, untouched)] == [KEPT, KEPT]


# ---- downstream


@pytest.fixture(scope="module")
def with_ensemble(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "hardened", members=MEMBERS, seed=1, cases=7)


@pytest.fixture(scope="module")
def results(with_ensemble) -> Results:
    return read_results(with_ensemble)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def ensembles(results: Results) -> list[dict[str, Any]]:
    return [item for item in results.attacked if item["attack"] == ENSEMBLE]


def test_the_choice_gains_something_here(results):
    """Otherwise the tests below would state little."""
    for item in ensembles(results):
        assert item["tvdi"] < item["tvdi_of_lowest_dice"]
        assert item["tvdi"] < min(part["tvdi"] for part in item["by_attack"].values())
        assert item["tvdi_points"].keys() > {KEPT}
        assert len({part["attacked_samples"] for part in item["by_attack"].values()}) > 1
    assert len(ensembles(results)) == 2


def test_a_single_attacks_figures_are_not_changed(results, tmp_path):
    alone = read_results(make_run(tmp_path / "alone", seed=1, cases=7))
    assert alone.attacked == [item for item in results.attacked if item["attack"] == ATTACK]
    assert all(item["tvdi"] == item["tvdi_of_lowest_dice"] for item in alone.attacked)
    assert not (tmp_path / "alone" / "members.csv").exists()


def test_intervals_classes_and_baseline_are_of_the_points_that_tvdi_is_of(results, tmp_path):
    write_baseline(baseline_of(results), tmp_path / "baseline.json")
    kept = read_baseline(tmp_path / "baseline.json").counts
    for item in results.attacked:
        key = item["attack"], item["level"]
        table = results.samples[key]
        assert tvdi(table.counts) == item["tvdi"]
        assert tvdi(units(table.cases, table.counts)[1]) == item["tvdi"]
        assert tvdi(kept[key]) == item["tvdi"]
        assert np.mean(table.dice) == pytest.approx(item["adi"], abs=1e-5)


def test_the_table_for_people_shows_both(with_ensemble, results):
    text = (with_ensemble / "table.md").read_text(encoding="utf-8")
    for item in ensembles(results):
        for name, part in item["by_attack"].items():
            figures = f"ADI {100 * part['adi']:.1f}, TVDI {100 * part['tvdi']:.1f}"
            assert f"- {name}: {figures} ({part['attacked_samples']} samples)" in text
        assert f"whose TVDI is {100 * item['tvdi_of_lowest_dice']:.1f}." in text
        others = 35 - item["tvdi_points"][KEPT]
        assert f"Of 35 samples, {others} count in the ensemble's TVDI with another of its points" in text


def test_the_report_says_what_it_is_and_shows_both(with_ensemble, results, tmp_path):
    stock = make_run(tmp_path / "stock", members=MEMBERS, cases=7, clean=0.8)
    write_report([with_ensemble, stock], tmp_path / "report", ["hardened", "stock"])
    text = (tmp_path / "report" / "tables.md").read_text(encoding="utf-8")
    assert text.count("that choice was made once, on all samples of a run, and resampling keeps it.") == 2
    assert "TVDI of lowest Dice" in text
    for item in ensembles(results):
        both = f"{100 * item['tvdi']:.1f} | {100 * item['tvdi_of_lowest_dice']:.1f} | {100 * item['adi']:.1f}"
        assert f"| hardened | {ENSEMBLE} | {item['level']} | {both} |" in text
    write_report([make_run(tmp_path / "single", cases=7)], tmp_path / "plain")
    assert "that choice" not in (tmp_path / "plain" / "tables.md").read_text(encoding="utf-8")


def test_a_member_that_was_changed_in_the_table_is_noticed(tmp_path):
    folder = make_run(tmp_path / "run", members=MEMBERS, cases=7)
    file = folder / "members.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("apgd-dice-ce", "apgd", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"members\.csv was changed after it was written"):
        read_results(folder)


def test_runs_and_baselines_of_the_kind_before_are_refused(results, tmp_path):
    """Their ensembles' TVDI meant something else, and the counts that this one is made of are not in them."""
    folder = make_run(tmp_path / "run", members=MEMBERS, cases=7)
    run_file, baseline = folder / "run.json", tmp_path / "baseline.json"
    content = json.loads(run_file.read_text(encoding="utf-8"))
    run_file.write_text(json.dumps(sealed({**content, "schema": "nnunet_ima/run/1"})), encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json is of another version \('nnunet_ima/run/1'"):
        merge(folder)
    write_baseline(baseline_of(results), baseline)
    content = json.loads(baseline.read_text(encoding="utf-8"))
    baseline.write_text(json.dumps(sealed({**content, "schema": "nnunet_ima/baseline/1"})), encoding="utf-8")
    with pytest.raises(UserError, match=r"baseline\.json is of another version \('nnunet_ima/baseline/1'"):
        read_baseline(baseline)


def test_the_tables_hold_what_the_summary_says(with_ensemble, results):
    """Slowly: every figure of an ensemble and its members from samples.csv and members.csv alone."""
    everything, of_members = rows(with_ensemble / "samples.csv"), rows(with_ensemble / "members.csv")
    for item in ensembles(results):
        here = [row for row in everything if (row["attack"], row["level"]) == (ENSEMBLE, item["level"])]
        kept, chosen = counts_of(here), counts_of(here, "tvdi_")
        assert tvdi(kept) == item["tvdi_of_lowest_dice"]
        assert tvdi(chosen) == item["tvdi"]
        names = [row["tvdi_point"] for row in here]
        assert item["tvdi_points"] == {name: names.count(name) for name in names}
        own: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
        for row in of_members:
            if (row["attack"], row["level"]) == (ENSEMBLE, item["level"]):
                own.setdefault(row["member"], {})[row["case"], row["tile"]] = row
        assert list(own) == list(item["by_attack"])
        for name, part in item["by_attack"].items():
            assert part["attacked_samples"] == len(own[name])
            assert part["adi"] == pytest.approx(np.mean([float(row["dice"]) for row in own[name].values()]), abs=1e-6)
            whole = [own[name].get((row["case"], row["tile"]), row) for row in here]
            assert part["tvdi"] == tvdi(counts_of(whole))
        for row, counts in zip(here, chosen, strict=True):
            if row["tvdi_point"] in own:
                assert np.array_equal(counts_of([own[row["tvdi_point"]][row["case"], row["tile"]]])[0], counts)


def counts_of(some: list[dict[str, str]], prefix: str = "") -> Array:
    return np.array(
        [[[float(row[f"{prefix}{kind}_{label}"]) for kind in ("tp", "fp", "fn")] for label in (1, 2)] for row in some]
    )


def test_a_run_notes_what_stands_behind_the_name_of_an_ensemble(monkeypatch):
    """So that one is not continued with other members, nor with members of another budget."""
    choice = parse_attack("autoattack:version=fast")
    before = members_of_choice(choice)
    assert before == members_of_choice(parse_attack("autoattack:version=fast"))
    assert {name: member["loss"] for name, member in before.items()} == {
        "apgd-dice-ce": "dice-ce",
        "apgd-balanced-ce": "balanced-ce",
    }
    json.dumps(before)
    monkeypatch.setitem(VERSIONS["fast"], "apgd-dice-ce", partial(APGD, loss="dice-ce", steps=51))
    assert differences(before, members_of_choice(choice)) == ["apgd-dice-ce steps: 50 there, 51 here"]
    monkeypatch.delitem(VERSIONS["fast"], "apgd-balanced-ce")
    assert any("apgd-balanced-ce" in text for text in differences(before, members_of_choice(choice)))
    assert members_of_choice(parse_attack("apgd")) is None
