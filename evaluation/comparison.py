"""One self-contained page that compares evaluated models."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from nnunet_ima.errors import UserError
from nnunet_ima.files import write_text

COLOURS = ("#d1495b", "#00798c", "#edae49", "#6a4c93")


@dataclass(frozen=True)
class Run:
    """An evaluated model: how to call it, and the folder that ``nnunet_ima evaluate`` wrote."""

    title: str
    folder: Path


def write_comparison(runs: Sequence[Run], page: Path, phantom: bool) -> None:
    """Write ``page``, with pictures inside it, from the runs' summaries.

    Args:
        runs: evaluated in the same way; the first one is what the others are compared with.
        page: the HTML file.
        phantom: whether the data was made up, which the page then says.

    Raises:
        UserError: a run is missing, or the runs differ in protocol, norm or levels.
    """
    summaries = [_summary(run) for run in runs]
    _refuse_different(runs, summaries)
    strongest = _strongest_attack(summaries)
    body = "\n".join(
        [
            f"<h1>{html.escape(_headline(runs, summaries, strongest))}</h1>",
            _lead(summaries, strongest, phantom),
            _cards(runs, summaries, strongest),
            "<h2>Dice against noise level</h2>",
            f'<figure><img alt="Dice of each model against noise level" src="{_chart(runs, summaries, strongest)}">'
            f"<figcaption>Solid: {html.escape(strongest)}, an attack that uses the network's gradients. Dotted: random "
            f"noise of the same size. A model that holds stays high on the solid line.</figcaption></figure>",
            "<h2>All figures</h2>",
            _table(runs, summaries),
            "<h2>Where each model failed worst</h2>",
            *(_panel(run, summary) for run, summary in zip(runs, summaries, strict=True)),
            _meaning(summaries[0]),
            _details(runs, summaries),
        ]
    )
    write_text(page, _PAGE.replace("{body}", body).replace("{title}", "nnunet_ima: stock against hardened"))


def _summary(run: Run) -> dict[str, Any]:
    file = run.folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(f"{file} is missing or damaged; run nnunet_ima evaluate again.") from None
    return summary


def _refuse_different(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]]) -> None:
    def way(summary: Mapping[str, Any]) -> object:
        levels = [(result["attack"], result["level"]) for result in summary["results"]]
        return summary["protocol"], levels, summary["clean"]["n_samples"], summary["seed"]

    for run, summary in zip(runs, summaries, strict=True):
        if way(summary) != way(summaries[0]):
            raise UserError(
                f"{run.folder} was evaluated in another way than {runs[0].folder} (protocol, attacks, levels, samples "
                f"or seed differ), so the two cannot be compared; evaluate both alike."
            )


def _strongest_attack(summaries: Sequence[Mapping[str, Any]]) -> str:
    attacks = dict.fromkeys(result["attack"] for result in summaries[0]["results"])

    def total(attack: str) -> float:
        return sum(float(result["tvdi"]) for summary in summaries for result in _at(summary, attack))

    return str(min(attacks, key=total))


def _at(summary: Mapping[str, Any], attack: str) -> list[Mapping[str, Any]]:
    return [result for result in summary["results"] if result["attack"] == attack]


def _telling_level(summaries: Sequence[Mapping[str, Any]], attack: str) -> int:
    """The level at which the models differ most."""
    columns = zip(*([result["tvdi"] for result in _at(summary, attack)] for summary in summaries), strict=True)
    spreads = [max(column) - min(column) for column in columns]
    return spreads.index(max(spreads))


def _headline(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], attack: str) -> str:
    level = _telling_level(summaries, attack)
    parts = [
        f"{run.title} goes from {_whole(summary['clean'])} to {_whole(_at(summary, attack)[level])} %"
        for run, summary in zip(runs, summaries, strict=True)
    ]
    return "Under attack, " + "; ".join(part[0].lower() + part[1:] for part in parts) + " Dice."


def _whole(figures: Mapping[str, Any]) -> str:
    return f"{100 * figures['tvdi']:.0f}"


def _lead(summaries: Sequence[Mapping[str, Any]], attack: str, phantom: bool) -> str:
    level = _at(summaries[0], attack)[_telling_level(summaries, attack)]
    made_up = (
        " The scans are a made-up, MRI-like phantom and both models are tiny and trained for minutes on a CPU: this "
        "shows that the machinery works, not what a real model reaches."
        if phantom
        else " Both models are small and trained for minutes only."
    )
    return (
        f"<p class=lead>Both models were given the same {summaries[0]['clean']['n_samples']} validation slices, each "
        f"changed by {html.escape(attack)} as much as level {html.escape(level['level'])} allows "
        f"({html.escape(summaries[0]['protocol']['unit'])}). Of the levels measured, this is the one at which "
        f"the models differ most; the others are below.{made_up}</p>"
    )


def _cards(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], attack: str) -> str:
    level = _telling_level(summaries, attack)
    cards = []
    for run, summary, colour in zip(runs, summaries, COLOURS, strict=False):
        hit = _at(summary, attack)[level]
        cards.append(
            f'<div class=card style="border-top-color:{colour}"><h3>{html.escape(run.title)}</h3>'
            f"<p class=big>{100 * summary['clean']['tvdi']:.1f} % <span>→</span> {100 * hit['tvdi']:.1f} %</p>"
            f"<p>TVDI clean and at level {html.escape(hit['level'])}</p>"
            f"<p>{100 * summary['clean']['robust_share']:.0f} % of slices correct before, "
            f"{100 * hit['robust_share']:.0f} % after</p></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _chart(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], strongest: str) -> str:
    with plt.style.context("default"):
        figure, axes = plt.subplots(figsize=(8, 4.2), dpi=120)
        ticks = {0.0: "0"}
        for run, summary, colour in zip(runs, summaries, COLOURS, strict=False):
            for attack in dict.fromkeys(result["attack"] for result in summary["results"]):
                points = sorted((r["epsilon"], 100 * r["tvdi"], r["level"]) for r in _at(summary, attack))
                ticks |= {x: text for x, _, text in points}
                axes.plot(
                    [0.0, *(x for x, _, _ in points)],
                    [100 * summary["clean"]["tvdi"], *(y for _, y, _ in points)],
                    color=colour,
                    marker="o",
                    linestyle="-" if attack == strongest else ":",
                    alpha=1.0 if attack == strongest else 0.6,
                    label=f"{run.title}, {attack}",
                )
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"noise level ({summaries[0]['protocol']['unit']})")
        axes.set_ylabel("TVDI (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        plt.close(figure)
    return _embedded(stream.getvalue())


def _table(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]]) -> str:
    columns = (("tvdi", "TVDI"), ("adi", "ADI"), ("robust_share", "correct"), ("case_dice", "case Dice"))
    head = "".join(
        f"<th colspan={len(columns)}>{html.escape(run.title)}</th>" for run in runs
    )  # each model's columns side by side
    names = "".join(f"<th>{name}</th>" for _, name in columns) * len(runs)
    rows = [_table_row("none (clean)", "0", [summary["clean"] for summary in summaries], columns)]
    rows += [
        _table_row(results[0]["attack"], results[0]["level"], results, columns)
        for results in zip(*(summary["results"] for summary in summaries), strict=True)
    ]
    return (
        f"<div class=scroll><table><thead><tr><th></th><th></th>{head}</tr>"
        f"<tr><th>attack</th><th>level</th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=note>All in %. The best model of a row is bold.</p>"
    )


def _table_row(
    attack: str, level: str, figures: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]]
) -> str:
    cells = []
    for figure in figures:
        for key, _ in columns:
            value = figure[key]
            others = [other[key] for other in figures if other[key] is not None]
            best = value is not None and value == max(others)
            text = "–" if value is None else f"{100 * value:.1f}"
            cells.append(f"<td>{f'<b>{text}</b>' if best else text}</td>")
    return f"<tr><td>{html.escape(attack)}</td><td>{html.escape(level)}</td>{''.join(cells)}</tr>"


def _panel(run: Run, summary: Mapping[str, Any]) -> str:
    file = run.folder / "worst_samples.png"
    if not file.is_file():
        raise UserError(f"{file} is missing; run nnunet_ima evaluate again.")
    failed = [item["sentence"] for item in summary["trust"] if not item["passed"]]
    warning = f"<p class=warning>Do not trust these figures: {html.escape('; '.join(failed))}.</p>" if failed else ""
    return (
        f"<h3>{html.escape(run.title)}</h3>{warning}"
        f'<figure><img alt="The samples on which this model lost most Dice" src="{_embedded(file.read_bytes())}">'
        f"</figure>"
    )


def _meaning(summary: Mapping[str, Any]) -> str:
    threshold = 100 * summary["criterion"]["dice_threshold"]
    return (
        "<h2>What the figures mean</h2><dl>"
        "<dt>TVDI</dt><dd>Total voxel Dice index: voxels of all slices pooled, Dice for each class, then the mean.</dd>"
        "<dt>ADI</dt><dd>Average Dice index: the mean of the slices' own Dice, so that small structures count too.</dd>"
        f"<dt>correct</dt><dd>Share of slices with a Dice above {threshold:g} %.</dd>"
        "<dt>case Dice</dt><dd>nnU-Net's own score: the perturbed volume goes through its sliding window with "
        "mirroring, which the attack did not know of, so it is usually higher than TVDI.</dd>"
        "<dt>level</dt><dd>How much an image may change, "
        f"{html.escape(summary['protocol']['unit'])}; it stays in {html.escape(summary['protocol']['range'])}.</dd>"
        "</dl><p>For research and quality control; not a medical device.</p>"
    )


def _details(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<h3>{html.escape(run.title)}</h3><pre>{html.escape(summary['command'])}\n\n"
        f"{html.escape(json.dumps({'model': summary['model'], 'versions': summary['versions']}, indent=2))}</pre>"
        for run, summary in zip(runs, summaries, strict=True)
    )
    return f"<details><summary>How to repeat this</summary>{rows}</details>"


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin-top: 2.2rem; }
.lead { font-size: 1.05rem; } .note { color: #888; font-size: .9rem; }
.cards { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.5rem 0; }
.card { flex: 1 1 18rem; border: 1px solid var(--line); border-top: 5px solid; border-radius: 8px; }
.card > * { margin: .5rem 1.2rem; }
.card .big { font-size: 2rem; font-weight: 650; margin: .2rem 1.2rem; } .big span { opacity: .5; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: 6px; }
figcaption { color: #888; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); }
dt { font-weight: 650; } dd { margin: 0 0 .5rem 1.2rem; }
pre { overflow-x: auto; background: var(--soft); padding: 1rem; }
.warning { border-left: 4px solid #d1495b; padding-left: .8rem; }
@media print { details { display: none; } .card { break-inside: avoid; } }
</style>
{body}
</html>
"""
