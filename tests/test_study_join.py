"""Parts of a study become the study, whichever work folder has made which of them; of two studies none is made."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import study_join
from rows_of_studies import a_result, a_row, an_evaluation
from study_join import join
from study_results import table

from nnunet_ima.errors import UserError

METHODS = ("STD", "IMA", "SAT")


def a_training(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "epochs": 22, "machines": []}


def a_study(repetitions: int) -> list[dict[str, Any]]:
    """Each figure is another one."""
    rows = []
    for number in range(repetitions):
        for place, method in enumerate(METHODS):
            off = 0.01 * (place + len(METHODS) * number)
            rows.append(
                a_row(method, number, a_training(100 + off),
                      sound_l2=an_evaluation("sound_l2", 0.9 - off, [0.8 - off, 0.5 - off, 0.3 - off]),
                      paper_l2=an_evaluation("paper_l2", 0.9 - off, [0.8 - off, 0.7 - off, 0.6 - off]))
            )  # fmt: skip
    return rows


def as_dict(row: dict[str, Any]) -> tuple[str, int]:
    return row["method"], row["repetition"]


@given(st.lists(st.integers(0, 3), min_size=9, max_size=9), st.permutations(range(9)))
def test_parts_in_any_order_become_the_study(where, order):
    """A part holds what it was asked for: rows of its own, in an order of its own."""
    whole = a_study(3)
    parts = [a_result([whole[place] for place in order if where[place] == number]) for number in range(4)]
    joined = join(parts)
    assert {as_dict(row): row for row in joined["rows"]} == {as_dict(row): row for row in whole}
    assert len(joined["rows"]) == len(whole)
    assert [row["repetition"] for row in joined["rows"]] == sorted(row["repetition"] for row in whole)
    assert joined["parts"] == [part for one in parts for part in one["parts"]]
    # The figures are those of the whole, whatever the order of the lines.
    lines = table(a_result(whole)).splitlines()
    assert sorted(table(joined).splitlines()) == sorted(lines)


@given(st.lists(st.sampled_from(["here", "there", "both", "neither"]), min_size=6, max_size=6))
def test_of_one_training_the_evaluations_come_from_wherever_they_were_made(places):
    """A model that was carried is in both results, one of which may not have its training yet."""
    whole, kept = a_study(1), iter(places)
    here, there, expected = (copy.deepcopy(whole) for _ in range(3))
    for mine, other, both in zip(here, there, expected, strict=True):
        for name in ("sound_l2", "paper_l2"):
            place = next(kept)
            if place in ("there", "neither"):
                mine["evaluations"][name] = None
            if place in ("here", "neither"):
                other["evaluations"][name] = None
            if place == "neither":
                both["evaluations"][name] = None
    there[0]["training"] = None
    assert join([a_result(here), a_result(there)])["rows"] == expected
    assert join([a_result(there), a_result(here)])["rows"] == expected


def test_what_is_joined_stays_as_it_was():
    here, there = (a_result(rows) for rows in (a_study(1), a_study(2)))
    before = copy.deepcopy([here, there])
    join([here, there])
    assert [here, there] == before


def changed(change: str) -> dict[str, Any]:
    """Another part: the second repetition of the study, with something that is not the study's."""
    result = copy.deepcopy(a_result(a_study(2)[len(METHODS) :]))
    row = result["rows"][1]
    found = row["evaluations"]["sound_l2"]
    if change == "scale":
        result["scale"] = "paper"
    elif change == "dataset":
        result["dataset"] = "Heart"
    elif change == "settings":
        row["settings"] = {"epsilon": 3.0}
    elif change == "trained twice":
        row["repetition"] = 0
    elif change == "evaluated twice":
        row.update(copy.deepcopy(a_study(1)[1]))
        row["evaluations"]["sound_l2"]["results"][0]["tvdi"] = 0.5
    elif change == "level":
        found["results"][-1]["level"] = "20"
    elif change == "attack":
        found["results"][-1]["attack"] = "autoattack:version=standard"
    elif change == "fewer levels":
        del found["results"][-1]
    else:
        found[change] += 1
    return result


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("scale", "different studies: scale paper and small"),
        ("dataset", "different studies: dataset Heart and Hippocampus"),
        ("settings", "IMA, repetition 2, was trained with other settings than IMA, repetition 1,"),
        ("trained twice", "IMA, repetition 1, was trained twice"),
        ("evaluated twice", "IMA, repetition 1, went through sound_l2 twice"),
        *((change, "sound_l2 of IMA, repetition 2, is of other attacks, levels, samples or seeds than of STD, repet")
          for change in ("level", "attack", "fewer levels", "samples", "seed", "samples_seed")),
    ],
)  # fmt: skip
def test_what_is_of_another_study_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        join([a_result(a_study(1)), changed(change)])


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    file = folder / "paper_scale_small.json"
    file.write_text(json.dumps(a_result(rows)))
    return file


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study_join.py", *map(str, arguments)])
    study_join.main()


def test_files_become_a_file_and_its_table(tmp_path, monkeypatch):
    whole = a_study(2)
    files = [written(tmp_path / "here", whole[:3]), written(tmp_path / "there", whole[3:])]
    call(monkeypatch, *files, "--results", tmp_path / "joined")
    found = json.loads((tmp_path / "joined" / "paper_scale_small.json").read_text())
    assert found["rows"] == whole
    text = (tmp_path / "joined" / "paper_scale_small.md").read_text()
    assert text == table(found)
    assert "± standard deviation of 2 trainings" in text


@pytest.mark.parametrize(
    ("content", "told"), [("{", "cannot be read"), ("[]", "is no result"), ('{"rows": []}', "is no result"), (None, "")]
)
def test_a_file_that_is_no_result_is_told_in_a_sentence_and_nothing_is_written(tmp_path, monkeypatch, content, told):
    file = written(tmp_path / "here", a_study(1))
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, file, other, "--results", tmp_path / "joined")
    assert str(other) in str(ended.value)
    assert told in str(ended.value)
    assert not (tmp_path / "joined").exists()
