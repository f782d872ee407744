"""The results of a study in Table 3's layout, beside what was published for the same levels."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_ima.evaluation.markdown import escaped
from nnunet_ima.evaluation.report.published import Published, published_attack, published_rows
from nnunet_ima.evaluation.summary import nothing_learned

CLEAN, CLAMP, MEAN = "clean", "clamp only", "mean"
COLUMNS = (
    "task", "dataset", "protocol", "norm", "attack", "method", "level", "slices", "tvdi", "published", "source",
    "trusted", "learned",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method under an attack.

    Attributes:
        task: the Decathlon's number.
        dataset: nnU-Net's name of what was attacked.
        protocol, norm, attack: under which.
        method: which was trained.
        slices: how many were attacked.
        tvdi: in %, by level; first ``clean`` and, under ``paper``, ``clamp only``, last ``mean``, which is over clean
            and all levels, as Table 3's Avg; without a value where there is none.
        published: in %, the same of the paper.
        source: of the published figures; empty if there are none.
        trusted: whether the checks of the evaluation passed.
        learned: False where without an attack neither is any slice correct nor TVDI above the threshold for that.
    """

    task: int
    dataset: str
    protocol: str
    norm: str
    attack: str
    method: str
    slices: int
    tvdi: Mapping[str, float | None]
    published: Mapping[str, float | None]
    source: str
    trusted: bool
    learned: bool


def rows_of(task: int, method: str, epsilon: float | None, summary: Mapping[str, Any]) -> list[Row]:
    """A row an attack, from the content of a summary.json.

    Args:
        task: the Decathlon's number.
        method: which was trained.
        epsilon: the ε it was trained with, L2; None for another norm.
        summary: of the evaluation.
    """
    protocol, norm = str(summary["protocol"]["name"]), str(summary["protocol"]["norm"])
    dataset = str(summary["model"]["dataset"])
    rows = []
    for attack in dict.fromkeys(str(result["attack"]) for result in summary["results"]):
        levels = {str(one["level"]): _percent(one["tvdi"]) for one in summary["results"] if one["attack"] == attack}
        clean = _percent(summary["clean"]["tvdi"])
        clamp = {CLAMP: _percent(summary["clamp_only"]["tvdi"])} if "clamp_only" in summary else {}
        theirs = published_row(dataset, protocol, norm, attack, method, epsilon)
        published: dict[str, float | None] = {}
        if theirs is not None:
            same = {level: theirs.levels[level] for level in levels if level in theirs.levels}
            published = {CLEAN: theirs.clean, **same}
            if same.keys() == levels.keys():
                published[MEAN] = _mean(theirs.clean, same)
        rows.append(
            Row(
                task, dataset, protocol, norm, attack, method, int(summary["clean"]["n_samples"]),
                {CLEAN: clean, **clamp, **levels, MEAN: _mean(clean, levels)},
                published,
                "" if theirs is None else theirs.source,
                bool(summary["trusted"]),
                not nothing_learned(summary),
            )
        )  # fmt: skip
    return rows


def published_row(
    dataset: str, protocol: str, norm: str, attack: str, method: str, epsilon: float | None
) -> Published | None:
    """What was published of a method under an attack of this kind in the same protocol; None if nothing was."""
    kind = published_attack(protocol, attack)
    if kind is None:
        return None
    # The earlier version names SAT by its ε, which is of L2.
    name = f"SAT{'' if epsilon is None else f'{epsilon:g}'}" if kind == "PGD" and method == "SAT" else method
    rows = published_rows(dataset.partition("_")[2], kind, norm)
    return next((row for row in rows if row.method == name), None)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * float(share)


def _mean(clean: float | None, levels: Mapping[str, float | None]) -> float | None:
    values = [clean, *levels.values()]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row and level."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        for level, tvdi in row.tvdi.items():
            theirs = row.published.get(level)
            writer.writerow(
                [
                    row.task, row.dataset, row.protocol, row.norm, row.attack, row.method, level, row.slices,
                    _cell(tvdi, 4), _cell(theirs, 4), "" if theirs is None else row.source, row.trusted,
                    row.learned,
                ]
            )  # fmt: skip
    return stream.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """A table for each task, protocol, norm and attack; published figures in parentheses."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.dataset, row.protocol, row.norm, row.attack), []).append(row)
    lines: list[str] = []
    for (_, dataset, protocol, norm, attack), mine in groups.items():
        columns = list(mine[0].tvdi)
        slices = ", ".join(dict.fromkeys(str(row.slices) for row in mine))
        lines += [f"### {escaped(dataset)}, protocol `{protocol}`, {norm}, `{attack}`", ""]
        lines += [f"TVDI in %, {slices} slices." + _sources(mine), ""]
        lines += ["| method | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        for row in mine:
            untrained = f"not trained enough: none of {row.slices} slices is correct without an attack"
            marks = [
                *([] if row.learned else [untrained]),
                *([] if row.trusted else ["not to be trusted: a check failed"]),
            ]
            mark = f" ({'; '.join(marks)})" if marks else ""
            cells = [_with_published(row, column) for column in columns]
            lines.append(f"| {row.method}{mark} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _sources(rows: Sequence[Row]) -> str:
    sources = list(dict.fromkeys(row.source for row in rows if row.source))
    return f" In parentheses what was published: {'; '.join(sources)}." if sources else " Nothing was published of it."


def _with_published(row: Row, column: str) -> str:
    theirs = row.published.get(column)
    return (_cell(row.tvdi[column], 1) or "–") + ("" if theirs is None else f" ({theirs:.2f})")


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
