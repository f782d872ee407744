"""From a study's runs to rows and to a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from study_state import ROUNDED_MARK

from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline

QUANTILES = ("margin_10", "margin_50", "margin_90", "margin_mean", "visits_mean", "passes_per_sample")


def collect(
    pipeline: Pipeline, dataset: Path, methods: Sequence[tuple[Method, int]], evaluations: Sequence[Attacks]
) -> list[dict[str, Any]]:
    """A row a trained model: how it was trained, and what each evaluation found of it so far."""
    return [
        {
            "method": method.title,
            "repetition": repetition,
            "settings": dict(method.settings),
            "training": _training(pipeline.fold_folder(dataset, method) / "checkpoint_final.pth"),
            "evaluations": {
                attacks.name: _evaluation(pipeline.output / f"{attacks.name}_{pipeline.key(method)}")
                for attacks in evaluations
            },
        }
        for method, repetition in methods
    ]


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
        "weights": stored.get(ROUNDED_MARK, "single precision"),
        "epochs": len(log["epoch_end_timestamps"]),
        **{name: [round(float(value), 3) for value in log[name]] for name in QUANTILES if log.get(name)},
    }


def _evaluation(run: Path) -> dict[str, Any] | None:
    file = run / "summary.json"
    if not file.is_file():
        return None
    summary = json.loads(file.read_text(encoding="utf-8"))
    kept = ("attack", "level", "tvdi", "adi", "robust_share", "tvdi_of_lowest_dice")
    return {
        "samples": summary["clean"]["n_samples"],
        "trusted": summary["trusted"],
        "clean": {key: summary["clean"][key] for key in ("tvdi", "adi")},
        "clamp_only": {key: summary["clamp_only"][key] for key in ("tvdi", "adi")} if "clamp_only" in summary else None,
        "results": [{key: result[key] for key in kept if key in result} for result in summary["results"]],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """TVDI in %, a table an evaluation; mean and standard deviation over repetitions."""
    lines: list[str] = []
    names = list(dict.fromkeys(name for row in rows for name in row["evaluations"]))
    for name in names:
        done = [row for row in rows if row["evaluations"][name] is not None]
        if not done:
            continue
        first = done[0]["evaluations"][name]
        columns = [(result["attack"], result["level"]) for result in first["results"]]
        clamp = first["clamp_only"] is not None
        lines += [f"\n`{name}`, {first['samples']} validation slices, TVDI in %:\n"]
        heads = ["method", "clean", *(["clamp only"] if clamp else []), *(f"{a} {level}" for a, level in columns)]
        lines += ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
        for method in dict.fromkeys(row["method"] for row in done):
            mine = [row["evaluations"][name] for row in done if row["method"] == method]
            cells = [_cell([one["clean"]["tvdi"] for one in mine])]
            if clamp:
                cells.append(_cell([one["clamp_only"]["tvdi"] for one in mine]))
            for place in range(len(columns)):
                cells.append(_cell([one["results"][place]["tvdi"] for one in mine]))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    seconds = [(row["method"], row["training"]["seconds"]) for row in rows if row["training"]]
    if seconds:
        lines += [
            "\nSeconds in epochs of the training, beside whatever ran at once: "
            + ", ".join(f"{m} {s:.0f}" for m, s in seconds)
        ]
    return "\n".join(lines).strip() + "\n"


def _cell(values: Sequence[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"
