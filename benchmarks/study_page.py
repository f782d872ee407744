"""Put a study's results into its page: tables beside the published figures, and a picture.

    python benchmarks/study_page.py

Reads ``results/paper_scale_<scale>.json``, and writes what stands between two marks in ``docs/study.md``, and
``docs/pictures/study_<scale>.png``. What is written about the figures, around the marks, is for people to write.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from study_machines import machine_lines
from study_results import HISTOGRAM, NORMS, UNROUNDED, in_order, labels, protocol_and_norm, table

from nnunet_ima.files import atomic_path, write_text

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "study.md", ROOT / "docs" / "pictures"
SCALES = ("paper", "small")
MARGINS = "Margins of the trainings that have some: their mean after each epoch, and how those of the last one spread."
COLOURS = {
    "STD": "#d1495b", "IMA": "#00798c", "IMA-single": "#66b2c0", "IMA-no-noise": "#8a5a44",
    "IMA-origin": "#95d9c3", "SAT": "#edae49", "SAT-eps15": "#f4cf91",
    "TRADES": "#6a4c93", "TE": "#5c946e", "TE-weight300": "#a9cbb4",
}  # fmt: skip


def main() -> None:
    """Write the page and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=list(SCALES), help="whose results are put there")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    results = {scale: read(scale) for scale in options.scales}
    for scale, result in results.items():
        page = filled(page, scale, section(result, scale))
    for scale, result in results.items():
        if result is not None and evaluated(result):
            draw(result, PICTURES / f"study_{scale}.png")
        if result is not None and with_margins(result):
            draw_margins(result, PICTURES / f"study_{scale}_margins.png")
    write_text(PAGE, page)


def read(scale: str) -> dict[str, Any] | None:
    """A study's results, None if there are none.

    Raises:
        ValueError: they are of another scale.
    """
    file = RESULTS / f"paper_scale_{scale}.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["scale"] != scale:
        raise ValueError(f"{file} is of the scale {found['scale']}.")
    return found


def filled(page: str, scale: str, text: str) -> str:
    """The page with ``text`` between the marks of a scale.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = (f"<!-- {scale}: {which} of what study_page.py writes -->" for which in ("begin", "end"))
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"The page has no marks {begin} and {end}.")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def section(result: Mapping[str, Any] | None, scale: str) -> str:
    """What the page says of a study."""
    if result is None:
        return "Not run yet."
    commands = [f"`{part['command']}`, {part['date']}." for part in result["parts"]]
    made = _list([*commands, *machine_lines(result["rows"]), *_rounded(result["rows"]), *_seeds(result)])
    picture = [f"![Dice against level](pictures/study_{scale}.png)"] if evaluated(result) else []
    margins = [f"{MARGINS}\n\n![Margins of each training](pictures/study_{scale}_margins.png)"]
    return "\n\n".join([made, *picture, table(result), *(margins if with_margins(result) else [])])


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _rounded(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rounded = [row for row in rows if row["training"] and row["training"].get("weights", UNROUNDED) != UNROUNDED]
    weights = f"{rounded[0]['training']['weights']}: {len(rounded)}." if rounded else ""
    return [f"Models whose weights were rounded before anything was measured, to {weights}"] if rounded else []


def _seeds(result: Mapping[str, Any]) -> list[str]:
    found = [one for row in result["rows"] for one in row["evaluations"].values() if one]
    seeds = [sorted({one[key] for one in found}) for key in ("seed", "samples_seed")]
    attacks, samples = (", ".join(map(str, values)) for values in seeds)
    return [f"Seed of the attacks: {attacks}; of the choice of samples: {samples}."] if found else []


def evaluated(result: Mapping[str, Any]) -> list[str]:
    """The evaluations that some model has been through."""
    names = dict.fromkeys(name for row in result["rows"] for name, found in row["evaluations"].items() if found)
    return list(names)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """TVDI against level under the attack of each evaluation, mean and standard deviation over repetitions."""
    rows, names = in_order(result["rows"]), evaluated(result)
    with plt.style.context("default"):
        figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4), dpi=110, sharey=True, squeeze=False)
        for panel, name in zip(axes[0], names, strict=True):
            _draw_evaluation(panel, rows, name)
        axes[0][0].set_ylabel("Dice (TVDI, %)")
        # A method may be drawn in some of the panels only, or be of fewer trainings there.
        shown = {
            label: bars for panel in axes[0] for bars, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        axes[0][-1].legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


def _draw_evaluation(panel: Axes, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    protocol, norm = protocol_and_norm(name)
    for method, label in labels(name, rows).items():
        mine = [row["evaluations"][name] for row in rows if row["method"] == method and row["evaluations"][name]]
        levels = [result["level"] for result in mine[0]["results"] if _is_search(result)]
        found = [[one["clean"]["tvdi"], *(r["tvdi"] for r in one["results"] if _is_search(r))] for one in mine]
        columns = [[100 * value for value in column] for column in zip(*found, strict=True)]
        # Of a single training nobody knows the deviation.
        spread = [statistics.stdev(column) for column in columns] if len(mine) > 1 else None
        means = [statistics.fmean(column) for column in columns]
        panel.errorbar(range(len(means)), means, spread, marker="o", color=COLOURS[method], label=label, capsize=3)
        panel.set_xticks(range(len(means)), ["clean", *levels])
    further = "".join(f", {word}" for word in name.partition("_")[0].split("-")[1:])
    panel.set_title(f"{protocol}, {NORMS[norm]}{further}", fontsize=10)
    panel.set_xlabel("level")
    panel.set_ylim(0, 100)
    panel.grid(alpha=0.3)


def with_margins(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows, in order, whose training has margins."""
    return [row for row in in_order(result["rows"]) if row["training"] and HISTOGRAM in row["training"]]


def draw_margins(result: Mapping[str, Any], file: Path) -> None:
    """Of each training with margins: their mean after each epoch, and their spread after the last, in shares of ε."""
    rows = with_margins(result)
    with plt.style.context("default"):
        figure, (growth, spread) = plt.subplots(1, 2, figsize=(10, 4), dpi=110)
        for number, row in enumerate(rows):
            one, new = row["training"], row["method"] not in {other["method"] for other in rows[:number]}
            style = {"color": COLOURS[row["method"]], "label": row["method"] if new else None}
            growth.plot(range(1, len(one["margin_mean"]) + 1), one["margin_mean"], **style)
            counts = one[HISTOGRAM]
            shares = [count / sum(counts) for count in counts]
            spread.stairs(shares, [place / len(counts) for place in range(len(counts) + 1)], **style)
        growth.set(xlabel="epoch", ylabel="mean margin", title="One line a training")
        spread.set(xlabel="margin / ε", ylabel="share of the samples", title="After the last epoch")
        growth.legend()
        for panel in (growth, spread):
            panel.grid(alpha=0.3)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


def _is_search(result: Mapping[str, Any]) -> bool:
    return not str(result["attack"]).startswith("white-noise")


if __name__ == "__main__":
    main()
