"""The study's tables and page: each figure where it belongs, beside the published one, and the page up to date."""

from __future__ import annotations

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paper_scale
import study_page
from rows_of_studies import ATTACK, LEVELS, NOISE, a_result, a_row, an_evaluation
from study_results import ORDER, _evaluation, _training, table

from nnunet_ima.evaluation.pipeline import Attacks
from nnunet_ima.settings import KEY


def lines_of(text: str, heading: str) -> dict[str, list[str]]:
    """The table under the paragraph that holds ``heading``: cells by the name in the first column."""
    _, _, rest = text.partition(heading)
    block = rest.split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in block.splitlines()]
    return {row[0]: row[1:] for row in rows}


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, st.lists(shares, min_size=3, max_size=3)), min_size=1, max_size=4))
def test_a_cell_is_the_mean_over_repetitions_and_the_last_one_that_of_a_row(found):
    rows = [
        a_row("IMA", number, sound_l2=an_evaluation("sound_l2", clean, values))
        for number, (clean, values) in enumerate(found)
    ]
    cells = lines_of(table(a_result(rows)), f"`{ATTACK}`, protocol `sound`, L2")["IMA"]
    columns = [[clean for clean, _ in found], *([values[place] for _, values in found] for place in range(3))]
    columns.append([statistics.fmean([clean, *values]) for clean, values in found])
    for cell, column in zip(cells, columns, strict=True):
        mean, _, spread = cell.partition(" ± ")
        assert float(mean) == pytest.approx(100 * statistics.fmean(column), abs=0.0501)
        assert bool(spread) == (len(found) > 1)
        assert not spread or float(spread) == pytest.approx(100 * statistics.stdev(column), abs=0.0501)


def test_a_method_that_was_trained_less_often_than_the_others_says_so():
    rows = [a_row("STD", number, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0])) for number in range(3)]
    rows += [a_row("TE", number, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0])) for number in range(2)]
    text = table(a_result(rows))
    assert f"`{ATTACK}`, protocol `sound`, L2, 200 validation slices, TVDI in %, mean ± standard deviation of 3" in text
    assert {"STD", "TE, 2 of 3"} < lines_of(text, f"`{ATTACK}`, protocol `sound`, L2").keys()
    # One of each is no mean, and has no deviation.
    text = table(a_result([row for row in rows if not row["repetition"]]))
    assert "deviation" not in text
    assert {"STD", "TE"} < lines_of(text, f"`{ATTACK}`, protocol `sound`, L2").keys()


def test_published_figures_stand_below_with_their_protocol():
    rows = [a_row("STD", 0, sound_l2=an_evaluation("sound_l2", 0.87, [0.2, 0.1, 0.0]),
                  paper_l2=an_evaluation("paper_l2", 0.87, [0.6, 0.5, 0.4]),
                  sound_linf=an_evaluation("sound_linf", 0.87, [0.5]))]  # fmt: skip
    text = table(a_result(rows))
    sound = lines_of(text, f"`{ATTACK}`, protocol `sound`, L2")
    # The earlier version's Table 7.
    (ima,) = (cells for name, cells in sound.items() if name.startswith("*IMA"))
    assert ima == ["82.2", "72.5", "56.3", "32.0", "60.7"]
    paper = lines_of(text, f"`{ATTACK}`, protocol `paper`, L2")
    (ima,) = (cells for name, cells in paper.items() if name.startswith("*IMA"))
    assert ima == ["85.9", "", "78.0", "70.5", "30.3", "66.2"]
    assert paper["STD"] == ["87.0", "86.0", "60.0", "50.0", "40.0", "59.2"]
    noise = lines_of(text, f"`{NOISE}`, protocol `paper`, L2")
    (ima,) = (cells for name, cells in noise.items() if name.startswith("*IMA"))
    assert ima[2:] == ["82.2", "81.7", "80.4", "82.5"]
    assert text.count("In italics, published: ") == 3
    # Of what the paper has no figures there are none.
    for heading in (f"`{NOISE}`, protocol `sound`, L2", f"`{ATTACK}`, protocol `sound`, Linf"):
        assert {"method", "---", "STD"} == lines_of(text, heading).keys()
    assert "*" not in table(a_result(rows, dataset="Spleen"))


def test_linf_of_the_papers_protocol_stands_beside_table_3():
    found = an_evaluation("paper_linf", 0.87, [0.7, 0.6, 0.5, 0.4, 0.3])
    text = table(a_result([a_row("STD", 0, paper_linf=found)]))
    attacked, noise = (lines_of(text, f"`{attack}`, protocol `paper`, Linf") for attack in (ATTACK, NOISE))
    # Each at its own levels: 2, 4, 8 and 8, 16, 32 of 255.
    assert attacked["*TRADES*"] == ["83.6", "", "73.4", "71.5", "67.0", "–", "–", "–"]
    assert noise["*TRADES*"] == ["83.6", "", "–", "–", "76.1", "76.1", "75.6", "–"]
    assert attacked["STD"] == ["87.0", "86.0", "70.0", "60.0", "50.0", "40.0", "30.0", "56.2"]


def test_what_is_not_to_be_trusted_is_marked_and_what_is_missing_left_out():
    rows = [
        a_row("STD", 0, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0], trusted=False)),
        a_row("IMA", 0),
    ]
    text = table(a_result(rows))
    found = lines_of(text, f"`{ATTACK}`, protocol `sound`, L2")
    assert [name for name in found if "*" not in name] == ["method", "---", "STD, not to be trusted"]
    assert "protocol `paper`" not in text
    assert "Trainings" not in text


def test_a_method_is_doubted_if_any_of_its_runs_is():
    rows = [a_row("STD", number, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0], trusted=number != 1))
            for number in range(3)]  # fmt: skip
    assert "STD, not to be trusted" in lines_of(table(a_result(rows)), f"`{ATTACK}`, protocol `sound`, L2")


def test_methods_stand_in_one_order_in_every_table():
    """Whichever came first, and whichever lacks something."""
    mixed = ("ours", *reversed(ORDER[1:]), "STD")
    rows = [a_row(method, 0, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0]),
                  sound_linf=an_evaluation("sound_linf", 0.9, [0.5]) if method != "IMA" else None)
            for method in mixed]  # fmt: skip
    rows.append(a_row("IMA", 1, sound_linf=an_evaluation("sound_linf", 0.9, [0.5])))
    text = table(a_result(rows, dataset="Spleen"))
    for heading in (f"`{ATTACK}`, protocol `sound`, L2", f"`{ATTACK}`, protocol `sound`, Linf"):
        found = [name.partition(",")[0] for name in lines_of(text, heading)]
        assert found == ["method", "---", *ORDER, "ours"]


def test_every_method_has_its_place_and_its_colour():
    methods = {*paper_scale.METHODS, *paper_scale.VARIANTS}
    assert sorted(ORDER) == sorted(methods)
    assert set(study_page.COLOURS) == methods
    assert len(set(study_page.COLOURS.values())) == len(methods)
    # A variant stands behind what it is a variant of, or another one of that.
    assert [name for name in ORDER if name in paper_scale.METHODS] == ["STD", "IMA", "SAT", "TRADES", "TE"]
    for before, name in pairwise(ORDER):
        assert name in paper_scale.METHODS or before.partition("-")[0] == name.partition("-")[0]


@given(st.lists(shares, min_size=1, max_size=4))
def test_what_the_clamp_alone_leaves_is_a_mean_too(found):
    rows = [a_row("IMA", number, paper_l2=an_evaluation("paper_l2", clean, [0.5, 0.4, 0.3]))
            for number, clean in enumerate(found)]  # fmt: skip
    cell = lines_of(table(a_result(rows)), f"`{ATTACK}`, protocol `paper`, L2")["IMA"][1]
    assert float(cell.partition(" ± ")[0]) == pytest.approx(100 * statistics.fmean(found) - 1, abs=0.0501)


def test_another_search_than_autoattack_has_no_published_rows_of_autoattack():
    found = an_evaluation("paper_l2", 0.9, [0.5, 0.4, 0.3])
    for result in found["results"]:
        result["attack"] = result["attack"].replace(ATTACK, "pgd:steps=1")
    text = table(a_result([a_row("STD", 0, paper_l2=found)]))
    assert {"method", "---", "STD"} == lines_of(text, "`pgd:steps=1`, protocol `paper`, L2").keys()


def test_how_long_evaluations_took_is_told_of_those_that_know():
    found = an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0])
    rows = [
        a_row("STD", number, sound_l2={**found, "seconds": seconds}) for number, seconds in enumerate((60, 80, 300))
    ]
    rows.append(a_row("IMA", 0, sound_l2=found))
    assert lines_of(table(a_result(rows)), "Evaluations, seconds a model")["sound, l2"] == ["3", "60", "80", "300"]


def test_trainings_are_compared_with_stock_trainings_on_machines_of_the_same_kind():
    def trained(seconds: float, **machine: Any) -> dict[str, Any]:
        return {"seconds": seconds, "epochs": 22, "machines": [{**A_MACHINE, **machine}], "passes_per_sample": [9.0]}

    rows = [
        a_row("STD", 0, trained(100.0)), a_row("IMA", 0, trained(600.0, jobs=1)),
        a_row("STD", 1, trained(10.0, device="A GPU")), a_row("IMA", 1, trained(50.0, device="A GPU")),
        a_row("IMA", 2, trained(50.0, device="Another GPU")),
    ]  # fmt: skip
    cells = lines_of(table(a_result(rows)), "Trainings, in epochs")
    assert [cells[name][2] for name in ("STD 1", "IMA 1", "STD 2", "IMA 2", "IMA 3")] == [
        "1.0",
        "6.0",
        "1.0",
        "5.0",
        "",
    ]


def test_trainings_are_compared_with_the_mean_stock_training():
    stock = {"seconds": 100.0, "epochs": 22}
    ima = {"seconds": 450.0, "epochs": 22, "attacks_in": "bfloat16", "passes_per_sample": [3.0, 9.5],
           "margin_10": [0.0, 1.0], "margin_50": [0.0, 4.0], "margin_90": [0.0, 12.0]}  # fmt: skip
    rows = [a_row("STD", 0, stock), a_row("IMA", 0, ima), a_row("STD", 1, {**stock, "seconds": 200.0})]
    cells = lines_of(table(a_result(rows)), "Trainings, in epochs")
    assert cells["IMA 1"] == ["22", "450", "3.0", "bfloat16", "6.2", "9.5", "1.0 / 4.0 / 12.0"]
    assert cells["STD 2"] == ["22", "200", "1.3", "", "1.0", "1.0"]
    uncounted = lines_of(table(a_result([a_row("SAT", 0, stock)])), "Trainings, in epochs")
    assert "1.0" not in uncounted["SAT"]


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        ({}, None),
        ({"attacks_mixed": None}, "float32"),
        ({"attacks_mixed": False, "attacks_mixed_in": "bfloat16"}, "float32"),
        ({"attacks_mixed": True, "attacks_mixed_in": "bfloat16"}, "bfloat16"),
        ({"attacks_mixed": True}, "float16"),
    ],
)
def test_a_row_says_in_which_precision_attacks_ended(tmp_path, noted, told):
    log = {"epoch_start_timestamps": [0.0, 10.0], "epoch_end_timestamps": [4.0, 15.0], "correct_share": [0.25, 0.5]}
    torch.save({"logging": log, "init_args": {KEY: noted}}, tmp_path / "checkpoint_final.pth")
    found = _training(tmp_path / "checkpoint_final.pth")
    assert found is not None
    assert found["seconds"] == 9.0
    assert found["correct_share"] == [0.25, 0.5]
    assert found.get("attacks_in") == told


def test_the_page_holds_what_the_results_say():
    """After new results: ``python benchmarks/study_page.py``."""
    page = study_page.PAGE.read_text(encoding="utf-8")
    for scale in study_page.SCALES:
        assert study_page.filled(page, scale, study_page.section(study_page.read(scale), scale)) == page


def test_a_page_keeps_what_is_written_around_the_tables():
    page = study_page.PAGE.read_text(encoding="utf-8")
    rows = [a_row("STD", 0, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0]))]
    filled = study_page.filled(page, "paper", study_page.section(a_result(rows), "paper"))
    assert "| STD | 90.0 | 20.0 |" in filled
    assert study_page.filled(filled, "paper", study_page.section(study_page.read("paper"), "paper")) == page
    with pytest.raises(ValueError, match="has no marks"):
        study_page.filled("a page", "paper", "text")


def test_the_picture_shows_every_method_and_evaluation_with_its_spread(tmp_path, monkeypatch):
    rows = [
        a_row(method, number, sound_l2=an_evaluation("sound_l2", 0.9, [value + 0.2 * number, 0.1, 0.0]))
        for method, value in (("STD", 0.2), ("IMA", 0.6))
        for number in range(2)
    ]
    rows.append(a_row("TE", 0, sound_l2=an_evaluation("sound_l2", 0.8, [0.5, 0.1, 0.0], trusted=False)))
    rows.append(a_row("SAT", 0, sound_linf=an_evaluation("sound_linf", 0.8, [0.5])))
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    study_page.draw(a_result(rows), tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["sound, L2", "sound, Linf"]
    drawn = {bars.get_label(): bars for panel in panels for bars in panel.containers}
    assert drawn.keys() == {text.get_text() for text in panels[-1].get_legend().get_texts()}
    assert drawn.keys() == {"STD", "IMA", "SAT", "TE, 1 of 2, not to be trusted"}
    assert drawn["IMA"][0].get_ydata().tolist() == pytest.approx([90, 70, 10, 0])
    # From 6 and 8 tenths: a standard deviation of sqrt(2) tenths, up and down.
    (bars,) = drawn["IMA"][2]
    lengths = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert lengths == pytest.approx([0, 2 * 100 * 0.1 * 2**0.5, 0, 0], abs=1e-6)
    # What nobody knows is not drawn as nothing.
    assert not drawn["TE, 1 of 2, not to be trusted"].has_yerr


def test_a_picture_shows_the_margins_of_each_training_that_has_some(tmp_path, monkeypatch):
    margins = {"seconds": 1.0, "epochs": 2, "margin_mean": [2.0, 3.5], "margin_histogram": [1, 0, 3]}
    later = {**margins, "margin_mean": [2.0, 2.5, 4.0], "margin_histogram": [0, 5, 0]}
    rows = [
        a_row("STD", 0, {"seconds": 1.0, "epochs": 2}),
        a_row("IMA-single", 0, later),
        a_row("IMA", 1, margins),
        a_row("IMA", 0, margins),
    ]
    text = study_page.section(a_result(rows), "small")
    assert text.endswith(f"{study_page.MARGINS}\n\n![Margins of each training](pictures/study_small_margins.png)")
    assert "margins.png" not in study_page.section(a_result(rows[:1]), "small")
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    study_page.draw_margins(a_result(rows), tmp_path / "margins.png")
    assert (tmp_path / "margins.png").stat().st_size > 5000
    growth, spread = figures[0].axes
    assert [line.get_ydata().tolist() for line in growth.lines] == [[2.0, 3.5], [2.0, 3.5], [2.0, 2.5, 4.0]]
    assert growth.lines[2].get_xdata().tolist() == [1, 2, 3]
    assert [text.get_text() for text in growth.get_legend().get_texts()] == ["IMA", "IMA-single"]
    steps = [patch.get_data() for patch in spread.patches]
    assert [values.values.tolist() for values in steps] == [[0.25, 0, 0.75], [0.25, 0, 0.75], [0, 1, 0]]
    assert steps[0].edges == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert {line.get_color() for line in growth.lines[:2]} == {study_page.COLOURS["IMA"]}


def test_nothing_is_written_if_the_results_of_a_scale_are_of_another(tmp_path, monkeypatch):
    rows = [a_row("STD", 0, sound_l2=an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0]))]
    page = study_page.PAGE.read_text(encoding="utf-8")
    for name in ("RESULTS", "PICTURES"):
        monkeypatch.setattr(study_page, name, tmp_path)
    monkeypatch.setattr(study_page, "PAGE", tmp_path / "study.md")
    (tmp_path / "study.md").write_text(page, encoding="utf-8")
    for scale in study_page.SCALES:
        (tmp_path / f"paper_scale_{scale}.json").write_text(json.dumps({**a_result(rows), "scale": "paper"}))
    monkeypatch.setattr(sys, "argv", ["study_page.py"])
    with pytest.raises(ValueError, match="is of the scale paper"):
        study_page.main()
    assert (tmp_path / "study.md").read_text(encoding="utf-8") == page
    assert not list(tmp_path.glob("*.png"))
    monkeypatch.setattr(sys, "argv", ["study_page.py", "--scales", "paper"])
    study_page.main()
    assert "| STD | 90.0 | 20.0 |" in (tmp_path / "study.md").read_text(encoding="utf-8")
    assert (tmp_path / "study_paper.png").is_file()


def test_a_study_that_was_only_begun_has_no_picture():
    """As after the first minutes on a machine that is lent."""
    text = study_page.section(a_result([a_row("STD", 0), a_row("IMA", 0)]), "paper")
    assert "![" not in text
    assert "benchmarks/paper_scale.py" in text


def write_summary(folder: Path, **other: Any) -> None:
    """Of an evaluation of all samples."""
    clean = {"n_samples": 3, "tvdi": 0.9, "adi": 0.8}
    summary = {**an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0]), "clean": clean, "max_samples": None, **other}
    del summary["clamp_only"]
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("asked", "counts"), [([], False), (["--max-samples", "200"], True), (["--max-samples", "100"], False)]
)
def test_an_evaluation_of_another_number_of_samples_is_none_of_this_study(tmp_path, asked, counts):
    """A table has one number of slices in its heading."""
    write_summary(tmp_path, max_samples=200)
    further = ["--no-cases", *asked]
    found = _evaluation(tmp_path, Attacks("sound_l2", LEVELS["sound_l2"], (NOISE, ATTACK), further=further))
    assert (found is not None) == counts
    assert found is None or (found["seed"], found["samples_seed"]) == (0, 3)


A_MACHINE = {
    "device": "cpu", "processor": "A processor", "amx": True, "cores": 2, "threads": 1, "workers": 1, "jobs": 2,
    "compiled": False, "versions": {"torch": "2.15.0", "nnunetv2": "2.8.1"},
}  # fmt: skip


def test_the_page_says_on_which_machines_and_with_which_seeds_figures_were_made():
    gpu = {**A_MACHINE, "device": "A GPU", "cores": 16, "workers": 7, "compiled": True}
    training = {"seconds": 100.0, "epochs": 22, "weights": "single precision"}
    found = an_evaluation("sound_l2", 0.9, [0.2, 0.1, 0.0])
    rows = [
        a_row("STD", 0, {**training, "machines": [A_MACHINE]}, sound_l2={**found, "machines": [A_MACHINE]}),
        a_row("IMA", 0, {**training, "machines": [A_MACHINE, gpu]}, sound_l2={**found, "machines": []}),
    ]
    rows[1]["training"]["weights"] = "half precision"
    result = a_result(rows)
    result["parts"].append({"command": "python elsewhere.py", "date": "2026-11-27"})
    text = study_page.section(result, "small")
    assert text.startswith(
        "- `python benchmarks/paper_scale.py`, 2026-11-26.\n- `python elsewhere.py`, 2026-11-27.\n- On"
    )
    assert "rounded before anything was measured, to half precision: 1." in text
    cpu = "On A processor with AMX, 2 cores, 1 thread, 1 worker, 2 models at once, torch 2.15.0, nnU-Net 2.8.1"
    assert f"{cpu}: 2 trainings (1 in part), 1 evaluation." in text
    assert "On A GPU (A processor with AMX), 16 cores, 1 thread, 7 workers, 2 models at once, compiled," in text
    assert "nnU-Net 2.8.1: 1 training (1 in part)." in text
    assert "On a machine that was not noted: 1 evaluation." in text
    assert "Seed of the attacks: 0; of the choice of samples: 3." in text


@pytest.mark.parametrize(
    ("asked", "counts"), [((NOISE, ATTACK), True), ((NOISE, "autoattack:version=standard"), False)]
)
def test_an_evaluation_of_other_attacks_is_none_of_this_study(tmp_path, asked, counts):
    """A study that is started again with another attack makes its own evaluations; until then they are missing."""
    write_summary(tmp_path)
    found = _evaluation(tmp_path, Attacks("sound_l2", LEVELS["sound_l2"], asked))
    assert (found is not None) == counts
    assert _evaluation(tmp_path, Attacks("sound_l2", ("5", "10"), (NOISE, ATTACK))) is None
    assert _evaluation(tmp_path / "none", Attacks("sound_l2", ("5",), (NOISE,))) is None
