"""What makes an IMA step cheaper, or would, and what it costs in strength: changes measured beside IMA as it is.

A change is tried on the same batches, margins and noise. Strength is what the inner attack finds: the loss of the
perturbed samples, how far they are from the clean ones, and where the margins go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from speed_models import Ground
from speed_trainers import IMA, KINDS, STOCK, TE, at_work, make, make_stock, measure, prepare_step
from torch import Tensor
from tqdm import tqdm

from nnunet_ima.attacks.oracle import Ascent, Oracle
from nnunet_ima.lp import lp_norm, per_sample

MOMENTUM = 0.75


class Saving(NamedTuple):
    """A change to IMA.

    Attributes:
        predicted: by what share of a step it was thought to be shorter, before it was measured, and why.
        settings: that differ.
        change: what is done to the trainer.
    """

    predicted: str
    settings: Mapping[str, Any]
    change: Callable[[Any], None] | None = None


def _single(trainer: Any) -> None:
    trainer.attack_autocast = nullcontext


def _channels_last(trainer: Any) -> None:
    two = len(trainer.configuration_manager.patch_size) == 2
    trainer.network.to(memory_format=torch.channels_last if two else torch.channels_last_3d)


class _Momentum:
    """An oracle whose gradients are sums over the steps so far, as in MI-FGSM (arXiv 1710.06081), but of L2 norm 1."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._sums: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def ascent(self, images: Tensor, index: Tensor, progress: float = 0.0) -> Ascent:
        found = self._oracle.ascent(images, index, progress=progress)
        unit = found.gradient / per_sample(lp_norm(found.gradient, "l2").clamp_min(1e-30), images)
        rows = index.tolist()
        for row, (sample, own) in enumerate(zip(rows, unit, strict=True)):
            self._sums[sample] = unit[row] = own + MOMENTUM * self._sums.get(sample, torch.zeros_like(own))
        return found._replace(gradient=unit)


def _with_momentum(trainer: Any) -> None:
    inner = trainer.attack_oracle
    trainer.attack_oracle = lambda *asked: _Momentum(inner(*asked))


class _WarmStart:
    """Starts a batch's attack where one on the same patches, made before the step and not timed, ended.

    That is the most that perturbations of earlier visits could give: a visit shows its sample augmented otherwise.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._noise = trainer, trainer._start_noise
        self._found: dict[str, Tensor] = {}
        trainer._start_noise = self.start
        trainer.before_step = self.attack_before

    def attack_before(self, batch: Mapping[str, Any], seed: int) -> None:
        """Attack a copy of the batch, from noise; margins stay as they are."""
        trainer, kept = self._trainer, copy.deepcopy(self._trainer.margins)
        self._found, generate = {}, trainer._generate

        def spy(images: Tensor, targets: Any, index: Tensor, threat: Any) -> Any:
            answer = generate(images, targets, index, threat)
            self._found = {"delta": answer[0] - images}
            return answer

        with patch.object(trainer, "_generate", spy), patch.object(trainer.optimizer, "step"):
            trainer.train_step(copy.deepcopy(dict(batch)))
        trainer.margins = kept
        trainer.generator.manual_seed(seed)

    def start(self, images: Tensor, threat: Any) -> Tensor:
        """What was found, of the norm that noise would have."""
        noise: Tensor = self._noise(images, threat)
        if not self._found:
            return noise
        delta = self._found["delta"]
        norms = [per_sample(lp_norm(one, "l2"), images) for one in (noise, delta)]
        started: Tensor = delta * norms[0] / norms[1].clamp_min(1e-30)
        return started


def _warm(trainer: Any) -> None:
    _WarmStart(trainer)


SAVINGS: dict[str, Saving] = {
    "10 ascents instead of 20": Saving("up to half of the attack passes; a weaker attack", {"steps": 10}),
    "10 ascents with momentum instead of 20": Saving(
        "the same, and momentum may find as much", {"steps": 10}, _with_momentum
    ),
    "20 ascents with momentum": Saving("none, unless samples cross earlier", {}, _with_momentum),
    "start where an attack on the same patch ended": Saving("samples cross at once, or after few steps", {}, _warm),
    "6 bisections instead of 10": Saving("8 %: four forward passes of the crossed samples", {"bisections": 6}),
    "attack passes in single precision": Saving("longer where they are in another one (CUDA, AMX)", {}, _single),
    "network in channels-last": Saving("some %: oneDNN's own layout, for training passes too", {}, _channels_last),
}


def measure_savings(ground: Ground, device: torch.device, steps: int, warm_up: int, title: str) -> list[dict[str, Any]]:
    """One row for each change: seconds as a share of IMA's step, passes, and what is found."""
    with at_work(ground):
        trainers = {STOCK: make_stock(ground, device), IMA: make(KINDS[IMA], ground, device)}
        single = trainers[IMA].attack_autocast is nullcontext
        for name, saving in SAVINGS.items():
            if saving.change is _single and single:
                continue
            trainers[name] = make(KINDS[IMA], ground, device, **saving.settings)
            if saving.change is not None:
                saving.change(trainers[name])
        loader = make(KINDS[TE], ground, device).dataloader_train
        found = measure(trainers, loader, steps, warm_up, title)["rows"]
        strengths = _strengths(trainers, loader, max(3, steps // 2))
    return [
        {
            "change": name,
            "predicted": SAVINGS[name].predicted if name in SAVINGS else None,
            "ratio": found[name]["ratio"],
            "share_of_ima": round(found[name]["ratio"]["median"] / found[IMA]["ratio"]["median"], 3),
            "passes_per_sample": found[name]["passes_per_sample"],
            **strengths[name],
        }
        for name in trainers
        if name != STOCK
    ]


def _strengths(trainers: Mapping[str, Any], loader: Any, batches: int) -> dict[str, dict[str, float]]:
    """Means over all perturbed samples of some batches, as a share of what IMA finds as it is."""
    values: dict[str, list[tuple[float, float, float]]] = {name: [] for name in trainers if name != STOCK}
    judge = trainers[IMA]
    for seed in tqdm(range(batches), desc="strength", unit="batch", dynamic_ncols=True):
        batch = next(loader)
        for name in values:
            found = _found(trainers[name], judge, batch, seed)
            # The clean pass is the same for all: where IMA perturbs nothing, none does.
            values[name] += [] if found is None else [found]
    means = {name: [mean(column) for column in zip(*rows, strict=True)] for name, rows in values.items()}
    keys = ("loss", "distance", "margin")
    return {
        name: {key: round(own / whole, 5) for key, own, whole in zip(keys, found, means[IMA], strict=True)}
        for name, found in means.items()
    }


def _found(trainer: Any, judge: Any, batch: Mapping[str, Any], seed: int) -> tuple[float, float, float] | None:
    """Mean loss, distance and new margin of the perturbed samples; None if there are none."""
    mine, kept = prepare_step(trainer, batch, seed), copy.deepcopy(trainer.margins)
    record: dict[str, Tensor] = {}
    generate = trainer._generate

    def spy(images: Tensor, targets: Any, index: Tensor, threat: Any) -> Any:
        found = generate(images, targets, index, threat)
        record.update(images=images, index=index, found=found[0])
        return found

    with patch.object(trainer, "_generate", spy):
        trainer.train_step(mine)
    margins = trainer.margins.margins(trainer.samples_of(batch))[record["index"].cpu()]
    trainer.margins = kept
    if not len(margins):
        return None
    targets = [part.to(judge.device)[record["index"]] for part in mine["target"]]
    with torch.no_grad():
        loss = judge.sample_loss(judge.bare_network(record["found"]), targets)
    distance = (record["found"] - record["images"]).flatten(1).norm(dim=1)
    return float(loss.mean()), float(distance.mean()), float(margins.mean())
