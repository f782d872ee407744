"""Parts of a study become the study, whichever work folder has made which of them; of two studies none is made."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import study_join
from rows_of_studies import a_result, a_row, an_evaluation
from study_join import join, read
from study_results import table

from nnunet_ima.errors import UserError

METHODS = ("STD", "IMA", "SAT")
Rows = list[dict[str, Any]]


def a_machine(sources: str = "abcdefgh") -> dict[str, Any]:
    return {
        "device": "cpu", "processor": "A processor", "amx": True, "cores": 2, "threads": 1, "workers": 1, "jobs": 2,
        "compiled": False, "versions": {"torch": "2.15.0", "nnunetv2": "2.8.1", "nnunet_ima's sources": sources},
    }  # fmt: skip


def a_training(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "epochs": 22, "weights": "single precision", "machines": [a_machine()]}


def a_study(repetitions: int) -> Rows:
    """Each figure is another one."""
    rows = []
    for number in range(repetitions):
        for place, method in enumerate(METHODS):
            off = 0.01 * (place + len(METHODS) * number)
            clean, noted = 0.9 - off, {"seconds": 10.0, "machines": [a_machine()]}
            rows.append(
                a_row(method, number, a_training(100 + off),
                      sound_l2={**an_evaluation("sound_l2", clean, [0.8 - off, 0.5 - off, 0.3 - off]), **noted},
                      paper_l2={**an_evaluation("paper_l2", clean, [0.8 - off, 0.7 - off, 0.6 - off]), **noted})
            )  # fmt: skip
            rows[-1]["settings"] = {"num_epochs": 22, "initial_lr": 0.1, "epsilon": float(place)}
    return rows


def a_part(rows: Rows, command: str = "python benchmarks/paper_scale.py") -> dict[str, Any]:
    return {**a_result(rows), "parts": [{"command": command, "date": "2026-11-27"}]}


# ---- what is joined


@given(st.lists(st.integers(0, 3), min_size=9, max_size=9), st.permutations(range(9)))
def test_parts_in_any_order_become_the_study(where, order):
    """A part holds what it was asked for: rows of its own, in an order of its own."""
    whole = a_study(3)
    parts = [a_part([whole[place] for place in order if where[place] == number], str(number)) for number in range(4)]
    joined = join(parts)
    assert joined["parts"] == [part for one in parts for part in one["parts"]]
    assert {key: joined[key] for key in ("scale", "dataset", "network")}.items() < a_result(whole).items()
    # Method by method, and repetition by repetition, whatever the order of parts and rows.
    assert joined["rows"] == sorted(whole, key=lambda row: (METHODS.index(row["method"]), row["repetition"]))
    assert table(joined) == table(a_result(whole))


@given(st.lists(st.sampled_from(["here", "there", "both", "neither"]), min_size=6, max_size=6))
def test_of_one_training_the_evaluations_come_from_wherever_they_were_made(places):
    """A model that was carried is in both results; how long each took, and where, may differ."""
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
            if place == "both":
                other["evaluations"][name].update(seconds=20.0, machines=[a_machine("another")])
    assert join([a_part(here), a_part(there)])["rows"] == expected


def test_what_was_only_planned_in_one_part_is_what_the_other_made_of_it():
    """A command that asks for three repetitions and is stopped after the first lists all three."""
    whole = a_study(2)
    planned = copy.deepcopy(whole)
    for row in planned[len(METHODS) :]:
        row.update(training=None, evaluations=dict.fromkeys(row["evaluations"]))
    for parts in ([planned, whole[len(METHODS) :]], [whole[len(METHODS) :], planned]):
        assert table(join([a_part(rows) for rows in parts])) == table(a_result(whole))


def test_a_part_that_is_given_twice_counts_once():
    whole = a_study(2)
    here, there = a_part(whole[:3], "here"), a_part(whole[3:], "there")
    once = join([here, there])
    assert join([here, there, here]) == once
    assert join([once, there]) == once


def test_a_part_may_have_been_asked_for_fewer_evaluations():
    whole = a_study(1)
    fewer = copy.deepcopy(whole[-1])
    fewer["evaluations"] = {"sound_l2": fewer["evaluations"]["sound_l2"]}
    row = join([a_part(whole[:-1]), a_part([fewer])])["rows"][-1]
    assert row["evaluations"] == {**whole[-1]["evaluations"], "paper_l2": None}
    assert "SAT" in table(join([a_part([fewer]), a_part(whole[:-1])]))


def test_of_one_training_the_weights_that_were_attacked_count():
    """They are rounded where a model was carried on; until then it is the same one."""
    here, there = a_study(1)[:1], a_study(1)[:1]
    there[0]["training"]["weights"] = "half precision"
    here[0]["evaluations"] = dict.fromkeys(here[0]["evaluations"])
    for parts in ([here, there], [there, here]):
        assert join([a_part(rows) for rows in parts])["rows"] == there


def test_what_is_joined_stays_as_it_was():
    here, there = (a_part(rows) for rows in (a_study(1), a_study(2)))
    before = copy.deepcopy([here, there])
    join([here, there])
    assert [here, there] == before


# ---- what is refused


def of_row(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda part: change(part["rows"][1])


def of_evaluation(**changed: Any) -> Callable[[dict[str, Any]], object]:
    return of_row(lambda row: row["evaluations"]["sound_l2"].update(changed))


def of_last_result(**changed: Any) -> Callable[[dict[str, Any]], object]:
    return of_row(lambda row: row["evaluations"]["sound_l2"]["results"][-1].update(changed))


def other_figures(row: dict[str, Any]) -> None:
    row.update(copy.deepcopy(a_study(1)[1]))
    row["evaluations"]["sound_l2"]["results"][0]["tvdi"] = 0.5


def evaluated_only(row: dict[str, Any]) -> None:
    row.update(copy.deepcopy(a_study(1)[1]), training=None)


IMA, OTHER = r"IMA \(repetition 2\)", r"sound_l2 of IMA \(repetition 2\) is of other attacks, levels, samples or seeds"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "scale": (lambda part: part.update(scale="paper"), 'different studies: scale "paper" and "small"'),
    "dataset": (lambda part: part.update(dataset="Heart"), 'different studies: dataset "Heart" and "Hippocampus"'),
    "network": (lambda part: part.update(network={"features": 8}), "different studies: network"),
    "settings": (of_row(lambda row: row["settings"].update(epsilon=3.0)), f"{IMA} was trained with other settings"),
    "length": (lambda part: [row["settings"].update(initial_lr=0.01) for row in part["rows"]], "other settings than"),
    "epochs": (of_row(lambda row: row["training"].update(epochs=7)), f"{IMA} was trained for 7 epochs"),
    "trained twice": (of_row(lambda row: row.update(repetition=0)), r"IMA \(repetition 1\) was trained twice"),
    "one training as two": (
        of_row(lambda row: row.update(training={**a_study(1)[1]["training"], "weights": "half precision"})),
        r"IMA \(repetition 2\) is the training of IMA \(repetition 1\)",
    ),
    "evaluated twice": (of_row(other_figures), r"IMA \(repetition 1\) went through sound_l2 twice"),
    "of an unknown training": (of_row(evaluated_only), r"IMA \(repetition 1\) was evaluated in one part, and"),
    "samples": (of_evaluation(samples=100), OTHER),
    "seed": (of_evaluation(seed=1), OTHER),
    "seed of samples": (of_evaluation(samples_seed=4), OTHER),
    "level": (of_last_result(level="20"), OTHER),
    "attack": (of_last_result(attack="autoattack:version=standard"), OTHER),
    "fewer levels": (of_row(lambda row: row["evaluations"]["sound_l2"]["results"].pop()), OTHER),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_of_another_study_is_refused_in_any_order(change):
    other = copy.deepcopy(a_part(a_study(2)[len(METHODS) :]))
    apply, told = REFUSED[change]
    apply(other)
    with pytest.raises(UserError, match=told):
        join([a_part(a_study(1)), other])
    with pytest.raises(UserError):
        join([other, a_part(a_study(1))])


def test_methods_that_were_not_trained_alike_are_refused():
    rows = a_study(1)
    longer = copy.deepcopy(rows[1])
    longer["settings"]["num_epochs"] = longer["training"]["epochs"] = 50
    with pytest.raises(UserError, match=r"IMA \(repetition 1\) was not trained alike: its length"):
        join([a_part(rows[:1]), a_part([longer])])


def test_settings_of_what_was_only_planned_are_compared_too():
    """Else the joined row would say that they are those of the training."""
    here, there = a_study(1), a_study(1)
    here[1].update(training=None, evaluations={})
    there[1]["settings"]["epsilon"] = 9.0
    for parts in ([here, there], [there, here]):
        with pytest.raises(UserError, match="other settings"):
            join([a_part(rows) for rows in parts])


# ---- the program


def written(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir()
    file = folder / "paper_scale_small.json"
    file.write_text(json.dumps(result))
    return file


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study_join.py", *map(str, arguments)])
    study_join.main()


def test_files_become_a_file_and_its_table(tmp_path, monkeypatch, capsys):
    whole = a_study(3)
    whole[-1]["training"]["machines"] = [a_machine("12345678")]
    files = [written(tmp_path / str(place), a_part(whole[place : place + 3])) for place in (0, 3, 6)]
    call(monkeypatch, *files, "--results", tmp_path / "joined")
    found = json.loads((tmp_path / "joined" / "paper_scale_small.json").read_text())
    assert len(found["rows"]) == 9
    text = (tmp_path / "joined" / "paper_scale_small.md").read_text()
    assert text == table(found) == table(a_result(whole))
    assert "± standard deviation of 3 trainings" in text
    printed = capsys.readouterr().out
    assert text in printed
    # Who joins what other versions have made is told so.
    assert "our sources abcdefg: 8 trainings, 18 evaluations." in printed
    assert "our sources 1234567: 1 training." in printed


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "cannot be read"), ("[]", "is no result"), ('{"rows": []}', "is no result"), (None, "cannot be read")],
)
def test_a_file_that_is_no_result_is_told_in_a_sentence_and_nothing_is_written(tmp_path, monkeypatch, content, told):
    file = written(tmp_path / "here", a_part(a_study(1)))
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit, match=told) as ended:
        call(monkeypatch, file, other, "--results", tmp_path / "joined")
    assert str(other) in str(ended.value)
    assert not (tmp_path / "joined").exists()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything in a result that tables and pages are made of."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, part in items for place in places(part, (*path, key))]


@given(st.data(), st.sampled_from([None, "text", -1, 81.0, float("nan"), [], {}, "gone"]))
def test_a_damaged_file_is_read_as_what_it_says_or_refused_in_a_sentence(tmp_path_factory, data, instead):
    part = a_part(a_study(1)[:2])
    *path, last = data.draw(st.sampled_from(places(part)))
    holder: Any = part
    for key in path:
        holder = holder[key]
    if instead == "gone":
        del holder[last]
    else:
        holder[last] = instead
    file = tmp_path_factory.mktemp("damaged") / "paper_scale_small.json"
    file.write_text(json.dumps(part))
    found = result_or_refusal(file)
    if isinstance(found, str):
        assert str(file) in found
    else:
        # Whatever is taken can be joined and shown.
        assert table(join([found]))


def result_or_refusal(file: Path) -> dict[str, Any] | str:
    try:
        return read(file)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("figure", [80.9, -0.1, float("nan")])
@pytest.mark.parametrize("where", ["clean", "clamp_only", "results"])
def test_a_dice_that_is_none_is_refused(tmp_path, figure, where):
    part = a_part(a_study(1))
    holder = part["rows"][1]["evaluations"]["paper_l2"][where]
    (holder[-1] if where == "results" else holder)["tvdi"] = figure
    with pytest.raises(UserError, match="is damaged"):
        read(written(tmp_path / "here", part))


def test_what_was_there_stays_if_nothing_can_be_joined_or_written(tmp_path, monkeypatch):
    results = tmp_path / "results"
    good = written(results, a_part(a_study(1)))
    (results / "paper_scale_small.md").write_text("its table")
    before = good.read_bytes()
    damaged = a_part(a_study(2)[3:])
    del damaged["rows"][0]["evaluations"]["sound_l2"]["trusted"]
    with pytest.raises(SystemExit, match="is damaged"):
        call(monkeypatch, good, written(tmp_path / "damaged", damaged), "--results", results)
    assert (good.read_bytes(), (results / "paper_scale_small.md").read_text()) == (before, "its table")
    with pytest.raises(SystemExit, match="cannot take the results"):
        call(monkeypatch, good, "--results", good)
    (tmp_path / "taken" / "paper_scale_small.md").mkdir(parents=True)
    with pytest.raises(SystemExit, match="cannot take the results"):
        call(monkeypatch, good, "--results", tmp_path / "taken")
    assert not (tmp_path / "taken" / "paper_scale_small.json").exists()
