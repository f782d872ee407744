"""Tables of a report, for the page, and as Markdown and LaTeX; for programs there is :mod:`long_csv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_ima.evaluation.markdown import escaped, table_row
from nnunet_ima.evaluation.metrics import class_scores, nan_mean
from nnunet_ima.evaluation.report.figures import Setting, failed_checks, tvdi
from nnunet_ima.evaluation.report.published import level_value, paper_task, published_attack, published_for
from nnunet_ima.evaluation.report.sentences import not_compared, probability
from nnunet_ima.evaluation.results import UNTOUCHED, Key, Results
from nnunet_ima.evaluation.statistics import Difference, holm

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "→": r"$\to$", "ε": r"$\varepsilon$",
}  # fmt: skip


QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of whole cases: heading, and name in cases.csv.
DISTANCES = (("HD95", "hd95_mm"), ("surface Dice", "surface_dice_1mm"))
# Of the published attacks, for people.
PUBLISHED_NAMES = {"AutoAttack": "AutoAttack", "WhiteNoise": "white noise", "PGD": "PGD with 100 steps"}


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
        conditions = [[key] * len(setting.runs) for _, key in starts]
        conditions += [[setting.key(run, attack, text) for run in setting.runs] for text, _ in setting.levels]
        for keys in conditions:
            columns.append([setting.interval(run, key) for run, key in zip(setting.runs, keys, strict=True)])
        columns.append([setting.mean_over_levels(run, attack) for run in setting.runs])
        marked = [_marked(setting, [_dice(*one) for one in intervals]) for intervals in columns]
        for run, *cells in zip(setting.runs, *marked, strict=True):
            rows.append([_model(run), Cell(attack), *cells])
    note = (
        f"TVDI in %, with 95 % intervals (bootstrap over {setting.unit_resampled}; they say what other scans would "
        f"change, not what another training would). Avg is the mean of clean and all levels, as in Table 3 of the "
        f"IMA paper (arXiv 2005.09147).{_bold(setting)}"
    )
    if clamped:
        note += " Clamp only: what the protocol does to the scans before any attack."
    note += _not_compared(setting) + setting.choice_note + without_published(setting)
    return Table(f"TVDI under each attack: {setting.name}", head, rows, note, names=2)


def difference_table(setting: Setting) -> Table | None:
    """Each compared model against each other one, case by case."""
    if len(setting.compared) < 2 or not setting.comparable or not setting.attacks:
        return None
    corrected = bool(setting.correction)
    rows = []
    for level, where in (
        (None, "clean"),
        *((text, f"{setting.norm_name} {text}") for text, _ in setting.levels),
    ):
        dice = [setting.difference(run, other, level) for run, other in setting.pairs]
        own = [setting.adi_difference(run, other, level) for run, other in setting.pairs]
        rows += _difference_rows(setting, where, dice, own, corrected)
    means = [setting.mean_difference(run, other) for run, other in setting.pairs]
    rows += _difference_rows(setting, "mean of the levels", means, [None] * len(means), corrected)
    note = (
        f"Points that the first model has more (+) or less (-) than the second, on the same samples, each "
        f"under {setting.worst_words}: 95 % interval by paired bootstrap over {setting.unit_resampled}, p by a "
        f"permutation test that swaps what the two models reached on one of them. "
    )
    if corrected:
        note += f"p (Holm): after {setting.correction}, those of the same level and figure. "
    asked = "whether a model is called more robust is asked once, of the mean of the levels"
    claim = "by noise alone no model is called more robust" if setting.noise_only else asked
    note += "Differences are taken before rounding. "
    note += f"Not corrected for the number of levels and figures; {claim}.{setting.p_note}{setting.choice_note}"
    note += _not_compared(setting)
    more = ["p (Holm)"] if corrected else []
    head = ["model", "against", "level", "TVDI", "95 % interval", "p", *more]
    head += ["ADI", "95 % interval (ADI)", "p (ADI)", *(f"{name}, ADI" for name in more)]
    return Table(f"Model against model: {setting.name}", head, rows, note, names=3)


def _difference_rows(
    setting: Setting,
    where: str,
    dice: Sequence[Difference | None],
    own: Sequence[Difference | None],
    corrected: bool,
) -> list[list[Cell]]:
    """A row a pair of models, of one level; by TVDI, then by the samples' own Dice."""
    columns = [_difference_columns(found, corrected) for found in (dice, own)]
    return [
        [Cell(run.title), Cell(other.title), Cell(where), *by_voxels, *by_sample]
        for (run, other), by_voxels, by_sample in zip(setting.pairs, *columns, strict=True)
    ]


def _difference_columns(found: Sequence[Difference | None], corrected: bool) -> list[list[Cell]]:
    by_holm = holm([float("nan") if one is None else one.p for one in found])
    more = [[Cell(probability(p), p)] if corrected else [] for p in by_holm]
    return [[*_difference_cells(one), *cells] for one, cells in zip(found, more, strict=True)]


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
                _model(run), Cell(name), Cell(figures.get("level", "0")),
                *(_dice(_number(share)) for share in shares), _distance(figures),
                _dice(_number(figures["surface_dice"])), _plain(spent, ".0f"),
            ])  # fmt: skip
    note = (
        "Dice and shares in %. TVDI of lowest Dice: that of the images on which each sample has its lowest Dice; all "
        "other figures are of those images, too. Under an ensemble TVDI itself may be lower. Correct: samples with a "
        "Dice above the threshold. "
    )
    if any(run.cases.get(UNTOUCHED) for run in setting.runs):
        note += (
            "Case Dice is nnU-Net's own, of whole cases through its sliding window; HD95 and surface Dice (1 mm) are "
            "means over cases; under an HD95 stands of how many structures (a class in a case) it is, if some were not "
            "found at all, and so have none. "
        )
    note += (
        "Passes: forward and backward passes of a sample that the attack spent, that of the untouched sample included; "
        "a sample that has come to Dice 0 is left alone."
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
                _model(run), Cell(str(item["attack"])), Cell(str(item["level"])),
                Cell("yes" if about["mirroring_known_to_the_attack"] else "no" if about["mirrored_axes"] else "none"),
                *(_dice(_number(share)) for share in shares), _distance(whole),
                _dice(_number(whole["surface_dice"])),
            ])  # fmt: skip
    note = (
        "Dice and shares in %. Carried over: the perturbed samples put together. End to end: gradients through "
        "nnU-Net's sliding window, with no more in any window than the samples; HD95 and surface Dice are "
        "of this. Survives: the share of the Dice lost by the samples of a case that the case loses too."
    )
    return Table(f"Whole cases, end to end: {setting.name}", head, rows, note, names=4) if rows else None


def case_table(setting: Setting) -> Table | None:
    """Every case and model: Dice clean and at the telling level; with distances where there is a case level."""
    level = setting.telling_level
    if level is None:
        return None
    at = f"{setting.norm_name} {level}"
    whole = setting.whole_cases(level)
    kinds = [("Dice", "dice"), *(DISTANCES if whole else ())]
    head = ["case", "model", *(f"{title} {where}" for title, _ in kinds for where in ("clean", f"at {at}"))]
    conditions = {run: (UNTOUCHED, setting.worst(run, level)) for run in setting.runs}
    dice = {run: [run.case_dice(key, whole) for key in keys] for run, keys in conditions.items()}
    rows = []
    for name in sorted({name for columns in dice.values() for column in columns for name in column}):
        for run, keys in conditions.items():
            cells = [_dice(column.get(name, float("nan"))) for column in dice[run]]
            for _, kind in kinds[1:]:
                cells += [_of_classes(run.cases[key].get(name, {}).get(kind, []), kind) for key in keys]
            rows.append([Cell(name), _model(run), *cells])
    origin = "nnU-Net's, of the whole case" if whole else "of the case's attacked samples, as TVDI pools them"
    note = f"Dice in %, mean of the classes, {origin}; each model under {setting.worst_words}."
    if whole:
        note += (
            " HD95 in mm and surface Dice (1 mm) in % are means of the classes for which they are defined; where that "
            "is not all of them, it is said of how many."
        )
    return Table(f"Case by case: {setting.name}", head, rows, note, names=2)


def _of_classes(values: Sequence[float], kind: str) -> Cell:
    """The mean of what is defined, and of how many classes that is, if not of all."""
    mean, known = nan_mean(list(values)), sum(value == value for value in values)
    cell = _plain(mean, ".1f") if kind == "hd95_mm" else _dice(mean)
    return replace(cell, note=f"{known} of {len(values)} classes") if 0 < known < len(values) else cell


def published_tables(setting: Setting) -> list[Table]:
    """The paper's figures for this data set, norm and protocol beside ours: a table for each attack that both have."""
    protocol = setting.protocol
    kinds = [published_attack(protocol, str(item["attack"])) for run in setting.runs for item in run.attacked]
    made = [_published_table(setting, kind) for kind in dict.fromkeys(kinds) if kind is not None]
    return [table for table in made if table is not None]


def _published_table(setting: Setting, kind: str) -> Table | None:
    published = published_for(setting.runs[0].summary, kind)
    ours = [
        (run, attack)
        for run in setting.runs
        for attack in dict.fromkeys(str(item["attack"]) for item in run.attacked)
        if published_attack(setting.protocol, attack) == kind
    ]
    task = paper_task(setting.dataset)
    if not published or task is None:
        return None
    theirs = [{level_value(text): number for text, number in row.levels.items()} for row in published]
    here = [
        {float(item["epsilon"]): _number(item["tvdi"]) for item in run.attacked if item["attack"] == attack}
        for run, attack in ours
    ]
    written = {level_value(text): text for row in published for text in row.levels}
    written |= {float(item["epsilon"]): str(item["level"]) for run, _ in ours for item in run.attacked
                if float(item["epsilon"]) not in written}  # fmt: skip
    levels = sorted({*(value for row in theirs for value in row), *(value for row in here for value in row)})
    head = ["model", "attack", "source", "clean", *(f"{setting.norm_name} {written[level]}" for level in levels)]
    rows = [
        [_model(run), Cell(attack), Cell("here"), _dice(tvdi(run, UNTOUCHED)),
         *(_dice(found.get(level, float("nan"))) for level in levels)]
        for (run, attack), found in zip(ours, here, strict=True)
    ]  # fmt: skip
    rows += [
        [Cell(row.method), Cell(PUBLISHED_NAMES[kind]), Cell("published"), _plain(row.clean, ".1f"),
         *(_plain(found.get(level), ".1f") for level in levels)]
        for row, found in zip(published, theirs, strict=True)
    ]  # fmt: skip
    note = "" if task.exact else f"{setting.dataset} is not {task.dataset} of the paper but stands in for it. "
    note += (
        f"Dice in %. Published: {published[0].source}. The paper's figures are of other networks, trainings and cases, "
        f"and its attack is of the same kind as ours but not the same program; they belong to the protocol "
        f"{setting.protocol} and say where one would expect to be, no more."
    )
    title = f"Beside the published figures, {PUBLISHED_NAMES[kind]}: {setting.name}"
    return Table(title, head, rows, note, names=3)


def without_published(setting: Setting) -> str:
    """Why no published figures stand beside those of one of the paper's tasks; empty where that needs no words."""
    task = paper_task(setting.dataset)
    if task is None or len(setting.runs[0].summary["patch_size"]) == 2:
        return ""
    return f" The paper's figures of {task.name} are of 2D networks, so none stand beside those of this 3D one."


def class_table(setting: Setting) -> Table | None:
    """Dice of each class, pooled over samples, clean and at the telling level."""
    level = setting.telling_level
    classes = [str(name) for name in setting.runs[0].summary["classes"]]
    if level is None or len(classes) < 2:
        return None
    rows = []
    for run in setting.runs:
        for key, name in _clean_and_attacked(setting, run, level):
            counts = run.samples[key].counts.sum(0)
            dice = class_scores(counts[:, 0], counts[:, 1], counts[:, 2])
            rows.append([_model(run), Cell(name), *(_dice(float(value)) for value in dice)])
    head = ["model", "condition", *classes]
    return Table(
        f"By class: {setting.name}", head, rows, "Dice in %, voxels of all samples as TVDI pools them.", names=2
    )


def class_spread_table(setting: Setting) -> Table | None:
    """How the Dice of a class is spread over cases, clean beside attacked."""
    level = setting.telling_level
    if level is None:
        return None
    whole, rows = setting.whole_cases(level), []
    for number, name in enumerate(str(name) for name in setting.runs[0].summary["classes"]):
        for run in setting.runs:
            for key, condition in _clean_and_attacked(setting, run, level):
                dice = setting.class_dice(run, key, whole)[:, number]
                known = dice[~np.isnan(dice)]
                quantiles = np.quantile(known, QUANTILES) if len(known) else np.full(len(QUANTILES), np.nan)
                rows.append([
                    Cell(name), _model(run), Cell(condition), Cell(str(len(known)), len(known)),
                    *(_dice(float(value)) for value in quantiles),
                ])  # fmt: skip
    origin = "nnU-Net's, of whole cases" if whole else "of each case's attacked samples, as TVDI pools them"
    note = (
        f"Dice of a class in a case, in %, {origin}; over those cases in which the class is or was found. A quarter of "
        f"the cases lies below the lower quartile, and a quarter above the upper one."
    )
    head = ["class", "model", "condition", "cases", "lowest", "lower quartile", "median", "upper quartile", "highest"]
    return Table(f"By class, case by case: {setting.name}", head, rows, note, names=3)


def _clean_and_attacked(setting: Setting, run: Results, level: str) -> list[tuple[Key, str]]:
    key = setting.worst(run, level)
    return [(UNTOUCHED, "clean"), (key, f"{key[0]}, {setting.norm_name} {level}")]


def as_markdown(table: Table) -> str:
    """A pipe table."""

    lines = [f"### {escaped(table.title)}", "", table_row(table.head), table_row(["---"] * len(table.head))]
    for row in table.rows:
        lines.append(table_row(f"**{_full(cell)}**" if cell.best else _full(cell) for cell in row))
    return "\n".join([*lines, "", escaped(table.note), ""])


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


def _distance(figures: Mapping[str, Any]) -> Cell:
    """The mean HD95, and of how many structures it is if some have none; older runs do not tell."""
    cell, known, there = _plain(figures["hd95"], ".1f"), figures.get("n_hd95"), figures.get("n_structures")
    return replace(cell, note=f"{known} of {there}") if known is not None and known != there else cell


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _marked(setting: Setting, cells: Sequence[Cell]) -> list[Cell]:
    """A cell of each run; the highest of the compared models marked as the best, if they can be compared."""
    takes_part = [run in setting.compared and cell.number == cell.number
                  for run, cell in zip(setting.runs, cells, strict=True)]  # fmt: skip
    shown = [float(cell.text) for cell, part in zip(cells, takes_part, strict=True) if part]
    if len(setting.compared) < 2 or not setting.comparable or not shown:
        return list(cells)
    # What looks the same is the same.
    return [replace(cell, best=part and float(cell.text) == max(shown))
            for cell, part in zip(cells, takes_part, strict=True)]  # fmt: skip


def _bold(setting: Setting) -> str:
    """What bold means in a table, or why there is none."""
    if setting.comparable:
        return " Bold: the best model of a column, for each attack." if len(setting.compared) > 1 else ""
    return " No model is marked as the best of a column, as the models were attacked on other samples."


def _model(run: Results) -> Cell:
    """Its name, with a mark if its figures are not to be trusted."""
    return Cell(run.title, note="not trusted" if failed_checks(run) else "")


def _not_compared(setting: Setting) -> str:
    sentence = not_compared(setting)
    return f" {sentence}" if sentence else ""
