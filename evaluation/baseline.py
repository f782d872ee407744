"""What a gate compares with: a run's figures, sample by sample, in one small file that can be kept with the code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_ima.dice import Confusion, sample_dice
from nnunet_ima.evaluation.identity import read_sealed, sealed
from nnunet_ima.evaluation.metrics import Array, tvdi
from nnunet_ima.evaluation.results import UNTOUCHED, Key, Results, read_results
from nnunet_ima.evaluation.summary import nothing_learned
from nnunet_ima.files import write_text

SCHEMA = "nnunet_ima/baseline/2"


@dataclass(frozen=True)
class Baseline:
    """Counts of a run's samples.

    Attributes:
        about: model, its training, protocol, attacks, classes and so on, of summary.json.
        samples: case and tile of each.
        counts: by condition, (samples, F, 3) of the tp, fp, fn that TVDI pools.
    """

    about: dict[str, Any]
    samples: list[tuple[str, int]]
    counts: dict[Key, Array]

    @property
    def sizes(self) -> Array:
        """Voxels of each sample's reference by class, (samples, F)."""
        counts = self.counts[UNTOUCHED]
        sizes: Array = counts[:, :, 0] + counts[:, :, 2]
        return sizes


def same_samples(one: Baseline, other: Baseline) -> bool:
    """Whether both are of the same samples; with other labels they are others."""
    return one.samples == other.samples and np.array_equal(one.sizes, other.sizes)


def learned_nothing(baseline: Baseline) -> bool:
    """Whether its model had not learned its task; see :func:`~nnunet_ima.evaluation.summary.nothing_learned`."""
    counts, criterion = baseline.counts[UNTOUCHED], baseline.about["criterion"]
    # Without an attack there is one image of a sample, so that what TVDI pools gives its Dice, too.
    parts = Confusion(*torch.from_numpy(counts).unbind(-1))
    correct = sample_dice(parts, criterion["dice_reduction"]) > criterion["dice_threshold"]
    clean = {"n_samples": len(counts), "robust_share": float(correct.double().mean()), "tvdi": tvdi(counts)}
    return nothing_learned({"clean": clean, "criterion": criterion})


def baseline_of(results: Results) -> Baseline:
    """Of a finished run."""
    table = results.samples[UNTOUCHED]
    samples = list(zip(table.cases.tolist(), table.tiles.tolist(), strict=True))
    names = ("model", "protocol", "criterion", "classes", "patch_size", "seed", "versions")
    about = {name: results.summary[name] for name in names}
    # Older runs do not tell.
    noted = [name for name in ("attacks", "training", "normalisation") if name in results.summary]
    about |= {name: results.summary[name] for name in noted}
    # Which samples: those of older runs were chosen by the attacks' seed.
    about["max_samples"] = results.summary["max_samples"]
    about["samples_seed"] = results.summary.get("samples_seed", results.summary["seed"])
    keys = [UNTOUCHED, *((item["attack"], item["level"]) for item in results.attacked)]
    return Baseline(about, samples, {key: results.samples[key].counts for key in keys})


def write_baseline(baseline: Baseline, file: Path) -> None:
    """Write it as JSON."""
    content = {
        "schema": SCHEMA,
        "about": baseline.about,
        "samples": baseline.samples,
        "conditions": [
            {"attack": attack, "level": level, "counts": counts.astype(int).tolist()}
            for (attack, level), counts in baseline.counts.items()
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(sealed(content)) + "\n")


def read_baseline(path: Path) -> Baseline:
    """Of a file that :func:`write_baseline` wrote, or of the folder of a run.

    Raises:
        UserError: it is missing, damaged, of another version, or was changed.
    """
    if path.is_dir():
        return baseline_of(read_results(path))
    advice = f"make it of a run with nnunet_ima gate RUN --write-baseline {path}"
    content = read_sealed(path, SCHEMA, advice)
    counts = {(item["attack"], item["level"]): np.array(item["counts"], float) for item in content["conditions"]}
    return Baseline(content["about"], [(case, tile) for case, tile in content["samples"]], counts)
