"""What makes an IMA step cheaper, or would, and what it costs in strength: changes measured beside IMA as it is.

Some changes leave out what makes it cheaper already.

A change is tried on the same batches, margins and noise. Strength is what the inner attack finds: the loss of the
perturbed samples, how far they are from the clean ones, and where the margins go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from statistics import mean
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from speed_models import Ground
from speed_trainers import IMA, KINDS, STOCK, TE, at_work, capture_graphs, make, make_stock, measure, prepare_step
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_ima.attacks import bpgd
from nnunet_ima.attacks.bpgd import bisect
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import Ascent, Oracle
from nnunet_ima.attacks.pgd import ascend
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.lp import lp_norm, per_sample
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

MOMENTUM = 0.75
# Steps of GenAdv in 4E/K: those of the first four tenths, of the next three, of the last three.
HALVED = (2.0, 1.0, 0.5)
FEW_SIZES = 4
# Each size with and without a gradient, in either precision, and what training passes need where nnU-Net compiles.
MOST_VARIANTS = 64


class Saving(NamedTuple):
    """A change to IMA.

    Attributes:
        predicted: by what share of a step it was thought to be shorter, before it was measured, and why.
        settings: that differ.
        change: what is done to the trainer.
        missing: of IMA as it is, why the change cannot be measured here; None where it can.
        kind: of the trainer.
    """

    predicted: str
    settings: Mapping[str, Any]
    change: Callable[[Any], None] | None = None
    missing: Callable[[Any], str | None] = lambda _: None
    kind: type[Any] = KINDS[IMA]


def _single(trainer: Any) -> None:
    trainer.attack_autocast = nullcontext


def _is_single(trainer: Any) -> str | None:
    return "attack passes are in single precision as it is" if trainer.attack_autocast is nullcontext else None


def _without_graphs(trainer: Any) -> None:
    trainer._graphs = None


def _with_graphs_of_few_sizes(trainer: Any) -> None:
    trainer._graphs = CudaGraphs(trainer.attack_chunk or trainer.batch_size, FEW_SIZES)


def _has_no_graphs(trainer: Any) -> str | None:
    if trainer._graphs is None:
        return "IMA's attack passes are no CUDA graphs here"
    refused: str | None = trainer._graphs.refused
    return refused


class CompiledIMA(nnUNetTrainerIMA):
    """IMA with compiled attack passes, each size for itself: with sizes left open kernels are slower."""

    _compiled: nn.Module | None = None

    @property
    def attacked_network(self) -> nn.Module:
        """The compiled one."""
        if self._compiled is None:
            self._compiled = cast(nn.Module, torch.compile(self.bare_network, dynamic=False))
        return self._compiled


def _channels_last(trainer: Any) -> None:
    two = len(trainer.configuration_manager.patch_size) == 2
    trainer.network.to(memory_format=torch.channels_last if two else torch.channels_last_3d)


class _Momentum:
    """An oracle whose gradients are sums over the steps so far, as in MI-FGSM (arXiv 1710.06081), but of L2 norm 1."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._sums: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def ascent(self, images: Tensor, index: Tensor, progress: float = 0.0) -> Ascent:
        found = self._oracle.ascent(images, index, progress=progress)
        unit = found.gradient / per_sample(lp_norm(found.gradient, "l2").clamp_min(1e-30), images)
        if self._sums is None:
            self._sums = unit.new_zeros((len(self._oracle.target), *unit.shape[1:]))
        self._sums[index] = unit + MOMENTUM * self._sums[index]
        return found._replace(gradient=self._sums[index])


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


class _WithWeightGradients:
    """An oracle that has the weights' gradients computed along with those for the images, and forgets them."""

    def __init__(self, oracle: Oracle, network: nn.Module) -> None:
        self._oracle, self._weights = oracle, list(network.parameters())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def ascent(self, images: Tensor, index: Tensor, progress: float = 0.0) -> Ascent:
        gradients = torch.autograd.grad

        def of_images(outputs: Tensor, inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
            return gradients(outputs, [inputs, *self._weights], **options)[:1]

        for weight in self._weights:
            weight.requires_grad_(True)
        try:
            with patch.object(torch.autograd, "grad", of_images):
                return self._oracle.ascent(images, index, progress=progress)
        finally:
            for weight in self._weights:
                weight.requires_grad_(False)


def _with_weight_gradients(trainer: Any) -> None:
    inner = trainer.attack_oracle
    trainer.attack_oracle = lambda *asked: _WithWeightGradients(inner(*asked), trainer.bare_network)


class _FullResolutionOnly:
    """An oracle whose network gives the output of full resolution alone in what it is asked: heads, loss, gradient."""

    def __init__(self, oracle: Oracle, trainer: Any, also_ascents: bool) -> None:
        self._oracle, self._trainer, self._also_ascents = oracle, trainer, also_ascents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._oracle, name)

    def ascent(self, images: Tensor, index: Tensor, progress: float = 0.0) -> Ascent:
        with self._alone() if self._also_ascents else nullcontext():
            return self._oracle.ascent(images, index, progress=progress)

    def dice(self, images: Tensor, index: Tensor) -> Tensor:
        with self._alone():
            return self._oracle.dice(images, index)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._trainer.set_deep_supervision_enabled(False)
        try:
            yield
        finally:
            self._trainer.set_deep_supervision_enabled(True)


def _no_heads(trainer: Any, also_ascents: bool = False) -> None:
    inner = trainer.attack_oracle
    trainer.attack_oracle = lambda *asked: _FullResolutionOnly(inner(*asked), trainer, also_ascents)


def _has_no_heads(trainer: Any) -> str | None:
    return None if trainer.enable_deep_supervision else "the network has no deep supervision"


def halved(step: int, steps: int) -> float:
    """By how much the step number ``step`` of ``steps`` is longer than all are without halving."""
    return HALVED[0 if 10 * step < 4 * steps else 1 if 10 * step < 7 * steps else 2]


def _with_halved_steps(trainer: Any) -> None:
    inner = trainer._generate

    def generate(*asked: Any) -> Any:
        # GenAdv ascends once for all samples that are left.
        taken = count()

        def shorter(threat: Any, point: Tensor, images: Tensor, gradient: Tensor, length: float) -> Tensor:
            return ascend(threat, point, images, gradient, length * halved(next(taken), trainer.settings.steps))

        with patch.object(bpgd, "ascend", shorter):
            return inner(*asked)

    trainer._generate = generate


def _bisect_one_by_one(
    oracle: Oracle, criterion: DiceCriterion, correct_side: Tensor, wrong_side: Tensor, index: Tensor, halvings: int
) -> Tensor:
    """As :func:`bisect`, each crossing in passes of its own."""
    found = [
        bisect(oracle, criterion, correct_side[i : i + 1], wrong_side[i : i + 1], index[i : i + 1], halvings)
        for i in range(len(index))
    ]
    return torch.cat(found) if found else wrong_side


def _one_by_one(trainer: Any) -> None:
    inner = trainer._generate

    def generate(*asked: Any) -> Any:
        with patch.object(bpgd, "bisect", _bisect_one_by_one):
            return inner(*asked)

    trainer._generate = generate


SAVINGS: dict[str, Saving] = {
    # First, as each further trainer leaves less memory for graphs.
    "no CUDA graphs": Saving(
        "longer: the GPU waits for Python with few samples left", {}, _without_graphs, _has_no_graphs
    ),
    "CUDA graphs of four sizes": Saving(
        "a little longer: passes hold more zeros", {}, _with_graphs_of_few_sizes, _has_no_graphs
    ),
    "CUDA graphs of four sizes, compiled": Saving(
        "30 to 40 %", {}, _with_graphs_of_few_sizes, _has_no_graphs, CompiledIMA
    ),
    "10 ascents instead of 20": Saving("up to half of the attack passes; a weaker attack", {"steps": 10}),
    "10 ascents with momentum instead of 20": Saving(
        "the same, and momentum may find as much", {"steps": 10}, _with_momentum
    ),
    "20 ascents with momentum": Saving("none, unless samples cross earlier", {}, _with_momentum),
    "10 ascents instead of 20, steps halved on the way": Saving(
        "half of the attack passes; long steps first may cross as often", {"steps": 10}, _with_halved_steps
    ),
    "start where an attack on the same patch ended": Saving("samples cross at once, or after few steps", {}, _warm),
    "6 bisections instead of 10": Saving("8 %: four forward passes of the crossed samples", {"bisections": 6}),
    "each crossing bisected in passes of its own": Saving(
        "longer: passes of one sample cost more than their share", {}, _one_by_one
    ),
    "gradients for the weights in attack passes, too": Saving(
        "a third of a backward pass longer, each", {}, _with_weight_gradients
    ),
    "attack passes in single precision": Saving(
        "longer where they are in another one (CUDA, AMX)", {}, _single, _is_single
    ),
    "no deep supervision heads in passes that only give the Dice": Saving(
        "under 1 %: 1 x 1 convolutions of small maps", {}, _no_heads, _has_no_heads
    ),
    "attack passes climb the loss of the full resolution alone": Saving(
        "some %: no heads and losses of small maps", {}, partial(_no_heads, also_ascents=True), _has_no_heads
    ),
    "network in channels-last": Saving("some %: oneDNN's own layout, for training passes too", {}, _channels_last),
}


def measure_savings(ground: Ground, device: torch.device, steps: int, warm_up: int, title: str) -> dict[str, Any]:
    """``rows``, one for each change: seconds as a share of IMA's step, passes, and what is found.

    ``left_out`` says of the others why they cannot be measured on this device.
    """
    left_out: dict[str, str] = {}
    # By default torch compiles eight variants of a function, and runs others eagerly under the name of compiled ones.
    with at_work(ground), torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS, fail_on_recompile_limit_hit=True):
        trainers = {STOCK: make_stock(ground, device), IMA: make(KINDS[IMA], ground, device)}
        loader = make(KINDS[TE], ground, device).dataloader_train
        batch = next(loader)
        capture_graphs(trainers[IMA], batch)
        for name, saving in SAVINGS.items():
            reason = saving.missing(trainers[IMA])
            if reason is None:
                changed = make(saving.kind, ground, device, **saving.settings)
                if saving.change is not None:
                    saving.change(changed)
                reason = _lost_its_graphs(trainers[IMA], changed, saving) or _not_captured(changed, batch)
            if reason is None:
                trainers[name] = changed
            else:
                left_out[name] = reason
        found = measure(trainers, loader, steps, warm_up, title)["rows"]
        strengths = _strengths(trainers, loader, max(3, steps // 2))
    rows = [
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
    return {"rows": rows, "left_out": left_out}


def _lost_its_graphs(ima: Any, changed: Any, saving: Saving) -> str | None:
    """Why a change cannot be measured beside IMA with graphs: each trainer before it holds on to memory."""
    if ima._graphs is None or changed._graphs is not None or saving.change is _without_graphs:
        return None
    return "the GPU's memory was not enough for its CUDA graphs beside those of the other changes"


def _not_captured(trainer: Any, batch: Mapping[str, Any]) -> str | None:
    """Capture, and compile, all that a step asks; what went wrong, as other passes must not bear the change's name."""
    try:
        capture_graphs(trainer, batch)
    except RuntimeError as error:  # what cannot be compiled is one, and so is too little memory
        return " ".join(str(error).split())[:200] or type(error).__name__
    refused: str | None = trainer._graphs.refused if trainer._graphs is not None else None
    return refused


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
