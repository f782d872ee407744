"""Tables of a report, for the page and as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from nnunet_ima.evaluation.metrics import nan_mean
from nnunet_ima.evaluation.report.figures import Setting, tvdi
from nnunet_ima.evaluation.report.published import published_for
from nnunet_ima.evaluation.report.sentences import probability
from nnunet_ima.evaluation.results import UNTOUCHED
from nnunet_ima.evaluation.statistics import Difference

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "→": r"$\to$", "ε": r"$\varepsilon$",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, the number to sort by, whether it is the best of its column, and more about it."""

    text: str
    number: float = float("nan")
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first ``names`` columns are text."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    note: str = ""
    names: int = 1


def robustness_table(setting: Setting) -> Table | None:
    """Table 3's layout: a row for each attack and model, clean and all levels, and their mean; the best in bold."""
    if not setting.attacks:
        return None
    clamped = setting.start != UNTOUCHED
    starts = [("clean", UNTOUCHED), *([("clamp only", setting.start)] if clamped else [])]
    head = ["model", "attack", *(name for name, _ in starts)]
    head += [*(f"{setting.norm_name} {text}" for text, _ in setting.levels), "Avg"]
    rows: list[list[Cell]] = []
    for attack in setting.attacks:
        columns = []
        keys = [*(key for _, key in starts), *((attack, text) for text, _ in setting.levels)]
        for key in keys:
            intervals = [setting.interval(run, key) for run in setting.runs]
            columns.append(_marked([_dice(one.value, one.low, one.high) for one in intervals]))
        columns.append(_marked([_dice(setting.mean_over_levels(run, attack)) for run in setting.runs]))
        for run, *cells in zip(setting.runs, *columns, strict=True):
            rows.append([Cell(run.title), Cell(attack), *cells])
    note = (
        f"TVDI in %, with 95 % intervals (bootstrap over {setting.unit_resampled}; they say what other scans would "
        f"change, not what another training would). Avg is the mean of clean and all levels, as in Table 3 of the "
        f"IMA paper (arXiv 2005.09147). Bold: the best model of a column, for each attack."
    )
    if clamped:
        note += " Clamp only: what the protocol does to the scans before any attack."
    note += setting.choice_note
    return Table(f"TVDI under each attack: {setting.name}", head, rows, note, names=2)


def difference_table(setting: Setting) -> Table | None:
    """Each model against the first one given, case by case."""
    if len(setting.runs) < 2 or not setting.comparable or not setting.attacks:
        return None
    first = setting.runs[0]
    rows = []
    for run in setting.runs[1:]:
        for level in (None, *(text for text, _ in setting.levels)):
            where = "clean" if level is None else f"{setting.norm_name} {level}"
            dice, own = setting.difference(run, first, level), setting.adi_difference(run, first, level)
            rows.append([Cell(run.title), Cell(where), *_difference_cells(dice), *_difference_cells(own)])
        mean = setting.mean_difference(run, first)
        rows.append([Cell(run.title), Cell("mean of the levels"), *_difference_cells(mean), *_difference_cells(None)])
    note = (
        f"Points more (+) or less (-) than {first.title}, on the same samples, each model under the attack that is "
        f"worst for its TVDI: 95 % interval by paired bootstrap over {setting.unit_resampled}, p by a permutation test "
        f"that swaps what the two models reached on one of them. Not corrected for the number of comparisons; whether "
        f"a model is called more robust is asked once, of the mean of the levels.{setting.p_note}{setting.choice_note}"
    )
    head = ["model", "level", "TVDI", "95 % interval", "p", "ADI", "95 % interval (ADI)", "p (ADI)"]
    return Table(f"Against {first.title}: {setting.name}", head, rows, note, names=2)


def _difference_cells(found: Difference | None) -> list[Cell]:
    """Points, interval and p."""
    if found is None:
        return [Cell("–")] * 3
    value, low, high = (100 * end for end in found.interval)
    shown = f"{_signed(low)} to {_signed(high)}" if found.interval.known else "too little to tell"
    return [Cell(_signed(value), value), Cell(shown, low), Cell(probability(found.p), found.p)]


def _signed(points: float) -> str:
    """``+1.2`` or ``-0.3``; what rounds to nothing has no sign."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def further_table(setting: Setting) -> Table:
    """All other figures."""
    head = ["model", "attack", "level", "TVDI", "TVDI of lowest Dice", "ADI", "correct", "case Dice", "HD95 (mm)"]
    head += ["surface Dice", "passes"]
    rows = []
    for run in setting.runs:
        clamped = [("none, clamped", run.summary["clamp_only"])] if "clamp_only" in run.summary else []
        attacked = [(str(item["attack"]), item) for item in run.attacked]
        for name, figures in (("none (clean)", run.summary["clean"]), *clamped, *attacked):
            passes = figures.get("forward_passes_per_sample")
            backward = figures.get("backward_passes_per_sample")
            names = ("tvdi", "tvdi_of_lowest_dice", "adi", "robust_share", "case_dice")
            shares = [figures.get(name) for name in names]
            spent = None if passes is None else float(passes) + float(backward)
            rows.append([
                Cell(run.title), Cell(name), Cell(figures.get("level", "0")),
                *(_dice(_number(share)) for share in shares), _plain(figures["hd95"], ".1f"),
                _dice(_number(figures["surface_dice"])), _plain(spent, ".0f"),
            ])  # fmt: skip
    note = (
        "Dice and shares in %. TVDI of lowest Dice: that of the images on which each sample has its lowest Dice, of "
        "which all other figures are; only of an ensemble it is another than TVDI. Correct: samples with a Dice above "
        "the threshold. Case Dice is nnU-Net's own, of whole cases through its sliding window; HD95 and surface Dice "
        "(1 mm) are means over cases. Passes: forward and backward passes of a sample that the attack spent; a sample "
        "that has come to Dice 0 is left alone."
    )
    return _without_empty_columns(Table(f"All figures: {setting.name}", head, rows, note, names=3))


def _without_empty_columns(table: Table) -> Table:
    """What no row has is said once, under the table."""
    empty = [number for number in range(len(table.head)) if all(row[number].text == "–" for row in table.rows)]
    if not empty or not table.rows:
        return table
    kept = [number for number in range(len(table.head)) if number not in empty]
    missing = ", ".join(table.head[number] for number in empty)
    return replace(
        table,
        head=[table.head[number] for number in kept],
        rows=[[row[number] for number in kept] for row in table.rows],
        note=f"{table.note} None of these runs has figures for: {missing}.",
    )


def end_to_end_table(setting: Setting) -> Table | None:
    """Whole cases: what is carried over from the samples beside an attack through the sliding window."""
    head = ["model", "attack", "level", "mirroring known", "samples' Dice", "case Dice, carried over", "end to end"]
    head += ["survives, carried over", "survives, end to end", "HD95 (mm)", "surface Dice"]
    rows = []
    for run in setting.runs:
        for item in run.attacked:
            if "end_to_end" not in item:
                continue
            whole, about = item["end_to_end"], run.summary["end_to_end"]
            shares = (
                whole["samples_dice"], item["case_dice"], whole["case_dice"], whole["survives_carried_over"],
                whole["survives_end_to_end"],
            )  # fmt: skip
            rows.append([
                Cell(run.title), Cell(str(item["attack"])), Cell(str(item["level"])),
                Cell("yes" if about["mirroring_known_to_the_attack"] else "no" if about["mirrored_axes"] else "none"),
                *(_dice(_number(share)) for share in shares), _plain(whole["hd95"], ".1f"),
                _dice(_number(whole["surface_dice"])),
            ])  # fmt: skip
    note = (
        "Dice and shares in %. Carried over: the perturbed samples put together. End to end: gradients through "
        "nnU-Net's sliding window, with no more in any window than the samples; HD95 and surface Dice are "
        "of this. Survives: the share of the Dice lost by the samples of a case that the case loses too."
    )
    return Table(f"Whole cases, end to end: {setting.name}", head, rows, note, names=4) if rows else None


def case_table(setting: Setting) -> Table | None:
    """Every case: Dice clean and at the telling level, for each model; with distances where there is a case level."""
    level = setting.telling_level
    if level is None:
        return None
    at = f"{setting.norm_name} {level}"
    # One kind of Dice for all, or they could not be compared.
    whole = all(run.cases.get(key) for run in setting.runs for key in (UNTOUCHED, setting.worst(run, level)))
    head, columns = ["case"], []
    for run in setting.runs:
        head += [f"{run.title}: Dice clean", f"{run.title}: Dice at {at}"]
        columns += [run.case_dice(UNTOUCHED, whole), run.case_dice(setting.worst(run, level), whole)]
    names = sorted({name for column in columns for name in column})
    rows = [[Cell(name), *(_dice(column.get(name, float("nan"))) for column in columns)] for name in names]
    for kind, title in (("hd95_mm", "HD95 (mm)"), ("surface_dice_1mm", "surface Dice")) if whole else ():
        for run in setting.runs:
            head.append(f"{run.title}: {title} at {at}")
            for row in rows:
                value = nan_mean(run.cases[setting.worst(run, level)].get(row[0].text, {}).get(kind, []))
                row.append(_plain(value, ".1f") if kind == "hd95_mm" else _dice(value))
    origin = "nnU-Net's, of the whole case" if whole else "of the case's attacked samples, as TVDI pools them"
    note = f"Dice in %, mean of the classes, {origin}; each model under the attack that is worst for it."
    return Table(f"Case by case: {setting.name}", head, rows, note)


def published_table(setting: Setting) -> Table | None:
    """The paper's figures for this data set, norm and protocol beside ours."""
    published = published_for(setting.runs[0].summary)
    if not published or not setting.attacks:
        return None
    levels = sorted({*dict(setting.levels), *(text for row in published for text in row.levels)}, key=Fraction)
    head = ["model", "source", "clean", *(f"{setting.norm_name} {text}" for text in levels)]
    here = dict(setting.levels)
    rows = [
        [Cell(run.title), Cell("here, worst attack that was run"), _dice(tvdi(run, UNTOUCHED)),
         *(_dice(tvdi(run, setting.worst(run, text))) if text in here else Cell("–") for text in levels)]
        for run in setting.runs
    ]  # fmt: skip
    rows += [
        [Cell(row.method), Cell(row.source), _plain(row.clean, ".1f"),
         *(_plain(row.levels.get(text), ".1f") for text in levels)]
        for row in published
    ]  # fmt: skip
    note = (
        "Dice in %. The paper's figures are of other networks, trainings and cases; they belong to the protocol "
        f"{setting.protocol} and say where one would expect to be, no more."
    )
    return Table(f"Beside the published figures: {setting.name}", head, rows, note, names=2)


def class_table(setting: Setting) -> Table | None:
    """Dice of each class, pooled over samples, clean and at the telling level."""
    level = setting.telling_level
    classes = [str(name) for name in setting.runs[0].summary["classes"]]
    if level is None or len(classes) < 2:
        return None
    rows = []
    for run in setting.runs:
        key = setting.worst(run, level)
        for where, name in ((UNTOUCHED, "clean"), (key, f"{key[0]}, {setting.norm_name} {level}")):
            counts = run.samples[where].counts.sum(0)
            whole = 2 * counts[:, 0] + counts[:, 1] + counts[:, 2]
            dice = np.divide(2 * counts[:, 0], whole, out=np.full(len(whole), np.nan), where=whole > 0)
            rows.append([Cell(run.title), Cell(name), *(_dice(float(value)) for value in dice)])
    head = ["model", "condition", *classes]
    return Table(
        f"By class: {setting.name}", head, rows, "Dice in %, voxels of all samples as TVDI pools them.", names=2
    )


def as_csv(table: Table) -> str:
    """With the numbers' text as it is shown."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.head)
    writer.writerows([cell.text + (f" ({cell.note})" if cell.note else "") for cell in row] for row in table.rows)
    return stream.getvalue()


def as_markdown(table: Table) -> str:
    """A pipe table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    lines = [f"### {table.title}", "", line(table.head), line(["---"] * len(table.head))]
    for row in table.rows:
        lines.append(line([f"**{_full(cell)}**" if cell.best else _full(cell) for cell in row]))
    return "\n".join([*lines, "", table.note, ""])


def as_latex(table: Table) -> str:
    """A table with booktabs' rules."""
    columns = "l" * table.names + "r" * (len(table.head) - table.names)
    lines = [rf"% {' '.join(table.title.split())}", r"\begin{tabular}{" + columns + "}", r"\toprule"]
    lines += [_latex_row([escape_latex(text) for text in table.head]), r"\midrule"]
    for row in table.rows:
        cells = [rf"\textbf{{{escape_latex(c.text)}}}" if c.best else escape_latex(c.text) for c in row]
        notes = [rf" {{\scriptsize ({escape_latex(c.note)})}}" if c.note else "" for c in row]
        lines.append(_latex_row([cell + note for cell, note in zip(cells, notes, strict=True)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {' '.join(table.note.split())}", ""])


def escape_latex(text: str) -> str:
    """So that names stand as they are."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_row(cells: Sequence[str]) -> str:
    # After a line's end LaTeX takes [ for the beginning of an option, and a star too.
    return "{}" + " & ".join(cells) + r" \\"


def _full(cell: Cell) -> str:
    return f"{cell.text} ({cell.note})" if cell.note else cell.text


def _dice(value: float, low: float = float("nan"), high: float = float("nan")) -> Cell:
    """A share as percent, with its interval as a note."""
    if value != value:
        return Cell("–")
    note = f"{100 * low:.1f}–{100 * high:.1f}" if low == low else ""
    return Cell(f"{100 * value:.1f}", value, note=note)


def _plain(value: float | None, form: str) -> Cell:
    return Cell("–") if value is None or value != value else Cell(format(value, form), float(value))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _marked(cells: Sequence[Cell]) -> list[Cell]:
    """The highest ones marked as the best, if there is anything to compare."""
    shown = [float(cell.text) for cell in cells if cell.number == cell.number]
    if len(cells) < 2 or not shown:
        return list(cells)
    # What looks the same is the same.
    return [replace(cell, best=cell.number == cell.number and float(cell.text) == max(shown)) for cell in cells]
