"""The report: what it says, its tables, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_of_runs import ATTACK, CT, CT_WORDS, ENSEMBLE, MASKED, MASKED_WORDS, NOISE, Z_SCORED, make_run

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.command_line import _parser, main
from nnunet_ima.evaluation.environment import trainers_folder
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.outcomes import LOTS_KEPT, SampleKey, SampleScore, drawn_by_lot
from nnunet_ima.evaluation.report import write_report
from nnunet_ima.evaluation.report.attacks_run import same_attack
from nnunet_ima.evaluation.report.charts import axis_around
from nnunet_ima.evaluation.report.drawings import drawings_of
from nnunet_ima.evaluation.report.figures import Order, Setting, colours_of, settings_of
from nnunet_ima.evaluation.report.pictures import perturbation
from nnunet_ima.evaluation.report.published import paper_task, published_attack, published_for
from nnunet_ima.evaluation.report.repeat import settings_of_run, without_parts
from nnunet_ima.evaluation.report.report import _page, _titles
from nnunet_ima.evaluation.report.sentences import evidence, headline, left_out, price, unit_warning
from nnunet_ima.evaluation.report.tables import (
    Cell,
    Table,
    _signed,
    as_latex,
    as_markdown,
    case_table,
    class_spread_table,
    difference_table,
    further_table,
    published_tables,
    robustness_table,
)
from nnunet_ima.evaluation.report.trainings import TRAININGS, trainings_of
from nnunet_ima.evaluation.results import UNTOUCHED, Results, read_results
from nnunet_ima.evaluation.statistics import holm
from nnunet_ima.evaluation.summary import nothing_learned

MARGINS = {"margin_10": [1.0, 1.5, 2.0], "margin_50": [2.0, 3.0, 4.0], "margin_90": [3.0, 5.0, 7.0]}
PAPERS = Path(__file__).parents[2] / "shared" / "papers"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A fragile and a hardened model, in both norms."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for norm, levels in (("l2", ("5", "10", "15")), ("linf", ("1/255", "2/255", "4/255"))):
        for title, clean, dice in (
            ("nnUNetTrainer", 0.9, (0.5, 0.3, 0.1)),
            ("nnUNetTrainerIMA", 0.88, (0.8, 0.7, 0.6)),
        ):
            attacked = dict(zip(levels, dice, strict=True))
            noise = dict.fromkeys(levels, 0.85)
            margins = MARGINS if "IMA" in title else None
            folder = root / f"{title}_{norm}"
            made.append(make_run(folder, clean=clean, attacked=attacked, noise=noise, title=title, norm=norm,
                                 margins=margins, seed=len(title)))  # fmt: skip
    return made


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("report") / "out")


class Text(HTMLParser):
    """What a reader sees, and whether every tag is closed."""

    VOID = ("meta", "img", "input", "br", "circle", "line", "polyline", "polygon")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


# ---- what it says


def figures_of(page: Path, kind: str) -> list[list[tuple[str, str]]]:
    """Of each row of pictures of a kind: the model and the sample that each caption names."""
    rows = re.findall(
        rf'<div class="{kind}">(.*?)</div>\n(?=<div|<h3|</section)', page.read_text(encoding="utf-8"), re.S
    )
    return [re.findall(r"<figcaption><b>(.*?)</b>, (.*?): Dice", row) for row in rows]


def test_every_model_is_shown_on_the_same_samples(page, runs):
    rows = figures_of(page, "same")
    assert len(rows) == LOTS_KEPT * 2  # norms
    for row in rows:
        assert [model for model, _ in row] == ["nnUNetTrainer", "IMA"]
        assert len({sample for _, sample in row}) == 1
    # Not those that one of them lost most on.
    drawn = [f"{case}, tile {tile}" for case, tile in (score.sample for score in drawn_by_lot(scores_of(runs[0])))]
    assert [row[0][1] for row in rows] == drawn * 2


def scores_of(run: Path) -> list[SampleScore]:
    table = read_results(run).samples[UNTOUCHED]
    rows = zip(table.cases.tolist(), table.tiles.tolist(), table.counts, strict=True)
    return [SampleScore(SampleKey(case, tile), counts, 1, 1, 0, 0, 1) for case, tile, counts in rows]


def test_that_a_model_has_not_learned_its_task_is_said_on_the_page_and_in_its_own_table(tmp_path):
    said = "ithout any attack none of the 40 attacked samples has a Dice above 60 %, and TVDI is"
    bad, good = (make_run(tmp_path / name, title=name, clean=clean) for name, clean in (("Bad", 0.3), ("Good", 0.9)))
    tvdi = 100 * read_results(bad).figures(UNTOUCHED)["tvdi"]
    own, other = ((folder / "table.md").read_text(encoding="utf-8") for folder in (bad, good))
    assert f"**W{said} {tvdi:.1f} %: this model has not learned its task" in own
    assert said not in other
    content = write_report([bad, good], tmp_path / "out").read_text(encoding="utf-8")
    warning = content[content.index('<aside class="warning"') : content.index("</aside>")]
    assert f"Bad: w{said}" in warning
    assert "Good" not in warning


@pytest.mark.parametrize(
    ("clean", "nothing"),
    [
        ({"robust_share": 0.0, "tvdi": 0.5}, True),
        ({"robust_share": 0.0, "tvdi": None}, True),
        # Few samples, all of them hard ones: none is correct, but the model is no failure.
        ({"robust_share": 0.0, "tvdi": 0.7}, False),
        ({"robust_share": 0.1, "tvdi": 0.5}, False),
        ({"robust_share": 0.0, "tvdi": 0.5, "n_samples": 0}, False),
    ],
)
def test_of_a_model_whose_tvdi_is_good_or_of_which_a_sample_is_correct_it_is_not_said(clean, nothing):
    criterion = {"dice_threshold": 0.6, "dice_reduction": "mean"}
    assert nothing_learned({"clean": {"n_samples": 3, **clean}, "criterion": criterion}) is nothing


def test_a_model_that_learned_nothing_beats_none_and_is_beaten_by_none(tmp_path):
    """A constant network loses nothing under attack, where a good one may fall to 0."""
    made = {
        title: make_run(tmp_path / title, title=title, clean=clean, attacked={"5": dice, "8": dice}, seed=number)
        for number, (title, clean, dice) in enumerate(
            (("SAT", 0.26, 0.25), ("STD", 0.9, 0.0), ("IMA", 0.88, 0.2), ("TE", 0.3, 0.1))
        )
    }
    # One that did other attacks on other samples does not keep the others from being compared, either.
    fewer = make_run(tmp_path / "few", title="SAT", clean=0.26, attacked={"5": 0.25, "8": 0.25}, cases=7)
    for sat in (made["SAT"], fewer):
        setting = one_setting(made["STD"], sat, made["IMA"])
        std, _, ima = setting.runs
        assert headline(setting).startswith("IMA is more robust than STD: at L2 5")
        assert headline(setting).endswith("more. SAT has not learned its task and is not compared.")
        assert (setting.ranked, setting.pairs) == ([ima, std], [(ima, std)])
        assert evidence(setting).startswith("On average over L2 5 and 8, IMA holds")
        assert " pairs of models" not in evidence(setting)
        assert "SAT" not in price(setting)
        table = difference_table(setting)
        assert {(row[0].text, row[1].text) for row in table.rows} == {("IMA", "STD")}
        best = robustness_table(setting)
        bold = {row[0].text: [cell.best for cell in row[2:]] for row in best.rows}
        assert bold == {"STD": [True, *[False] * 3], "SAT": [False] * 4, "IMA": [False, *[True] * 3]}
        (drawing,) = (one for one in drawings_of(setting, colours_of(setting.runs)) if one.title.startswith("Clean"))
        for text in (table.note, best.note, drawing.caption):
            assert "SAT has not learned its task and is not compared." in text
    rows = numbers_of(write_report([made["STD"], made["SAT"], made["IMA"]], tmp_path / "out"))
    assert {(row["model"], row["against"]) for row in rows if row["against"]} == {("IMA", "STD")}

    left = one_setting(made["STD"], made["SAT"])
    assert headline(left).startswith("At L2 5, apgd:steps=4 takes STD from")
    assert headline(left).endswith(". SAT has not learned its task and is not compared; no second model is left.")
    none = one_setting(made["SAT"], made["TE"])
    assert headline(none) == "SAT and TE have not learned their task and are not compared; no model is left."
    alone = one_setting(made["SAT"])
    assert headline(alone).startswith("At L2 5, apgd:steps=4 takes SAT from")
    assert headline(alone).endswith(". SAT has not learned its task, so this says nothing of robustness.")
    for setting in (left, none, alone):
        assert (evidence(setting), price(setting), difference_table(setting)) == ("", "", None)
        assert not any(cell.best for row in robustness_table(setting).rows for cell in row)
        assert "is more robust than" not in Text(_page(setting.runs, [setting], "")).text


def test_a_model_whose_figures_are_not_to_be_trusted_beats_none_and_is_marked_wherever_it_stands(tmp_path):
    """A holds most under the attack, but noise takes more from it: what the attack left is not real."""
    made = {
        title: make_run(tmp_path / title, title=title, attacked={"5": dice}, noise={"5": noise}, seed=number)
        for number, (title, dice, noise) in enumerate((("A", 0.8, 0.3), ("B", 0.3, 0.85), ("C", 0.5, 0.85)))
    }
    failed = "The figures of A (failed check: gradients_beat_noise) are not to be trusted"
    setting = one_setting(made["A"], made["B"], made["C"])
    _, b, c = setting.runs
    assert headline(setting).startswith("C is more robust than B: at L2 5")
    assert headline(setting).endswith(f"more. {failed}, so it is not compared.")
    assert (setting.ranked, setting.pairs) == ([c, b], [(c, b)])
    best = robustness_table(setting)
    bold = {(row[0].text, row[1].text): [cell.best for cell in row[3:]] for row in best.rows}
    assert not any(bold["A", ATTACK] + bold["A", NOISE])
    assert all(bold["C", ATTACK])
    page = write_report(list(made.values()), tmp_path / "out")
    for name, mark in (("tables.md", "| A (not trusted) |"), ("tables.tex", r"{}A {\scriptsize (not trusted)} &")):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert len(re.findall(r"^(\| A \||\{\}A &)", text, re.M)) == 0
        assert text.count(mark) > 4
        assert text.replace("\\_", "_").count(f"{failed}, so it is not compared.") == 2
    text = Text(page.read_text(encoding="utf-8")).text
    assert "A not trusted" in text
    (card,) = re.findall(r"A: [\d.]+ % [^:]* Dice on clean scans.*?(?=B: )", text)
    assert card.rstrip().endswith("These figures are not to be trusted: a check failed.")
    rows = numbers_of(page)
    trusted = {(row["model"], row["trusted"]) for row in rows if row["source"] == "here"}
    assert trusted == {("A", "no"), ("B", "yes"), ("C", "yes")}
    assert {row["trusted"] for row in rows if row["source"] != "here"} <= {""}
    assert {(row["model"], row["against"]) for row in rows if row["against"]} == {("C", "B")}

    left = one_setting(made["A"], made["B"])
    assert headline(left).endswith(f". {failed}, so it is not compared; no second model is left.")
    alone = one_setting(made["A"])
    assert headline(alone).startswith("At L2 5, apgd:steps=4 takes A from")
    assert headline(alone).endswith(f". {failed}.")
    collapsed = make_run(tmp_path / "SAT", title="SAT", clean=0.26, attacked={"5": 0.25}, noise={"5": 0.26})
    assert headline(one_setting(made["A"], collapsed)) == (
        f"SAT has not learned its task and is not compared. {failed}, so it is not compared; no model is left."
    )


def test_two_models_that_are_not_to_be_trusted_are_named_with_their_checks(tmp_path):
    made = [
        make_run(tmp_path / name, title=name, attacked={"5": dice, "8": more}, noise={"5": noise, "8": 0.3}, seed=seed)
        for seed, (name, dice, more, noise) in enumerate((("A", 0.8, 0.81, 0.3), ("B", 0.3, 0.2, 0.25)))
    ]
    setting = one_setting(*made)
    assert headline(setting) == (
        "The figures of A (failed checks: gradients_beat_noise and larger_levels_are_worse) and B (failed checks: "
        "gradients_beat_noise and larger_levels_are_worse) are not to be trusted, so they are not compared; no "
        "model is left."
    )
    assert difference_table(setting) is None


def test_under_noise_alone_a_model_that_learned_nothing_is_left_out_too(tmp_path):
    made = [
        make_run(tmp_path / title, title=title, clean=clean, attacked={"5": 0.2}, noise={"5": clean - 0.05})
        for title, clean in (("STD", 0.9), ("SAT", 0.26))
    ]
    (noise,) = settings_of([only(folder, NOISE) for folder in made])
    assert re.fullmatch(
        r"No attack was run, only white noise, so no model is called more robust: at L2 5 it leaves STD [^A]* Dice. "
        r"SAT has not learned its task and is not compared; no second model is left.",
        headline(noise),
    )


def test_samples_that_a_model_was_not_attacked_on_are_not_shown_side_by_side(tmp_path):
    """The second model was attacked on the first cases only, among which one of the lots is."""
    one = make_run(tmp_path / "a", title="A")
    lots = sorted(score.sample for score in drawn_by_lot(scores_of(one)))
    cases = int(lots[0].case[-3:]) + 1
    other = make_run(tmp_path / "b", title="B", cases=cases, seed=1)
    assert lots[1] not in {score.sample for score in scores_of(other)}
    rows = figures_of(write_report([one, other], tmp_path / "out"), "same")
    assert [[sample for _, sample in row] for row in rows] == [[f"{lots[0].case}, tile {lots[0].tile}"] * 2]


def test_patches_that_have_nothing_but_their_number_in_common_are_not_shown_side_by_side(tmp_path):
    """Of plans with another spacing, say."""
    made = [make_run(tmp_path / str(shift), title=f"M{shift}", seed=shift, shift=shift) for shift in range(2)]
    assert figures_of(write_report(made, tmp_path / "out"), "same") == []
    assert len(figures_of(write_report(made[:1], tmp_path / "alone"), "same")) == LOTS_KEPT


def test_runs_that_kept_only_what_lost_most_show_no_lots(tmp_path):
    """They have no date; a lot that is among what they kept is there because it lost much."""
    made = [
        make_run(tmp_path / str(n), title=f"M{n}", seed=n, date=date) for n, date in enumerate((None, "2026-11-25"))
    ]
    assert figures_of(write_report(made, tmp_path / "out"), "same") == []


@pytest.mark.parametrize(
    ("dates", "said"),
    [
        (("2026-11-25", "2026-11-25"), "The evaluations were begun on 2026-11-25."),
        (("2026-11-27", "2026-11-25"), "The evaluations were begun between 2026-11-25 and 2026-11-27."),
        ((None, "2026-11-25"), None),
        ((None, None), None),
    ],
)
def test_the_page_says_when(tmp_path, dates, said):
    made = [make_run(tmp_path / str(n), title=f"M{n}", seed=n, date=date) for n, date in enumerate(dates)]
    text = Text(write_report(made, tmp_path / "out").read_text(encoding="utf-8")).text
    assert (said in text) if said else ("were begun" not in text)


def test_a_reader_learns_who_is_more_robust_to_what_how_surely_and_at_which_price(page):
    text = Text(page.read_text(encoding="utf-8")).text
    for level in ("L2 15", "Linf 4/255"):
        share = r"([\d.]+) % \(([\d.]+) to ([\d.]+)\)"
        said = re.search(
            rf"IMA is more robust than nnUNetTrainer: at {level}, under {ATTACK}, it holds {share} Dice "
            rf"against {share}, ([\d.]+) points",
            text,
        )
        assert said, text[:600]
        ima, low, high, stock, _, _, more = map(float, said.groups())
        assert low < ima < high
        assert ima - stock == pytest.approx(more, abs=0.11)
        assert ima == pytest.approx(60, abs=4)
    assert re.search(r"It costs [\d.]+ points \([\d.]+ to [\d.]+\) of clean Dice", text)
    parts = "Can the figures be trusted? | What the figures mean | Case by case | Size of the structure"
    parts += " | Margins in training | By class | How to repeat this"
    for wanted in parts.split(" | "):
        assert wanted in text


def test_a_reader_learns_of_how_many_samples_that_is_and_what_the_mean_over_levels_says(page, runs):
    text = Text(page.read_text(encoding="utf-8")).text
    for setting in settings_of([read_results(folder) for folder in runs]):
        stock, ima = setting.runs
        mean = setting.mean_difference(ima, stock)
        levels = [level for level, _ in setting.levels]
        over = f"{setting.norm_name} {', '.join(levels[:-1])} and {levels[-1]}"
        low, high = 100 * mean.interval.low, 100 * mean.interval.high
        assert (
            f"On average over {over}, IMA holds {100 * mean.interval.value:.1f} points ({low:.1f} to {high:.1f}) more "
            f"than nnUNetTrainer (p 0.008). With 8 cases no p can be below 0.008." in text
        )
        samples = [run.samples[UNTOUCHED] for run in (ima, stock)]
        by_sample = [100 * float(table.dice.mean()) for table in samples]
        assert f"(ADI): {by_sample[0]:.1f} % against {by_sample[1]:.1f} %" in text
        if setting.norm == "l2":
            each = " / ".join(f"{float(level) / (24 * 20) ** 0.5:.2g}" for level in levels)
            assert f"L2 {' / '.join(levels)} is {each} standard deviations of the intensities in each of a" in text
            assert "sample's 480 voxels" in text
    assert (
        text.count(f"Attacked: 40 samples of 8 cases, each sample of 24 × 20 voxels, with {NOISE} and {ATTACK}.") == 2
    )
    assert "IMA: the median went from 3.00 to 4.00 in the last quarter" in text


def test_models_attacked_on_other_samples_each_say_how_many(tmp_path):
    runs = [make_run(tmp_path / t, cases=n, title=t, patch=(8, 8, 8)) for t, n in (("A", 8), ("B", 9))]
    text = Text(write_report(runs, tmp_path / "out").read_text(encoding="utf-8")).text
    assert "Attacked: A: 40 samples of 8 cases; B: 45 samples of 9 cases, each sample of 8 × 8 × 8 voxels" in text


def test_several_attacks_are_not_one(tmp_path):
    made = [make_run(tmp_path / t, attacked={"5": d}, further={"square": {"5": d}}, title=t, seed=n)
            for n, (t, d) in enumerate((("A", 0.3), ("B", 0.7)))]  # fmt: skip
    assert "under the worst attack on each" in headline(one_setting(*made))


def test_the_members_of_an_ensemble_are_named_and_an_attack_is_explained(tmp_path):
    members = {"apgd-ce": {"5": 0.5}, "square": {"5": 0.6}}
    run = make_run(tmp_path / "run", attacked={"5": 0.5}, members=members)
    text = Text(write_report([run], tmp_path / "out").read_text(encoding="utf-8")).text
    assert f"{ENSEMBLE} : Run the members one after the other" in text
    assert "Members: apgd-ce, square." in text
    assert f"{ATTACK} : PGD with momentum" in text


def test_trainings_of_ours_are_explained_and_no_others():
    assert trainings_of(["nnUNetTrainer", "nnUNetTrainerX", "nnUNetTrainerIMAX", "MyIMA"]) == {}
    assert list(trainings_of(["nnUNetTrainerIMA_finetune", "nnUNetTrainerTE", "nnUNetTrainerIMA"])) == ["IMA", "TE"]
    assert list(trainings_of(f"nnUNetTrainer{name}" for name in TRAININGS)) == list(TRAININGS)
    # What the page may be of.
    names = {file.stem.removeprefix("nnUNetTrainer") for file in trainers_folder().glob("nnUNetTrainer[A-Z]*.py")}
    assert names == {*TRAININGS, "Adversarial"}  # the base of the others


def test_a_caveat_is_read_before_the_figures_and_a_note_after_them(tmp_path):
    run = make_run(tmp_path / "run")
    page = Text(write_report([run], tmp_path / "out", note="A long note.", caveat="A phantom.").read_text("utf-8")).text
    places = [page.index(text) for text in ("A phantom.", "Dice on clean scans", "A long note.", "Can the figures be")]
    assert places == sorted(places)


def test_the_page_says_what_an_abbreviation_of_a_training_means(tmp_path):
    ima = make_run(tmp_path / "ima", title="nnUNetTrainerIMA_50epochs")
    page = write_report([ima], tmp_path / "out").read_text(encoding="utf-8")
    assert "IMA: Increasing-margin adversarial training" in page
    stock = make_run(tmp_path / "stock", title="nnUNetTrainer")
    assert "Increasing-margin" not in write_report([stock], tmp_path / "stock_out").read_text(encoding="utf-8")


def test_columns_that_no_run_fills_are_left_out_and_named(tmp_path):
    without = make_run(tmp_path / "without", whole_cases=False, title="A")
    table = further_table(one_setting(without))
    assert not {"case Dice", "HD95 (mm)", "surface Dice"} & set(table.head)
    assert all(len(row) == len(table.head) for row in table.rows)
    assert table.note.endswith("None of these runs has figures for: case Dice, HD95 (mm), surface Dice.")
    tables = [further_table(one_setting(make_run(tmp_path / "with", title="B")))]
    assert {"case Dice", "HD95 (mm)", "surface Dice"} <= set(tables[0].head)
    assert "None of these runs" not in tables[0].note
    # What stands under a heading is still that of the heading.
    place = table.head.index("ADI")
    clean = without_name(table.rows[0])[place]
    assert float(clean) == pytest.approx(100 * read_results(without).figures(UNTOUCHED)["adi"], abs=0.051)


def without_name(row: list[Cell]) -> list[str]:
    return [cell.text for cell in row]


@given(st.floats(-100, 100))
def test_a_difference_that_rounds_to_nothing_has_no_sign(value):
    shown = _signed(value)
    assert float(shown) == pytest.approx(value, abs=0.0501)
    assert shown == "0.0" or shown[0] in "+-"
    assert shown not in ("-0.0", "+0.0")


def test_where_nothing_was_added_no_colour_is_explained():
    image = np.zeros((4, 5), np.float32)
    mask = np.zeros((1, 4, 5), bool)
    assert perturbation(Example("a", 0, 0.9, 0.9, image, image, mask, mask, mask))[1] == 0
    assert perturbation(Example("a", 0, 0.9, 0.9, image, image + 0.5, mask, mask, mask))[1] == 0.5


def test_the_page_needs_no_network_and_is_well_formed(page):
    content = page.read_text(encoding="utf-8")
    for tag, attributes in Text(content).tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#")), (tag, attributes)
    assert "http://" not in content
    assert "https://" not in content
    assert "@import" not in content


def numbers_of(page: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((page.parent / "tables.csv").read_text(encoding="utf-8"))))


def test_every_table_number_is_that_of_the_runs(page, runs):
    lines = (page.parent / "tables.md").read_text(encoding="utf-8").split("### ")[1].splitlines()
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert cells[0] == ["model", "attack", "clean", "L2 5", "L2 10", "L2 15", "Avg"]
    table = {(row[0], row[1]): row[2:] for row in cells[2:]}
    for folder, title in zip(runs, ("nnUNetTrainer", "IMA"), strict=False):
        results = read_results(folder)
        for attack in (NOISE, ATTACK):
            keys = [("clean", "0"), *((attack, level) for level in ("5", "10", "15"))]
            wanted = [100 * float((results.figures(key) or {})["tvdi"]) for key in keys]
            shown = [float(cell.split()[0]) for cell in table[title, attack]]
            assert shown == pytest.approx([*wanted, sum(wanted) / 4], abs=0.051)


def test_the_mean_of_clean_and_all_levels_has_an_interval_too(runs, page, tmp_path):
    (setting, _) = settings_of([read_results(folder) for folder in runs])
    (row,) = (row for row in numbers_of(page) if row["metric"] == "tvdi_mean_of_clean_and_levels"
              and (row["norm"], row["model"], row["attack"]) == ("l2", "IMA", ATTACK))  # fmt: skip
    ima = setting.runs[1]
    interval = setting.mean_over_levels(ima, ATTACK)
    assert interval.low < interval.value < interval.high
    assert [float(row[end]) for end in ("value", "low", "high")] == list(interval)
    # Each condition's own cases go up and down together, so the mean is about as sure as one of them.
    keys = [UNTOUCHED, *((ATTACK, level) for level, _ in setting.levels)]
    each = [setting.interval(ima, key) for key in keys]
    assert interval.value == pytest.approx(np.mean([one.value for one in each]))
    assert interval.high - interval.low == pytest.approx(np.mean([one.high - one.low for one in each]), rel=0.3)
    (cell,) = (row[-1] for row in robustness_table(setting).rows if (row[0].text, row[1].text) == (ima.title, ATTACK))
    assert cell.note == f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"
    tiny = one_setting(make_run(tmp_path / "tiny", cases=1, tiles=3))
    assert robustness_table(tiny).rows[0][-1].note == ""


def test_the_csv_is_one_table_with_each_number_in_a_cell_of_its_own(page, runs):
    rows = numbers_of(page)
    numbers = ("epsilon", "value", "low", "high", "p", "p_holm", "n")
    for row in rows:
        assert None not in row
        assert None not in row.values()
        for name in numbers:
            assert row[name] == "" or np.isfinite(float(row[name]))
        assert not row["low"] or float(row["low"]) <= float(row["value"]) <= float(row["high"])
    found = {tuple(row[name] for name in ("norm", "model", "against", "attack", "level", "case", "label", "metric",
                                          "source")): row for row in rows}  # fmt: skip
    assert len(found) == len(rows)

    def of(*wanted: str, **named: str) -> dict[str, str]:
        norm, model, attack, level, metric = wanted
        one = {"against": "", "case": "", "label": "", "source": "here", **named}
        return found[norm, model, one["against"], attack, level, one["case"], one["label"], metric, one["source"]]

    for folder, norm in ((runs[1], "l2"), (runs[3], "linf")):
        results = read_results(folder)
        for item in results.attacked:
            where = (norm, "IMA", item["attack"], item["level"])
            for metric in ("tvdi", "adi", "robust_share", "case_dice"):
                assert float(of(*where, metric)["value"]) == item[metric]
            assert float(of(*where, "hd95_mm")["value"]) == item["hd95"]
            assert of(*where, "tvdi")["n"] == str(item["n_samples"])
            assert float(of(*where, "tvdi")["epsilon"]) == item["epsilon"]
        case = results.cases[UNTOUCHED]["case_003"]
        assert (
            float(of(norm, "IMA", *UNTOUCHED, "hd95_mm", case="case_003", label="posterior")["value"])
            == (case["hd95_mm"][1])
        )
    (setting, _) = settings_of([replace(read_results(f), title=t) for f, t in zip(runs, ("S", "I") * 2, strict=True)])
    stock, ima = setting.runs
    difference = setting.difference(ima, stock, "10")
    row = of("l2", "IMA", "worst of each model", "10", "tvdi_difference", against="nnUNetTrainer")
    shown = [float(row[name]) for name in ("value", "low", "high", "p", "p_holm")]
    assert shown == [*difference.interval, difference.p, difference.p]
    for metric in ("tvdi_mean_of_clean_and_levels", "tvdi_difference_of_means_over_levels", "adi_difference"):
        assert any(row["metric"] == metric for row in rows)


def test_what_was_published_is_in_the_csv_with_its_source(tmp_path):
    run = make_run(tmp_path / "run", attacked={"5": 0.5}, further={"pgd:steps=100": {"5": 0.4}})
    rows = numbers_of(write_report([run], tmp_path / "out"))
    (row,) = (row for row in rows if row["source"] != "here" and row["model"] == "SAT15" and row["level"] == "15")
    assert (row["attack"], row["metric"], float(row["value"])) == ("PGD", "tvdi", pytest.approx(0.2776))
    assert "100 steps" in row["source"]
    assert row["trusted"] == ""


def test_the_best_of_each_column_is_bold_and_nothing_else(runs):
    (setting, _) = settings_of([read_results(folder) for folder in runs])
    table = robustness_table(setting)
    for attack in (NOISE, ATTACK):
        mine = [row for row in table.rows if row[1].text == attack]
        for column in zip(*(row[2:] for row in mine), strict=True):
            most = max(float(cell.text) for cell in column)
            assert [cell.best for cell in column] == [float(cell.text) == most for cell in column]


def test_models_that_do_not_differ_are_not_ranked(tmp_path):
    one = make_run(tmp_path / "one", attacked={"5": 0.7}, seed=1, title="A")
    other = make_run(tmp_path / "other", attacked={"5": 0.7}, seed=2, title="B")
    (setting,) = settings_of([read_results(folder) for folder in (one, other)])
    assert "No model is clearly more robust" in headline(setting)
    assert price(setting) == ""


def test_few_cases_are_said_to_be_few(tmp_path):
    few = [make_run(tmp_path / t, attacked={"5": d}, title=t, cases=2) for t, d in (("A", 0.2), ("B", 0.8))]
    text = Text(write_report(few, tmp_path / "out").read_text(encoding="utf-8")).text
    assert "there are fewer than 6 cases" in text
    assert "too narrow" in text
    # Ten samples can be clear, two cases cannot: nothing of the kind is said of others, and no p on top.
    assert "On these few cases, B is more robust than A" in text
    assert "there are too few cases to say whether that would be so on others" in text
    assert "(p " not in text[: text.index("Dice against level")]
    assert "so p is too small" in text
    assert "sample by sample where there are fewer than six cases" in text
    tiny = [make_run(tmp_path / t, attacked={"5": d}, title=t, cases=1, tiles=3) for t, d in (("C", 0.2), ("D", 0.8))]
    assert "nobody can say whether a difference is chance" in write_report(tiny, tmp_path / "tiny").read_text(
        encoding="utf-8"
    )


def test_one_model_alone_and_other_samples(tmp_path):
    alone = make_run(tmp_path / "alone", attacked={"5": 0.4})
    assert "takes STD from" in write_report([alone], tmp_path / "one").read_text(encoding="utf-8")
    other = make_run(tmp_path / "other", attacked={"5": 0.7}, cases=9, title="B")
    page = write_report([alone, other], tmp_path / "two").read_text(encoding="utf-8")
    assert "on other samples" in page
    assert "Model against model" not in page
    table = robustness_table(one_setting(alone, other))
    assert not any(cell.best for row in table.rows for cell in row)
    assert "Bold" not in table.note
    assert "No model is marked as the best of a column, as the models were attacked on other samples." in table.note
    same = make_run(tmp_path / "same", attacked={"5": 0.7}, title="C", seed=1)
    assert "Bold: the best model of a column, for each attack." in robustness_table(one_setting(alone, same)).note


def test_without_a_case_level_cases_are_made_of_their_samples(tmp_path):
    run = make_run(tmp_path / "run", whole_cases=False)
    text = Text(write_report([run], tmp_path / "out").read_text(encoding="utf-8")).text
    assert "of the case's attacked samples, as TVDI pools them" in text


def test_figures_that_failed_a_check_are_not_hidden_but_marked(tmp_path):
    run = make_run(tmp_path / "run", attacked={"5": 0.9}, noise={"5": 0.2})
    content = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    warning = content[content.index('<aside class="warning"') : content.index("</aside>")]
    assert "white noise is stronger" in warning
    assert '<td class="failed">FAILED</td>' in content


def test_where_no_check_was_made_none_passed(tmp_path):
    run = read_results(make_run(tmp_path / "run"))
    (setting,) = settings_of([replace(run, summary={**run.summary, "trust": []})])
    page = Text(_page(setting.runs, [setting], "")).text
    assert "No check was made." in page
    assert "checks passed" not in page
    assert "checks passed." in Text(_page([run], settings_of([run]), "")).text


def about(dataset: str, norm: str, patch: tuple[int, ...] = (56, 40)) -> dict[str, Any]:
    return {"model": {"dataset": dataset}, "protocol": {"norm": norm}, "patch_size": list(patch)}


def test_published_figures_stand_with_their_kind_of_attack():
    auto = published_for(about("Dataset002_Heart", "linf"), "AutoAttack")
    assert {row.method: row.levels["8/255"] for row in auto}["STD"] == 50.66
    noise = published_for(about("Dataset002_Heart", "linf"), "WhiteNoise")
    assert {row.method: row.levels["8/255"] for row in noise}["STD"] == 73.27
    pgd = published_for(about("Dataset002_Heart", "l2"), "PGD")
    assert {row.method: row.levels["15"] for row in pgd}["IMA"] == 69.34
    assert [all(word in row.source for row in rows) for word, rows in
            (("AutoAttack", auto), ("white noise", noise), ("100 steps", pgd))] == [True] * 3  # fmt: skip
    assert published_for(about("Dataset002_Heart", "linf"), "PGD") == []
    assert published_for(about("Dataset002_Heart", "linf", (80, 192, 160)), "AutoAttack") == []


@pytest.mark.parametrize(
    ("protocol", "attack", "kind"),
    [
        ("paper", "autoattack:version=fast", "AutoAttack"),
        ("paper", "autoattack:version=fast,mode=threshold", None),
        ("paper", "white-noise:draws=100", "WhiteNoise"),
        ("paper", "pgd:steps=100,step_size=0.04", None),
        ("paper", "apgd", None),
        ("sound", "pgd:step_size=0.04,steps=100", "PGD"),
        ("sound", "pgd:steps=20", None),
        ("sound", "autoattack", None),
        ("sound", "white-noise", None),
        ("sound", "an-attack-of-next-year:steps=100", None),
    ],
)
def test_an_attack_stands_beside_its_own_kind_or_beside_none(protocol, attack, kind):
    assert published_attack(protocol, attack) == kind


@pytest.mark.parametrize(
    ("dataset", "task"),
    [
        ("Dataset002_Heart", ("Heart", 2, True)),
        ("Dataset004_Hippocampus", ("Hippocampus", 4, True)),
        ("Dataset002_Heart8cases", ("Heart", 2, False)),
        ("Dataset005_ProstateT25cases", ("Prostate", 5, False)),
        ("Dataset101_HeartMRI", None),
        ("Dataset002_Spleen", None),
        ("Dataset004_Heart", None),
        ("Heart", None),
    ],
)
def test_only_the_papers_tasks_have_published_figures(dataset, task):
    assert paper_task(dataset) == task


def published_of(*folders: Path) -> dict[str, Table]:
    return {table.title.partition(":")[0]: table for table in published_tables(one_setting(*folders))}


def test_our_noise_is_not_shown_beside_their_attack(tmp_path):
    """B had no AutoAttack, so nothing is said of it there."""
    dice = {"8/255": 0.7, "0.0625": 0.6}
    how = {"norm": "linf", "protocol": "paper", "dataset": "Dataset004_Hippocampus"}
    one = make_run(tmp_path / "a", attacked=dice, noise=dice, members={"apgd": dice}, title="A", **how)
    two = make_run(tmp_path / "b", attacked=dice, noise=dice, title="B", seed=1, **how)
    found = published_of(one, two)
    assert set(found) == {f"Beside the published figures, {name}" for name in ("white noise", "AutoAttack")}
    noise, auto = found["Beside the published figures, white noise"], found["Beside the published figures, AutoAttack"]
    assert [(row[0].text, row[1].text) for row in noise.rows if row[2].text == "here"] == [("A", NOISE), ("B", NOISE)]
    assert [(row[0].text, row[1].text) for row in auto.rows if row[2].text == "here"] == [("A", ENSEMBLE)]
    assert noise.head[4:] == [f"Linf {level}" for level in ("8/255", "0.0625", "16/255", "32/255")]
    assert auto.head[4:] == [f"Linf {level}" for level in ("2/255", "4/255", "8/255", "0.0625")]
    (stock,) = (row for row in noise.rows if row[0].text == "STD")
    assert [cell.text for cell in stock[4:]] == ["74.1", "–", "74.0", "73.5"]
    (stock,) = (row for row in auto.rows if row[0].text == "STD")
    assert [cell.text for cell in stock[4:]] == ["71.2", "68.7", "61.0", "–"]
    assert "stands in" not in noise.note
    assert "Table 3: white noise" in noise.note
    assert "Table 3: AutoAttack" in auto.note


def test_a_data_set_that_stands_in_for_the_papers_says_so_and_a_3d_network_why_it_has_no_figures(tmp_path):
    how = {"further": {"pgd:steps=100": {"5.0": 0.5}}, "attacked": {"5.0": 0.6}}
    (table,) = published_of(make_run(tmp_path / "a", dataset="Dataset002_Heart8cases", **how)).values()
    assert "Dataset002_Heart8cases is not Dataset002_Heart of the paper but stands in for it." in table.note
    # 5.0 and their 5 are one level.
    assert table.head[4:] == ["L2 5", "L2 15", "L2 25"]
    assert published_of(make_run(tmp_path / "b", dataset="Dataset101_HeartMRI", **how)) == {}
    volume = make_run(tmp_path / "c", dataset="Dataset002_Heart", patch=(8, 8, 8), **how)
    assert published_of(volume) == {}
    assert "figures of Heart are of 2D networks" in robustness_table(one_setting(volume)).note
    assert "2D networks" not in robustness_table(one_setting(tmp_path / "a")).note


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' tables are not there (../shared/papers)")
@pytest.mark.parametrize(("ours", "theirs"), [("table3.csv", "table3.csv"), ("pgd100.csv", "pgd100_tables.csv")])
def test_published_figures_are_quoted_correctly(ours, theirs):
    package = Path(__file__).parents[1] / "evaluation" / "report"
    assert (package / ours).read_text() == (PAPERS / theirs).read_text()


def one_setting(*folders: Path) -> Setting:
    runs = [read_results(folder) for folder in folders]
    (setting,) = settings_of([replace(run, title=run.summary["model"]["trainer"]) for run in runs])
    return setting


def test_each_model_is_judged_by_the_attack_that_is_worst_for_it(tmp_path):
    """A is weak against one attack, B against the other: B's worst is the better one."""
    one = make_run(tmp_path / "a", attacked={"5": 0.3}, further={"pgd": {"5": 0.5}}, title="A")
    two = make_run(tmp_path / "b", attacked={"5": 0.6}, further={"pgd": {"5": 0.4}}, title="B", seed=1)
    setting = one_setting(one, two)
    first, second = setting.runs
    assert setting.worst(first, "5")[0] == ATTACK
    assert setting.worst(second, "5")[0] == "pgd"
    assert headline(setting).startswith("B is more robust than A: at L2 5, under the worst attack on each, it holds")
    assert setting.difference(second, first, "5").interval.value == pytest.approx(0.1, abs=0.03)


def test_a_model_that_is_better_at_one_level_only_is_not_called_more_robust(tmp_path):
    one = make_run(tmp_path / "a", attacked={"2": 0.8, "8": 0.2}, title="A")
    two = make_run(tmp_path / "b", attacked={"2": 0.6, "8": 0.5}, title="B", seed=1)
    setting = one_setting(one, two)
    assert "depends on the level" in headline(setting)
    assert price(setting) == ""


def test_a_difference_too_small_to_matter_is_not_one(tmp_path):
    """However sure it is: the same model but for half a voxel in a hundred."""
    one = make_run(tmp_path / "a", attacked={"5": 0.600}, title="A")
    two = make_run(tmp_path / "b", attacked={"5": 0.602}, title="B")
    assert "No model is clearly more robust" in headline(one_setting(one, two))


def test_of_three_models_each_is_compared_with_the_best(tmp_path):
    made = [make_run(tmp_path / t, attacked={"5": d}, title=t, seed=n) for n, (t, d) in
            enumerate((("A", 0.3), ("B", 0.7), ("C", 0.5)))]  # fmt: skip
    assert headline(one_setting(*made)).startswith("B is more robust than C and A: ")
    near = make_run(tmp_path / "D", attacked={"5": 0.7}, title="D", seed=9)
    assert "the order is not clear" in headline(one_setting(made[0], made[1], near))


def test_of_three_models_the_level_shown_is_one_at_which_the_winner_has_more(tmp_path):
    """A lost ground to B at the level at which both are far ahead of C."""
    made = [
        make_run(tmp_path / title, attacked={"2": low, "8": high}, title=title, seed=number)
        for number, (title, low, high) in enumerate((("A", 0.8, 0.51), ("B", 0.6, 0.524), ("C", 0.62, 0.1)))
    ]
    setting = one_setting(*made)
    a, b, c = setting.runs
    assert setting.difference(a, c, "8").interval.value > setting.difference(a, c, "2").interval.value
    assert setting.difference(a, b, "8").interval.value < 0
    assert (setting.telling_level, setting.shown) == ("2", b)
    said = re.fullmatch(
        rf"A is more robust than B and C: at L2 2, under {ATTACK}, it holds ([\d.]+) % .* Dice against ([\d.]+) % .* "
        r"of B, ([\d.]+) points .* more\.",
        headline(setting),
    )
    held, against, more = map(float, said.groups())
    assert held - against == pytest.approx(more, abs=0.11)


@given(st.lists(st.floats(0.05, 0.85), min_size=6, max_size=6), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_the_headline_never_says_more_of_less(dice, seed):
    with TemporaryDirectory() as folder:
        made = [
            make_run(Path(folder) / title, attacked={"2": dice[2 * n], "8": dice[2 * n + 1]}, title=title,
                     seed=seed + n, tiles=2, whole_cases=False)
            for n, title in enumerate("ABC")
        ]  # fmt: skip
        setting = one_setting(*made)
        said = re.search(r"it holds ([\d.]+) %.*? Dice against ([\d.]+) %", headline(setting))
        if said:
            assert float(said[1]) >= float(said[2])
            best, *others = setting.ranked
            for other in others:
                if setting.order(best, other) is Order.BETTER:
                    assert all(setting.difference(best, other, text).interval.high >= 0 for text, _ in setting.levels)


@pytest.mark.parametrize(("lost", "said"), [(0.0, "B is more robust than A"), (0.004, "depends on the level")])
def test_a_level_that_is_surely_lost_is_not_passed_over_however_little_it_is(tmp_path, lost, said):
    """Less than half a point, but as sure as can be: the half point is for the mean."""
    made = [
        make_run(tmp_path / title, attacked={"2": two, "8": eight}, title=title)
        for title, two, eight in (("A", 0.6, 0.3), ("B", 0.6 - lost, 0.6))
    ]
    setting = one_setting(*made)
    a, b = setting.runs
    interval = setting.difference(b, a, "2").interval
    assert -0.005 < interval.low <= interval.high <= 0
    assert (interval.high < 0) == (lost > 0)
    assert said in headline(setting)


def test_under_the_papers_protocol_the_clamp_is_not_the_attacks_work(tmp_path):
    run = make_run(tmp_path / "run", clean=0.9, clamped=0.57, attacked={"5": 0.55}, protocol="paper")
    page = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    text = Text(page).text
    assert re.search(r"takes STD from 5\d\.\d % \([\d.]+ to [\d.]+\) Dice on clamped scans without noise", text)
    assert "clamp only" in text
    assert "none, clamped" in text


def test_what_cannot_be_compared_is_not(tmp_path):
    """Other patches, other classes: settings of their own. Other attacks, other levels: nothing to compare."""
    runs = [
        make_run(tmp_path / "2d", title="A"),
        make_run(tmp_path / "3d", title="B", patch=(20, 24, 20)),
        make_run(tmp_path / "classes", title="C", classes=("left", "right", "middle")),
    ]
    assert len(settings_of([read_results(folder) for folder in runs])) == 3
    write_report(runs, tmp_path / "out")
    levels = make_run(tmp_path / "levels", title="D", attacked={"3": 0.5})
    text = Text(write_report([runs[0], levels], tmp_path / "two").read_text(encoding="utf-8")).text
    assert "No attack was run on all models at the same levels" in text
    assert "TVDI under each attack" not in text


@pytest.mark.parametrize(
    ("noted", "words"),
    [(CT, CT_WORDS),
     (MASKED, MASKED_WORDS)],
)  # fmt: skip
def test_levels_in_other_units_are_not_compared(tmp_path, noted, words):
    """Two plans whose patches and samples are the same, but not what L2 5 does to a scan."""
    made = [
        make_run(tmp_path / title, title=title, attacked={"5": dice}, about={"normalisation": how}, seed=seed,
                 files={"plans.json": title})
        for seed, (title, dice, how) in enumerate((("A", 0.3, Z_SCORED), ("B", 0.7, noted), ("C", 0.5, Z_SCORED)))
    ]  # fmt: skip
    whole = settings_of([read_results(folder) for folder in made])
    assert [len(setting.runs) for setting in whole] == [2, 1]
    assert [setting.name.rpartition(", patch 24 × 20, ")[2] for setting in whole] == ["ZScoreNormalization", words]
    page = write_report(made, tmp_path / "out")
    text = Text(page.read_text(encoding="utf-8")).text
    assert "B is more robust" not in text
    assert "C is more robust than A" in text
    assert "does not tell how its scans were normalised" not in text
    assert {(row["model"], row["normalisation"]) for row in numbers_of(page)} == {
        ("A", "ZScoreNormalization"), ("B", words), ("C", "ZScoreNormalization")
    }  # fmt: skip
    # By itself a setting needs no such name.
    assert one_setting(made[1]).name.endswith("patch 24 × 20")


@pytest.mark.parametrize(("norm", "protocol"), [("l2", "sound"), ("l2", "paper"), ("linf", "paper")])
def test_only_z_scores_are_called_z_scores_or_standard_deviations(tmp_path, norm, protocol):
    def words(name: str, noted: dict[str, Any] | None) -> str:
        run = make_run(tmp_path / name, norm=norm, protocol=protocol, attacked={"0.5": 0.4}, clamped=0.8,
                       about={"normalisation": noted})  # fmt: skip
        page = Text(write_report([run], tmp_path / f"{name} out").read_text(encoding="utf-8"))
        return re.sub(r"How to repeat this.*", "", page.text)

    scored, ct, old = words("scored", Z_SCORED), words("ct", CT), words("old", None)
    assert "z-scores: in standard deviations" in scored
    assert ("0.023 standard deviations of the intensities in each of" in scored) == (norm == "l2")
    for text, unit in ((ct, "(CTNormalization)"), (old, "(how it was normalised is not noted)")):
        for word in ("z-score", "standard deviations"):
            assert word not in text
        assert f"units of the normalised scan {unit}" in text
        assert (f"0.023 units of the normalised scan {unit} in each of" in text) == (norm == "l2")


def test_runs_of_before_are_compared_and_that_their_unit_is_not_known_is_said(tmp_path):
    made = {
        name: make_run(tmp_path / name, title=name, attacked={"5": dice}, seed=seed, about={"normalisation": noted},
                       files={"plans.json": plans})
        for seed, (name, dice, noted, plans) in enumerate((
            ("A", 0.3, CT, "planned"), ("B", 0.7, None, "planned anew"), ("C", 0.5, None, "planned")
        ))
    }  # fmt: skip
    said = "the run does not tell how its scans were normalised, so it is not known whether its levels are in the same"

    def page(*names: str) -> str:
        out = tmp_path / f"page of {' '.join(names)}"
        return Text(write_report([made[name] for name in names], out).read_text(encoding="utf-8")).text

    text = page("A", "B")
    assert f"B: {said} unit as those of the other models." in text
    assert "B is more robust than A" in text
    # Of one plan both are normalised the same, which the other run tells, or need not.
    text = page("A", "C")
    assert said not in text
    assert "units of the normalised scan (CTNormalization)" in text
    assert said not in page("C")
    older = make_run(tmp_path / "D", title="D", attacked={"5": 0.6}, about={"normalisation": None})
    assert unit_warnings_of(made["C"], older) == []
    assert len(unit_warnings_of(made["B"], older)) == 2
    nameless = {"about": {"normalisation": None}, "files": {"plans.json": None}}
    both = [make_run(tmp_path / title, title=title, **nameless) for title in "EF"]
    assert len(unit_warnings_of(*both)) == 2


def unit_warnings_of(*folders: Path) -> list[str]:
    return list(unit_warning(one_setting(*folders)))


def test_one_name_is_one_model(tmp_path, runs):
    """Of two checkpoints under one name nobody could say whose figures are whose."""
    other = make_run(tmp_path / "other", attacked={"2/255": 0.5}, norm="linf", seed=7, title="nnUNetTrainer")
    with pytest.raises(UserError, match="Two models are both called stock"):
        write_report([runs[0], other], tmp_path / "out", ["stock", "stock"])


def only(folder: Path, *attacks: str) -> Results:
    """A run as if nothing but these attacks had been asked for."""
    run = read_results(folder)
    results = [item for item in run.attacked if item["attack"] in attacks]
    return replace(run, title=run.summary["model"]["trainer"], summary={**run.summary, "results": results})


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Path]:
    """B is better than A under noise and attack, as clearly as can be."""
    root = tmp_path_factory.mktemp("two")
    return [make_run(root / t, attacked={"5": d}, noise={"5": d + 0.1}, title=t, seed=n)
            for n, (t, d) in enumerate((("A", 0.3), ("B", 0.7)))]  # fmt: skip


def test_under_noise_alone_nobody_is_called_more_robust(two):
    """Least of all where one of the models was attacked and the other was not."""
    (setting,) = settings_of([only(two[0], NOISE, ATTACK), only(two[1], NOISE)])
    assert headline(setting) == (
        f"The models share no attack but white noise, so no model is called more robust: A had {NOISE} and {ATTACK} at "
        f"L2 5; B had {NOISE} at L2 5."
    )
    (noise,) = settings_of([only(folder, NOISE) for folder in two])
    assert headline(noise).startswith("No attack was run, only white noise, so no model is called more robust: at L2 5")
    for one in (setting, noise):
        assert (evidence(one), price(one)) == ("", "")
        assert "Clean against robust" not in [drawing.title for drawing in drawings_of(one, colours_of(one.runs))]
        text = Text(_page(one.runs, [one], "")).text
        assert "is more robust than" not in text
        assert "plain noise of the same size" not in text
        assert "white noise, which is no attacker" in text
        assert "by noise alone no model is called more robust" in text
    (alone,) = settings_of([only(two[0], NOISE)])
    assert headline(alone).endswith("; no attack was run, so nothing is said of its robustness.")
    (attacked,) = settings_of([only(folder, NOISE, ATTACK) for folder in two])
    assert headline(attacked).startswith("B is more robust than A")


def test_what_only_one_of_the_models_went_through_is_named(two, tmp_path):
    more = make_run(tmp_path / "C", attacked={"5": 0.3, "8": 0.2}, further={"square": {"5": 0.4, "8": 0.3}}, title="C")
    (setting,) = settings_of([only(two[1], ATTACK), only(more, ATTACK, "square")])
    assert left_out(setting) == (
        f"Not all models had these, so they are left out of every comparison: C: {ATTACK} at L2 8, square at L2 5 and "
        f"8."
    )
    assert left_out(setting) in Text(_page(setting.runs, [setting], "")).text
    assert left_out(one_setting(*two)) == left_out(one_setting(more)) == ""
    other = make_run(tmp_path / "D", attacked={"3": 0.5}, title="D")
    assert headline(one_setting(two[0], other)).endswith(
        f"so nothing can be compared: A had {NOISE} and {ATTACK} at L2 5; D had {ATTACK} at L2 3."
    )


@pytest.mark.parametrize(("norm", "levels"), [("l2", ("5", "5.0")), ("linf", ("8/255", repr(8 / 255)))])
def test_a_level_is_the_same_however_it_is_written(tmp_path, norm, levels):
    made = [
        make_run(tmp_path / title, attacked={level: dice}, noise={level: 0.85}, title=title, seed=number, norm=norm)
        for number, (title, level, dice) in enumerate(zip("AB", levels, (0.3, 0.7), strict=True))
    ]
    setting = one_setting(*made)
    assert [text for text, _ in setting.levels] == [levels[0]]
    assert headline(setting).startswith("B is more robust than A")
    assert left_out(setting) == ""
    table = robustness_table(setting)
    assert len(table.rows) == 4
    assert all("–" not in cell.text for row in table.rows for cell in row)
    page = Text(write_report(made, tmp_path / "out").read_text(encoding="utf-8")).text
    assert "The same samples, model by model" in page


def test_an_attack_is_the_same_whatever_the_order_of_its_settings_and_if_defaults_are_written_out():
    assert same_attack("apgd:steps=20,loss=dlr", "apgd:loss=dlr,steps=20")
    assert same_attack("pgd", "pgd:restarts=1")
    assert same_attack("of-next-year:a=1", "of-next-year:a=1")
    assert not same_attack("of-next-year:a=1", "of-next-year:a=2")
    assert not same_attack("pgd:steps=20", "pgd:steps=40")
    assert not same_attack("autoattack", "autoattack:mode=threshold")


def test_attacks_that_share_a_name_and_nothing_more_are_not_compared(tmp_path):
    """As when another version hits harder under the same name."""
    harder = {ATTACK: {"attack": "apgd", "steps": 4, "loss": "balanced-ce"}, "square": {"attack": "square", "steps": 4}}
    made = [
        make_run(tmp_path / title, attacked={"5": dice}, further={"square": {"5": dice + 0.05}}, title=title, seed=seed,
                 about={"attacks": noted} if noted else {})
        for seed, (title, dice, noted) in enumerate((("A", 0.3, None), ("B", 0.7, harder), ("C", 0.5, None)))
    ]  # fmt: skip
    named = f"The attack {ATTACK} of B is not that of A (loss: None there, balanced-ce here)."
    setting = one_setting(*made[:2])
    assert setting.attacks == ["square"]
    assert left_out(setting) == (
        f"Not all models had these, so they are left out of every comparison: A: {ATTACK} at L2 5; B: {ATTACK} at L2 "
        f"5. {named}"
    )
    assert left_out(setting) in Text(_page(setting.runs, [setting], "")).text
    assert headline(setting).startswith("B is more robust than A: at L2 5, under square, it holds")
    # Of those that note the same, or nothing, names say which are the same.
    assert one_setting(made[0], made[2]).attacks == [ATTACK, "square"]
    older = make_run(tmp_path / "D", attacked={"5": 0.4}, title="D", about={"attacks": None})
    assert one_setting(made[1], older).attacks == [ATTACK]
    assert left_out(one_setting(made[0], older)).count("is not that of") == 0
    # And where nothing else is left, nothing is compared.
    (nothing,) = settings_of([only(folder, ATTACK) for folder in made[:2]])
    assert headline(nothing) == (
        f"No attack was run on all models at the same levels, so nothing can be compared: A had {ATTACK} at L2 5; B "
        f"had {ATTACK} at L2 5. {named}"
    )


def test_all_pairs_of_models_are_compared_and_p_is_corrected_for_them(tmp_path):
    made = [make_run(tmp_path / t, attacked={"5": d, "8": d - 0.1}, title=t, seed=n) for n, (t, d) in
            enumerate((("A", 0.3), ("B", 0.7), ("C", 0.5), ("D", 0.505)))]  # fmt: skip
    setting = one_setting(*made)
    table = difference_table(setting)
    assert table.head[:7] == ["model", "against", "level", "TVDI", "95 % interval", "p", "p (Holm)"]
    for level in ("clean", "L2 5", "L2 8", "mean of the levels"):
        mine = [row for row in table.rows if row[2].text == level]
        assert [(row[0].text, row[1].text) for row in mine] == [
            ("B", "A"), ("C", "A"), ("D", "A"), ("C", "B"), ("D", "B"), ("D", "C")
        ]  # fmt: skip
        assert [row[6].number for row in mine] == holm([row[5].number for row in mine])
    assert "after Holm's correction for 6 pairs of models, those of the same level and figure" in table.note
    (row,) = (row for row in table.rows if [cell.text for cell in row[:3]] == ["B", "A", "L2 5"])
    assert row[3].number == pytest.approx(40, abs=4)
    # The headline's claims stand on the corrected ones.
    a, b, *_ = setting.runs
    corrected = setting.corrected_mean_difference(b, a)
    assert corrected.p == pytest.approx(6 * setting.mean_difference(b, a).p)
    assert evidence(setting).endswith(
        f"(p {corrected.p:.3f} after Holm's correction for 6 pairs of models). With 8 cases no p can be below 0.008 "
        f"before that correction."
    )
    two = one_setting(*made[:2])
    assert "p (Holm)" not in difference_table(two).head
    assert "Holm" not in difference_table(two).note + evidence(two)


def test_a_difference_that_the_correction_makes_uncertain_is_not_called_one(tmp_path):
    """Of 8 cases p is 0.008 at the least: of five models, ten pairs, none is below 5 % any more."""
    made = [make_run(tmp_path / str(n), attacked={"5": 0.3 + 0.1 * n}, title=f"M{n}", seed=n) for n in range(5)]
    assert "is more robust than" in headline(one_setting(*made[3:]))
    setting = one_setting(*made)
    assert "No model is clearly more robust" in headline(setting)
    # That it is so of any five models, however they differ, is said.
    said = (
        "With 8 cases no p can be below 0.008 before that correction, nor below 0.078 after it, so no model can be "
        "called more robust than another."
    )
    assert evidence(setting).endswith(said)
    assert said in difference_table(setting).note
    assert "nor below" not in one_setting(*made[1:]).p_note


@pytest.mark.parametrize(("cases", "robust"), [(11, False), (12, True)])
def test_of_many_models_one_can_still_be_called_more_robust_or_it_is_said_that_none_can(tmp_path, cases, robust):
    """Eleven models, 55 pairs, as far apart as can be; 11 cases can be swapped in 2,048 ways, 12 in twice as many."""
    made = [
        make_run(tmp_path / str(n), attacked={"5": 0.08 * n}, title=f"M{n}", cases=cases, tiles=1, whole_cases=False)
        for n in range(11)
    ]
    setting = one_setting(*made)
    assert len(setting.pairs) == 55
    assert headline(setting).startswith("M10 is more robust than M9, M8, M7") == robust
    said = "With 11 cases no p can be below 0.001 before that correction, nor below 0.054 after it, so no model can be"
    assert (said in evidence(setting)) != robust
    assert (setting.p_note == "") == robust


def test_a_difference_is_the_same_from_both_sides(two):
    setting = one_setting(*two)
    a, b = setting.runs
    for one, other in ((setting.difference(a, b, "5"), setting.difference(b, a, "5")),
                       (setting.mean_difference(a, b), setting.mean_difference(b, a))):  # fmt: skip
        value, low, high = one.interval
        assert other == ((-value, -high, -low), one.p)
        assert value < 0


def test_the_spread_of_each_class_over_cases_is_shown_clean_beside_attacked(tmp_path):
    """The second class is lost, the first is not: the mean of both would hide it."""
    whole = make_run(tmp_path / "whole", attacked={"5": 0.4}, classes=("large", "small"))
    samples = make_run(tmp_path / "samples", attacked={"5": 0.4}, whole_cases=False, classes=("large", "small"))
    for folder, origin in ((whole, "nnU-Net's, of whole cases"), (samples, "of each case's attacked samples")):
        setting = one_setting(folder)
        run = setting.runs[0]
        table = class_spread_table(setting)
        assert origin in table.note
        assert [[cell.text for cell in row[:4]] for row in table.rows] == [
            [name, "nnUNetTrainerSTD", condition, "8"]
            for name in ("large", "small")
            for condition in ("clean", f"{ATTACK}, L2 5")
        ]
        for row, (number, key) in zip(
            table.rows, [(n, k) for n in (0, 1) for k in (UNTOUCHED, (ATTACK, "5"))], strict=True
        ):
            if folder == whole:
                dice = [scores["dice"][number] for scores in run.cases[key].values()]
            else:
                counts = run.samples[key].by_case()[1][:, number]
                dice = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in counts]
            wanted = [np.quantile(dice, share) for share in (0, 0.25, 0.5, 0.75, 1)]
            assert [cell.number for cell in row[4:]] == pytest.approx(wanted)
        (drawing,) = (one for one in drawings_of(setting, colours_of([run])) if one.title == "By class")
        for name in ("large", "small"):
            for condition in ("clean", "attacked"):
                assert f"nnUNetTrainerSTD, {name}, {condition}: median" in drawing.picture


def test_many_classes_are_drawn_in_several_charts(tmp_path):
    names = tuple(f"structure number {number}" for number in range(15))
    setting = one_setting(make_run(tmp_path / "run", classes=names, cases=3, tiles=1))
    drawn = [one for one in drawings_of(setting, colours_of(setting.runs)) if one.title.startswith("By class")]
    assert len(drawn) == 2
    for number, name in enumerate(names):
        assert sum(f", {name}, clean: median" in one.picture for one in drawn) == 1
        assert f", {name}, clean: median" in drawn[number // 12].picture


def test_distances_of_a_case_stand_clean_beside_attacked(tmp_path):
    setting = one_setting(make_run(tmp_path / "run", attacked={"5": 0.4}))
    run = setting.runs[0]
    table = case_table(setting)
    assert table.head == [
        "case", "model", "Dice clean", "Dice at L2 5", "HD95 clean", "HD95 at L2 5", "surface Dice clean",
        "surface Dice at L2 5",
    ]  # fmt: skip
    row = next(row for row in table.rows if row[0].text == "case_002")
    for place, key in enumerate((UNTOUCHED, (ATTACK, "5"))):
        scores = run.cases[key]["case_002"]
        assert row[4 + place].number == pytest.approx(np.mean(scores["hd95_mm"]))
        assert row[6 + place].number == pytest.approx(np.mean(scores["surface_dice_1mm"]))
    # A class that is gone has no distance: the mean of the rest is not that of all.
    scores = {**run.cases[(ATTACK, "5")]["case_002"], "hd95_mm": [3.0, float("nan")]}
    cases = {**run.cases, (ATTACK, "5"): {**run.cases[(ATTACK, "5")], "case_002": scores}}
    (lost,) = settings_of([replace(run, cases=cases)])
    row = next(row for row in case_table(lost).rows if row[0].text == "case_002")
    assert (row[5].text, row[5].note, row[4].note) == ("3.0", "1 of 2 classes", "")


# ---- how to repeat it


def test_the_command_of_a_run_made_in_parts_makes_the_whole_of_it():
    whole = "nnunet_ima evaluate -d 4 -c 2d -o 'my run' --levels 5 10"
    for part in ("-num_parts 2 -part_id 1", "-part_id=1 -num_parts=2", "-part_id 0 -num_pa 3"):
        shown = without_parts(f"{whole} {part}")
        assert shown == whole
        assert _parser().parse_args(shlex.split(f"{whole} {part}")[1:]).num_parts > 1
        assert _parser().parse_args(shlex.split(shown)[1:]).num_parts == 1
    assert without_parts(whole) == whole
    assert without_parts("nnunet_ima evaluate -o it's") == "nnunet_ima evaluate -o it's"


def test_everything_that_is_known_of_a_run_is_shown(tmp_path):
    run = read_results(make_run(tmp_path / "run", attacked={"5": 0.5}, members={"apgd-ce": {"5": 0.5}}))
    training = {"epsilon": 15.0, "delta_epsilon": 2.0, "steps": 20, "num_epochs": 50, "initial_lr": 0.01}
    exported = {"trainer": "nnUNetTrainerIMA", "training": training}
    command = "nnunet_ima evaluate -d 4 -num_parts 2 -part_id 0"
    told = {"training": training, "exported_from": exported, "gpu": "A GPU", "threads": 3, "batch_size": 32,
            "command": command}  # fmt: skip
    run = replace(run, summary={**run.summary, **told})
    page = Text(_page([run], settings_of([run]), "")).text
    shown = settings_of_run(run)
    assert {name: shown[name] for name in told if name != "command"} == {
        k: v for k, v in told.items() if k != "command"
    }
    for name in ("training", "exported_from", "gpu", "threads", "batch_size", "levels", "versions"):
        assert f'"{name}": ' in page
    assert '"delta_epsilon": 2.0' in page
    assert "nnunet_ima evaluate -d 4 # It was run in parts" in page


# ---- tables for other programs

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
cells = st.builds(Cell, texts, st.floats(), st.booleans(), texts)


tables_of = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(texts, min_size=n, max_size=n), st.lists(st.lists(cells, min_size=n, max_size=n), max_size=4)
    )
)


@given(tables_of)
def test_tables_keep_their_shape_whatever_stands_in_them(content):
    head, rows = content
    table = Table("title", head, rows)
    lines = [line for line in as_markdown(table).split("\n") if line.startswith("| ")]
    assert len(lines) == 2 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(head) + 1 for line in lines)
    body = as_latex(table).split("\\midrule")[1].split("\\bottomrule")[0]
    assert body.count(r" \\") >= len(rows)
    assert not re.search(r"(?<!\\)[#$%_]", body)


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_its_values_and_a_few_ticks(values, logarithmic):
    axis = axis_around("", values, logarithmic)
    for value in values:
        assert -1e-9 <= axis.place(max(value, 1.0) if logarithmic else value) <= 1 + 1e-9
    assert 2 <= len(axis.ticks) <= 22
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks)


# ---- bad input

NASTY = "<script>alert(1)</script>&\"'"


def test_a_name_that_is_html_is_shown_and_not_run(tmp_path):
    run = make_run(
        tmp_path / "run",
        # A name is a file's name, so it has no slash.
        case_name="<img src=x onerror=alert(1)>&{:03d}",
        title="</style><script>alert(2)</script>",
        classes=("<b>bold</b>", "{{ 7 * 7 }}"),
    )
    content = write_report([run], tmp_path / "out", [NASTY], note=NASTY, caveat=NASTY).read_text(encoding="utf-8")
    parsed = Text(content)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert sum(tag == "b" for tag, attributes in parsed.tags) < 30
    assert not any("onerror" in attributes for _, attributes in parsed.tags)
    assert "<img src=x onerror=alert(1)>&001" in parsed.text
    assert "{{ 7 * 7 }}" in parsed.text
    markdown = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)>&amp;001" in markdown
    assert "&lt;script>" in markdown
    assert "# &lt;/style>" in (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    for text in (markdown, (tmp_path / "run" / "table.md").read_text(encoding="utf-8")):
        assert "<" not in text
        assert not re.search("&(?!amp;|lt;)", text)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["report", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    return error


def test_what_cannot_be_reported_is_said(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert "summary.json is missing" in refused(capsys, tmp_path / "nothing", "-o", out)
    assert "one name for each run" in refused(capsys, runs[0], runs[1], "--names", "A", "-o", out)
    assert "both called" in refused(capsys, runs[0], runs[0], "-o", out)
    assert "both called A" in refused(capsys, runs[0], runs[1], "--names", "A", "A", "-o", out)
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(capsys, runs[0], "-o", tmp_path / "file")
    assert not out.exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_models_of_one_trainer_are_told_apart(tmp_path):
    same = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    with pytest.raises(UserError, match="tell them apart with --names"):
        write_report(same, tmp_path / "out")
    assert write_report(same, tmp_path / "out", ["first", "second"]).is_file()


def test_an_exported_model_is_named_by_what_trained_it_and_nothing_is_called_stock_that_may_not_be(tmp_path):
    run = read_results(make_run(tmp_path / "run", title="nnUNetTrainer"))
    assert _titles([run]) == ["nnUNetTrainer"]
    exported = replace(run, summary={**run.summary, "exported_from": {"trainer": "nnUNetTrainerIMA_50epochs"}})
    assert _titles([exported]) == ["IMA_50epochs exported"]


def test_a_path_with_spaces_and_umlauts(runs, tmp_path):
    odd = tmp_path / "Prüfung der Geräte" / "Läufe 1"
    shutil.copytree(runs[0], odd)
    assert write_report([odd], tmp_path / "Bericht für Anne").is_file()


# ---- in a browser


@pytest.fixture
def tab(browser, page) -> Iterator[Any]:
    """The page, opened; at the end nothing may have been complained about or asked of the network."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page.as_uri())
    yield opened
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    opened.close()


def test_it_opens_and_everything_is_visible(tab):
    assert tab.title() == "Robustness report"
    for image in tab.locator("img").all():
        assert image.evaluate("image => image.naturalWidth") > 50
    for drawing in tab.locator("svg.chart").all():
        assert drawing.bounding_box()["height"] > 100
    # Nothing sticks out to the side but what scrolls by itself.
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    tab.set_viewport_size({"width": 380, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_slider_uncovers_the_perturbed_image(tab):
    slider = tab.locator(".slider").first
    after = slider.locator("img.after")

    def cut() -> float:
        return float(re.search(r"([\d.]+)%", after.evaluate("image => getComputedStyle(image).clipPath")).group(1))

    assert cut() == 50
    for value in (0, 100, 25):
        slider.locator("input").fill(str(value))
        assert cut() == pytest.approx(value, abs=0.1) or (value == 0 and cut() < 1)
    slider.locator("input").focus()
    tab.keyboard.press("ArrowRight")
    assert cut() == pytest.approx(26, abs=0.1)


def test_tables_sort_by_number_and_by_name(tab):
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    tables = tab.locator("table.sortable")
    assert tables.count() > 5
    for number in range(tables.count()):
        table = tables.nth(number)
        heads = table.locator("thead button")
        before = sorted(table.locator("tbody tr").all_inner_texts())
        for column in range(heads.count()):
            for direction in ("descending", "ascending"):
                heads.nth(column).click()
                assert table.locator("th").nth(column).get_attribute("aria-sort") == direction
                numbers = [
                    float(value)
                    for value in table.locator(f"tbody td:nth-child({column + 1})").evaluate_all(
                        "cells => cells.map(cell => cell.dataset.number ?? NaN)"
                    )
                ]
                known = [value for value in numbers if not np.isnan(value)]
                assert known == sorted(known, reverse=direction == "descending")
                # What has no number stands together at one end.
                assert np.isnan(numbers[len(known) :]).all() or np.isnan(numbers[: len(numbers) - len(known)]).all()
        assert sorted(table.locator("tbody tr").all_inner_texts()) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(tab, scheme):
    tab.emulate_media(color_scheme=scheme)

    def brightness(selector: str, of: str) -> float:
        colour = tab.locator(selector).first.evaluate(f"element => getComputedStyle(element).{of}")
        values = [float(value) for value in re.findall(r"[\d.]+", colour)]
        if len(values) == 4 and values[3] == 0:  # see-through: what the browser paints behind everything
            return 255.0 if scheme == "light" else 18.0
        return sum(values[:3]) / 3

    paper = brightness("body", "backgroundColor")
    for selector, of in (("h1", "color"), (".note", "color"), ("td", "color"), (".chart text", "fill")):
        assert abs(brightness(selector, of) - paper) > 90, selector


def test_it_prints(tab, tmp_path):
    tab.pdf(path=str(tmp_path / "report.pdf"))
    assert (tmp_path / "report.pdf").stat().st_size > 20_000


def test_what_is_folded_on_the_screen_is_open_on_paper_and_nothing_is_cut(tab):
    folded = tab.locator("details:not([open])")
    closed = folded.count()
    assert closed > 3
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded.count() == 0
    # A4 less its margins, at 96 dots an inch.
    tab.set_viewport_size({"width": 718, "height": 1000})
    tab.emulate_media(media="print")
    for table in tab.locator("table").all():
        assert table.evaluate("table => table.scrollWidth") <= 718
    before, after = (tab.locator(f".slider img{which}").first.bounding_box() for which in (":first-child", ".after"))
    assert before["x"] + before["width"] <= after["x"]  # side by side
    tab.emulate_media(media="screen")
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folded.count() == closed


def test_many_models_with_long_names_fit_on_paper(browser, tmp_path):
    titles = [f"nnUNetTrainerTRADES{number}" for number in range(4)]
    runs = [make_run(tmp_path / title, title=title, seed=number) for number, title in enumerate(titles)]
    page = write_report(runs, tmp_path / "out", titles)
    opened = browser.new_page(viewport={"width": 718, "height": 1000})
    opened.goto(page.as_uri())
    opened.emulate_media(media="print")
    for table in opened.locator("table").all():
        assert table.evaluate("table => table.scrollWidth") <= 718
    opened.close()


def test_a_long_name_does_not_make_a_telephones_page_wider(browser, tmp_path):
    name = "nnUNetTrainerTRADES_of_a_study_with_long_names"
    runs = [make_run(tmp_path / title, title=title, attacked={"5": dice}) for title, dice in (("A", 0.3), ("B", 0.7))]
    page = write_report(runs, tmp_path / "out", ["A", name])
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    opened.goto(page.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    opened.close()


def test_on_a_telephone_the_first_column_stays(tab):
    tab.set_viewport_size({"width": 380, "height": 800})
    box = tab.locator(".scroll").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    name = box.locator("tbody td").first
    before = name.bounding_box()["x"]
    box.evaluate("box => box.scrollTo(60, 0)")
    assert name.bounding_box()["x"] == pytest.approx(before, abs=1)


def test_a_run_that_attacked_whole_cases_says_how_much_survives(tmp_path):
    """Of whole cases that lose 20 points more than what is carried over."""
    folder = make_run(
        tmp_path / "run", clean=0.9, attacked={"5": 0.7, "10": 0.5}, noise={"5": 0.9, "10": 0.9}, end_to_end=0.2
    )
    results = read_results(folder)
    whole = results.figures((ATTACK, "10"))["end_to_end"]
    lost = whole["samples_dice_unperturbed"] - whole["samples_dice"]
    assert lost == pytest.approx(0.4, abs=0.05)
    assert whole["survives_carried_over"] == pytest.approx(0.4 / lost)
    assert whole["survives_end_to_end"] == pytest.approx(0.6 / lost)
    # Of an attack that takes nothing there is no share.
    assert results.figures((NOISE, "10"))["end_to_end"]["survives_end_to_end"] is None
    page = write_report([folder], tmp_path / "out")
    shown = Text(page.read_text(encoding="utf-8"))
    level = "5"  # that of the sentence
    told = results.figures((ATTACK, level))["end_to_end"]
    words = " ".join(" ".join(shown.shown).split())
    assert (
        f"whole cases lose {100 * told['survives_carried_over']:.0f} % when the perturbation is carried over, and "
        f"{100 * told['survives_end_to_end']:.0f} % when the attack goes through nnU-Net's sliding window" in words
    )
    tables = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    (row,) = (line for line in tables.splitlines() if f"| {ATTACK} | 10 | no |" in line and line.count("|") == 12)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6] == f"{100 * whole['case_dice']:.1f}"
    assert cells[8] == f"{100 * whole['survives_end_to_end']:.1f}"


def test_without_such_an_attack_nothing_is_said_of_it(runs, page):
    assert "with no more in any window" not in (page.parent / "tables.md").read_text(encoding="utf-8")
    assert "whole cases lose" not in page.read_text(encoding="utf-8")
