"""From a study's runs to rows and to a table."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from study_machines import machines, seconds_spent
from study_state import ROUNDED_MARK

from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline
from nnunet_ima.evaluation.report.published import Published, published_rows
from nnunet_ima.evaluation.study import Study
from nnunet_ima.settings import KEY

# Of the last epoch, how many samples' margins lie in each of the equal parts of 0 to ε.
HISTOGRAM = "margin_histogram"
QUANTILES = (
    "margin_10", "margin_50", "margin_90", "margin_mean", "visits_mean", "passes_per_sample", "correct_share",
)  # fmt: skip
NORMS = {"l2": "L2", "linf": "Linf"}
UNROUNDED = "single precision"
ORDER = (
    "STD", "IMA", "IMA-single", "IMA-no-noise", "IMA-origin", "SAT", "SAT-eps15", "TRADES", "TE", "TE-weight300",
)  # fmt: skip
# Of machines whose seconds can be compared; what else ran there differs anyhow.
ALIKE = ("device", "processor", "cores", "threads", "workers", "compiled")


def collect(study: Study, dataset: Path, methods: Sequence[tuple[Method, int]]) -> list[dict[str, Any]]:
    """A row a trained model: how it was trained, and what each evaluation found of it so far, and on which machines."""
    rows = []
    for method, repetition in methods:
        pipeline = study.pipeline(method)
        # Of other settings: none of this study.
        foreign = pipeline.has_other_settings(method)
        checkpoint = pipeline.fold_folder(dataset, method) / "checkpoint_final.pth"
        training = None if foreign else _training(checkpoint)
        evaluations = {}
        for attacks in study.evaluations:
            run = pipeline.results(method, attacks)
            found = None if foreign else _evaluation(run, attacks)
            spent = found and seconds_spent(pipeline.logs, run.name)
            found = {**found, "seconds": round(spent, 1)} if found and spent else found
            evaluations[attacks.name] = _on_machines(found, pipeline, run.name)
        rows.append(
            {
                "method": method.title,
                "repetition": repetition,
                "settings": dict(method.settings),
                "training": _on_machines(training, pipeline, f"train_{pipeline.key(method)}"),
                "evaluations": evaluations,
            }
        )
    return rows


def _on_machines(found: dict[str, Any] | None, pipeline: Pipeline, step: str) -> dict[str, Any] | None:
    return found and {**found, "machines": machines(pipeline.logs, step)}


def _training(checkpoint: Path) -> dict[str, Any] | None:
    if not checkpoint.is_file():
        return None
    stored = torch.load(checkpoint, map_location="cpu", weights_only=False)
    log = stored["logging"]
    # Without what lies between epochs (pictures, checkpoints), which may be a night if the training was continued.
    seconds = sum(
        end - begun for begun, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    )
    return {
        "seconds": round(seconds, 1),
        "weights": stored.get(ROUNDED_MARK, UNROUNDED),
        "epochs": len(log["epoch_end_timestamps"]),
        **_attacks_in(stored["init_args"].get(KEY, {})),
        **_histogram(stored["init_args"].get(KEY, {})),
        **{name: [round(float(value), 3) for value in log[name]] for name in QUANTILES if log.get(name)},
    }


def _histogram(ours: Mapping[str, Any]) -> dict[str, list[int]]:
    counted = ours.get("state", {}).get("histograms")
    return {HISTOGRAM: list(counted[-1])} if counted else {}


def _attacks_in(ours: Mapping[str, Any]) -> dict[str, str]:
    """The precision of the last epoch's attacks."""
    if "attacks_mixed" not in ours:
        return {}
    # Before there was a choice, it was a GPU's.
    return {"attacks_in": str(ours.get("attacks_mixed_in", "float16")) if ours["attacks_mixed"] else "float32"}


def _evaluation(run: Path, attacks: Attacks) -> dict[str, Any] | None:
    """None if there is none yet, or one of other attacks, levels or samples, which is none of this study."""
    file = run / "summary.json"
    if not file.is_file():
        return None
    summary = json.loads(file.read_text(encoding="utf-8"))
    found = [(result["attack"], result["level"]) for result in summary["results"]]
    asked = [(attack, level) for attack in attacks.attacks for level in attacks.levels]
    if found != asked or summary["max_samples"] != most_samples(attacks):
        return None
    kept = ("attack", "level", "tvdi", "adi", "robust_share", "tvdi_of_lowest_dice")
    return {
        "samples": summary["clean"]["n_samples"],
        "seed": summary["seed"],
        "samples_seed": summary["samples_seed"],
        "trusted": summary["trusted"],
        "clean": {key: summary["clean"][key] for key in ("tvdi", "adi")},
        "clamp_only": {key: summary["clamp_only"][key] for key in ("tvdi", "adi")} if "clamp_only" in summary else None,
        "results": [{key: result[key] for key in kept if key in result} for result in summary["results"]],
    }


def most_samples(attacks: Attacks) -> int | None:
    """How many samples an evaluation is asked for; None for all."""
    further = list(attacks.further)
    return int(further[further.index("--max-samples") + 1]) if "--max-samples" in further else None


def table(result: Mapping[str, Any]) -> str:
    """TVDI in %, a table an evaluation and attack, beside what was published; then what the trainings took.

    A cell is the mean over repetitions, with their standard deviation if there are several. The last column is the mean
    of clean and all levels, as Table 3's Avg; the mean and deviation are of the repetitions' own means.
    """
    rows: Sequence[Mapping[str, Any]] = in_order(result["rows"])
    lines: list[str] = []
    for name in dict.fromkeys(name for row in rows for name in row["evaluations"]):
        done = [row for row in rows if row["evaluations"][name] is not None]
        if done:
            lines += _evaluation_lines(name, done, str(result["dataset"]))
    trained = [row for row in rows if row["training"]]
    lines += _training_lines(trained) if trained else []
    lines += _seconds_lines(rows)
    return "\n".join(lines).strip() + "\n"


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Method by method, always in the same order; repetition by repetition."""
    known = {method: place for place, method in enumerate(ORDER)}
    others = {row["method"]: len(ORDER) + place for place, row in enumerate(rows) if row["method"] not in known}
    return sorted(rows, key=lambda row: ({**known, **others}[row["method"]], row["repetition"]))


def labels(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What methods are called where an evaluation is shown: how often each was trained, and whether to trust it.

    Args:
        name: of the evaluation.
        rows: of the study, in order.
    """
    done = [row for row in rows if row["evaluations"][name] is not None]
    trainings = Counter(str(row["method"]) for row in done)
    doubted = {row["method"] for row in done if not row["evaluations"][name]["trusted"]}
    most = max(trainings.values(), default=0)
    return {
        method: method
        + (f", {count} of {most}" if count < most else "")
        + (", not to be trusted" if method in doubted else "")
        for method, count in trainings.items()
    }


def protocol_and_norm(name: str) -> tuple[str, str]:
    """Of an evaluation: ``sound_l2``, or ``sound-standard_l2`` for a further one of the same."""
    protocol, norm = name.split("_")
    return protocol.partition("-")[0], norm


def _evaluation_lines(name: str, done: Sequence[Mapping[str, Any]], dataset: str) -> Iterator[str]:
    protocol, norm = protocol_and_norm(name)
    first = done[0]["evaluations"][name]
    clamped = first["clamp_only"] is not None
    most = max(Counter(row["method"] for row in done).values())
    spread = f", mean ± standard deviation of {most} trainings" if most > 1 else ""
    for attack in dict.fromkeys(result["attack"] for result in first["results"]):
        levels = [result["level"] for result in first["results"] if result["attack"] == attack]
        attacked = f"{NORMS[norm]}, {first['samples']} validation slices"
        yield f"\n`{attack}`, protocol `{protocol}`, {attacked}, TVDI in %{spread}:\n"
        yield from _head("method", "clean", *(["clamp only"] if clamped else []), *levels, "mean")
        for method, label in labels(name, done).items():
            mine = [row["evaluations"][name] for row in done if row["method"] == method]
            found = [_figures(one, attack, levels) for one in mine]
            cells = [_cell([figures[place] for figures in found]) for place in range(1 + len(levels))]
            if clamped:
                cells.insert(1, _cell([one["clamp_only"]["tvdi"] for one in mine]))
            yield _line(label, *cells, _cell([statistics.fmean(figures) for figures in found]))
        published = [
            (row, [row.clean, *(row.levels.get(level) for level in levels)])
            for row in _published(dataset, protocol, norm, attack)
            if any(row.levels.get(level) is not None for level in levels)
        ]
        for row, quoted in published:
            known = [value for value in quoted if value is not None]
            mean = f"{statistics.fmean(known):.1f}" if len(known) == len(quoted) else "–"
            cells = ["–" if value is None else f"{value:.1f}" for value in quoted]
            if clamped:
                cells.insert(1, "")
            yield _line(f"*{row.method}*", *cells, mean)
        if published:
            yield f"\nIn italics, published: {published[0][0].source}."


def _figures(evaluation: Mapping[str, Any], attack: str, levels: Sequence[str]) -> list[float]:
    """TVDI of a model: clean, then at each level."""
    found = {(result["attack"], result["level"]): float(result["tvdi"]) for result in evaluation["results"]}
    return [float(evaluation["clean"]["tvdi"]), *(found[attack, level] for level in levels)]


def _published(dataset: str, protocol: str, norm: str, attack: str) -> Sequence[Published]:
    """The paper's rows that one may look at beside these."""
    noise = attack.startswith("white-noise")
    if not noise and not attack.startswith("autoattack"):
        return []
    if protocol == "paper":
        return published_rows(dataset, "WhiteNoise" if noise else "AutoAttack", norm)
    return [] if noise else published_rows(dataset, "PGD", norm)


def _training_lines(trained: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    stock = [row for row in trained if row["method"] == "STD"]
    yield "\nTrainings, in epochs; seconds beside whatever ran at once, a ratio to stock trainings on such machines."
    yield "Passes a sample and step, mean of the training and of its last epoch; of the last epoch, the precision of"
    yield "attacks and the margins (10 / 50 / 90 %).\n"
    yield from _head("method", "epochs", "seconds", "ratio", "attacks in", "passes", "at the end", "margins")
    for row in trained:
        one = row["training"]
        units = [other["training"]["seconds"] for other in stock if _made_on(other) == _made_on(row)]
        ratio = f"{one['seconds'] / statistics.fmean(units):.1f}" if units else ""
        # Stock nnU-Net's own step does not count them; of another method nobody knows what was not counted.
        counted = one.get("passes_per_sample", [1.0] if row["method"] == "STD" else [])
        passes = [f"{value:.1f}" for value in (statistics.fmean(counted), counted[-1])] if counted else ["", ""]
        margins = " / ".join(f"{one[key][-1]:.1f}" for key in QUANTILES[:3]) if "margin_10" in one else ""
        number = f" {row['repetition'] + 1}" if any(other["repetition"] for other in trained) else ""
        seconds, attacks = f"{one['seconds']:.0f}", one.get("attacks_in", "") if "passes_per_sample" in one else ""
        yield _line(f"{row['method']}{number}", str(one["epochs"]), seconds, ratio, attacks, *passes, margins)


def _made_on(row: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    return {tuple(machine[key] for key in ALIKE) for machine in row["training"].get("machines", [])}


def _seconds_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = dict.fromkeys(name for row in rows for name in row["evaluations"])
    spent = {
        name: [one["seconds"] for row in rows if (one := row["evaluations"][name]) and "seconds" in one]
        for name in names
    }
    if not any(spent.values()):
        return
    yield "\nEvaluations, seconds a model beside whatever ran at once; repeated work counts, killed work does not.\n"
    yield from _head("evaluation", "models", "lowest", "median", "highest")
    for name, found in spent.items():
        if found:
            cells = (f"{value:.0f}" for value in (min(found), statistics.median(found), max(found)))
            yield _line(name.replace("_", ", "), str(len(found)), *cells)


def _head(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield _line(*["---"] * len(names))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(values: Sequence[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"
