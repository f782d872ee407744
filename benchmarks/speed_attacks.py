"""Seconds and passes per sample of every attack, as ratios to straightforward PGD on the same samples.

Before each attack, and after the last one, the straightforward PGD runs (every sample, every pass): a ratio is to the
mean of the two beside it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from attacks import prepared
from hippocampus_small import IMA, NETWORK, STD_LONGER
from speed_clock import cudnn_chooses, seconds_of
from speed_models import Dimension, Ground
from speed_plain import Ball, PlainNetwork, plain_pgd
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_ima.attacks import ATTACKS, PGD, Attack, AttackResult, AutoAttack
from nnunet_ima.attacks.attack import MODES
from nnunet_ima.attacks.autoattack import VERSIONS
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.pipeline import Method, Pipeline
from nnunet_ima.precision import use_exact_convolutions

# As PGD is by default: what it is compared with does the same steps.
PGD_STEPS, PGD_STEP = PGD.steps, PGD.step_size
PLAIN_PGD = "pgd, straightforward"
ITEMS: dict[str, Callable[..., Attack]] = {
    **{name: attack for name, attack in ATTACKS.items() if attack is not AutoAttack},
    **{
        f"autoattack {version}, {mode}": partial(AutoAttack, version=version, mode=mode)
        for version in VERSIONS
        for mode in MODES
    },
}
TOLERANCE = 1e-9


def models_of(dimension: Dimension, models: Path | None, ground: Ground) -> dict[str, tuple[Pipeline, Method]]:
    """What is attacked: in 2D the stock and the hardened model of ``hippocampus_small.py`` if there are any."""
    found: dict[str, tuple[Pipeline, Method]] = {}
    if dimension == "2d" and models is not None:
        pipeline = Pipeline(models, "nnUNetPlansSmall", NETWORK, ground.pipeline.device, make_folders=False)
        (dataset,) = pipeline.folders["nnUNet_preprocessed"].glob("Dataset*")
        for name, method in (("stock", STD_LONGER), ("IMA", IMA)):
            # Asked for its fold, a pipeline adds a split that is not there, and nothing may be changed here.
            if any(pipeline.model(dataset, method).glob("fold_*/checkpoint_final.pth")):
                found[name] = (pipeline, method)
    return found or {ground.method.title: (ground.pipeline, ground.method)}


def measure_attacks(
    models: Mapping[str, tuple[Pipeline, Method]], names: Sequence[str], level: str, samples: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each model and attack.

    Args:
        models: pipeline and method by name.
        names: of :data:`ITEMS`.
        level: L2, in z-scores.
        samples: slices (or tiles) drawn from the validation cases.
        device: to attack on.

    Raises:
        RuntimeError: PGD and its straightforward reference do not find the same.
    """
    use_exact_convolutions()
    rows: list[dict[str, Any]] = []
    with cudnn_chooses(by_timing=False):
        for model, (pipeline, method) in models.items():
            rows += _of_model(model, pipeline, method, names, level, samples, device)
    for row in rows:
        row["seconds_per_sample"] = round(row.pop("seconds") / samples, 5)
    return rows


def _of_model(
    model: str, pipeline: Pipeline, method: Method, names: Sequence[str], level: str, samples: int, device: torch.device
) -> list[dict[str, Any]]:
    options = argparse.Namespace(samples=samples, device=str(device))
    rows: list[dict[str, Any]] = []
    with patch.dict(os.environ, {name: str(folder) for name, folder in pipeline.folders.items()}):
        network, images, targets, make = prepared(pipeline, method, level, options)
    apart = disagreement(network, images, targets, make)
    if not apart <= TOLERANCE:
        raise RuntimeError(f"PGD and the straightforward reference are {apart} apart in the Dice they find.")
    plain = partial(run_plain, network, images, targets, make)
    # The first one is slower: the system still hands out memory, and a GPU chooses its kernels.
    plain()
    before = seconds_of(plain, device)
    reference: list[float] = [before]
    for name in tqdm(names, desc=f"attacks on {model}", unit="attack", dynamic_ncols=True):
        # Graphs of its own: its memory is not to be that of the attacks before it.
        graphs = CudaGraphs(len(images)) if device.type == "cuda" else None
        attack = replace(make(ITEMS[name]), graphs=graphs)
        row = run_attack(attack, network, images, targets, device)
        after = seconds_of(plain, device)
        reference.append(after)
        rows.append({"model": model, "attack": name, "ratio": round(2 * row["seconds"] / (before + after), 3), **row})
        before = after
    rows.append(
        {
            "model": model,
            "attack": PLAIN_PGD,
            "ratio": 1.0,
            "seconds": mean(reference),
            "forward_passes": float(PGD_STEPS + 2),
            "backward_passes": float(PGD_STEPS),
            "adi": None,
        }
    )
    return rows


def run_attack(
    attack: Attack, network: nn.Module, images: Tensor, targets: Tensor, device: torch.device
) -> dict[str, Any]:
    """Seconds, passes and mean Dice; on a GPU also the most memory that PyTorch had reserved, graphs included."""
    if device.type == "cuda":
        # An evaluation captures its graphs in its first batch, and replays them in all others.
        attack(network, images, targets)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    found: list[AttackResult] = []
    seconds = seconds_of(lambda: found.append(attack(network, images, targets)), device)
    row = {
        "seconds": seconds,
        "forward_passes": round(float(found[0].forward_passes.double().mean()), 2),
        "backward_passes": round(float(found[0].backward_passes.double().mean()), 2),
        "adi": round(float(found[0].dice.double().mean()), 4),
    }
    if device.type == "cuda":
        row["mib"] = round(torch.cuda.max_memory_reserved(device) / 2**20, 1)
    return row


def run_plain(
    network: nn.Module, images: Tensor, targets: Tensor, make: Callable[[Callable[..., Attack]], Attack]
) -> Tensor:
    """Straightforward PGD: the lowest Dice (B,) of each sample."""
    attack = make(PGD)
    low, high = attack.threat.bounds(images)
    ball = Ball(images, attack.threat.radius(images).flatten(), low, high)
    asked = PlainNetwork(network, targets, attack.loss_function(), attack.criterion, attack.autocast)
    found = plain_pgd(asked, ball, PGD_STEPS, PGD_STEP)
    network.zero_grad(set_to_none=True)
    return found


def disagreement(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    make: Callable[[Callable[..., Attack]], Attack],
    samples: int = 2,
) -> float:
    """Largest difference between the Dice that PGD and its reference find for some samples, in double precision."""
    attack = make(PGD)
    some = replace(attack, threat=attack.threat.select(torch.arange(samples, device=images.device)))
    first, target = images[:samples].double(), targets[:samples]
    network.double()
    try:
        ours, theirs = some(network, first, target).dice, run_plain(network, first, target, lambda _: some)
    finally:
        network.float()
    return float((ours - theirs).abs().max())


def known(names: Sequence[str]) -> list[str]:
    """The names of attacks, in the order of the table.

    Raises:
        UserError: there is no such attack.
    """
    for name in names:
        if name not in ITEMS:
            raise UserError(f"There is no attack {name!r} in this benchmark; there are {', '.join(ITEMS)}.")
    return [name for name in ITEMS if name in names]
