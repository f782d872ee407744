"""The report: what it says, its tables, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_of_runs import ATTACK, ENSEMBLE, NOISE, make_run

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.outcomes import LOTS_KEPT, SampleKey, SampleScore, drawn_by_lot
from nnunet_ima.evaluation.report import write_report
from nnunet_ima.evaluation.report.charts import axis_around
from nnunet_ima.evaluation.report.figures import Setting, settings_of
from nnunet_ima.evaluation.report.pictures import perturbation
from nnunet_ima.evaluation.report.published import published_for
from nnunet_ima.evaluation.report.report import _page
from nnunet_ima.evaluation.report.sentences import headline, price
from nnunet_ima.evaluation.report.tables import (
    Cell,
    Table,
    _signed,
    as_csv,
    as_latex,
    as_markdown,
    further_table,
    robustness_table,
)
from nnunet_ima.evaluation.results import UNTOUCHED, read_results

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
        assert [model for model, _ in row] == ["stock", "IMA"]
        assert len({sample for _, sample in row}) == 1
    # Not those that one of them lost most on.
    drawn = [f"{case}, tile {tile}" for case, tile in (score.sample for score in drawn_by_lot(scores_of(runs[0])))]
    assert [row[0][1] for row in rows] == drawn * 2


def scores_of(run: Path) -> list[SampleScore]:
    table = read_results(run).samples[UNTOUCHED]
    rows = zip(table.cases.tolist(), table.tiles.tolist(), table.counts, strict=True)
    return [SampleScore(SampleKey(case, tile), counts, 1, 1, 0, 0, 1) for case, tile, counts in rows]


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
            rf"IMA is more robust than stock: at {level}, under {ATTACK}, it holds {share} Dice "
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
    parts += " | Margins in training | Beside the published figures | By class | How to repeat this"
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
            f"than stock (p 0.008). With 8 cases no p can be below 0.008." in text
        )
        samples = [run.samples[UNTOUCHED] for run in (ima, stock)]
        by_sample = [100 * float(table.dice.mean()) for table in samples]
        assert f"(ADI): {by_sample[0]:.1f} % against {by_sample[1]:.1f} %" in text
        assert f"L2 5 is {5 / (24 * 20) ** 0.5:.2g} z-scores in each of a patch's 480 voxels" in text
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


def test_every_table_number_is_that_of_the_runs(page, runs):
    rows = [line for line in csv.reader(io.StringIO((page.parent / "tables.csv").read_text(encoding="utf-8"))) if line]
    start = next(i for i, row in enumerate(rows) if row[0].startswith("TVDI under each attack"))
    assert rows[start + 1] == ["model", "attack", "clean", "L2 5", "L2 10", "L2 15", "Avg"]
    table = {(row[0], row[1]): row[2:] for row in rows[start + 2 : start + 6]}
    for folder, title in zip(runs, ("stock", "IMA"), strict=False):
        results = read_results(folder)
        for attack in (NOISE, ATTACK):
            keys = [("clean", "0"), *((attack, level) for level in ("5", "10", "15"))]
            wanted = [100 * float((results.figures(key) or {})["tvdi"]) for key in keys]
            shown = [float(cell.split()[0]) for cell in table[title, attack]]
            assert shown == pytest.approx([*wanted, sum(wanted) / 4], abs=0.051)


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
    assert "Against STD" not in page


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


def test_published_figures_stand_with_their_protocol():
    def rows(dataset: str, protocol: str, norm: str) -> list[Any]:
        return published_for({"model": {"dataset": dataset}, "protocol": {"name": protocol, "norm": norm}})

    paper = rows("Dataset002_Heart", "paper", "linf")
    assert {row.method: row.levels["2/255"] for row in paper}["IMA"] == 71.58
    assert all("Table 3" in row.source for row in paper)
    sound = rows("Dataset002_Heart", "sound", "l2")
    assert {row.method: row.levels["15"] for row in sound}["IMA"] == 69.34
    assert all("PGD" in row.source for row in sound)
    assert rows("Dataset002_Heart", "sound", "linf") == []
    assert rows("Dataset042_Mine", "paper", "l2") == []


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
    one = make_run(tmp_path / "a", attacked={"5": 0.3}, further={"square": {"5": 0.5}}, title="A")
    two = make_run(tmp_path / "b", attacked={"5": 0.6}, further={"square": {"5": 0.4}}, title="B", seed=1)
    setting = one_setting(one, two)
    first, second = setting.runs
    assert setting.worst(first, "5")[0] == ATTACK
    assert setting.worst(second, "5")[0] == "square"
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


def test_one_name_is_one_model(tmp_path, runs):
    """Of two checkpoints under one name nobody could say whose figures are whose."""
    other = make_run(tmp_path / "other", attacked={"2/255": 0.5}, norm="linf", seed=7, title="nnUNetTrainer")
    with pytest.raises(UserError, match="Two models are both called stock"):
        write_report([runs[0], other], tmp_path / "out", ["stock", "stock"])


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
    read = list(csv.reader(io.StringIO(as_csv(table))))
    assert read[0] == head or head == [""]
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
    content = write_report([run], tmp_path / "out", [NASTY], note=NASTY).read_text(encoding="utf-8")
    parsed = Text(content)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert sum(tag == "b" for tag, attributes in parsed.tags) < 30
    assert not any("onerror" in attributes for _, attributes in parsed.tags)
    assert "<img src=x onerror=alert(1)>&001" in parsed.text
    assert "{{ 7 * 7 }}" in parsed.text


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
