"""Seconds, passes and parts of a step of every trainer, as ratios to stock nnU-Net's step on the same batch.

Steps take turns, with a stock step between any two, so that whatever else the machine does hits all alike; a ratio is
to the mean of the stock steps before and after. The stock step is an eager one; on CUDA a compiled one, as of
``nnUNetv2_train``, takes its turn, too, and ratios to it are given beside. Nobody learns (the learning rate is 0): the
model shall stay half-trained, and IMA's margins where they were set.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from speed_clock import PARTS, Clock, cudnn_chooses, seconds_of, summary, watched
from speed_models import Ground
from speed_plain import PlainIMA, PlainNetwork
from torch import Tensor
from tqdm import tqdm

from nnunet_ima.attacks.oracle import undisturbed
from nnunet_ima.settings import KEY
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES

STOCK, COMPILED = "stock nnU-Net", "stock nnU-Net, compiled"
IMA, PLAIN, TE = "IMA", "IMA, straightforward", "TE"
KINDS: dict[str, type[Any]] = {
    STOCK: nnUNetTrainer,
    "STD": nnUNetTrainerSTD,
    IMA: nnUNetTrainerIMA,
    PLAIN: PlainIMA,
    "SAT": nnUNetTrainerSAT,
    TE: nnUNetTrainerTE,
    "TRADES": nnUNetTrainerTRADES,
}
# TE's averages count from the first step on. The robust Dice is no part of a step.
SETTINGS: dict[str, Any] = {"epsilon": 15.0, "delta_epsilon": 2.0, "te_start": 0.0, "te_end": 0.0, "snapshots": 0}
ON_CPU = {"robust_every": 0}
MARGIN, SPREAD = 4.0, 1.0
SHARES = ("foreground", "correct", "perturbed", "crossed")
PLAIN_PASSES = ((PlainNetwork, "gradient"), (PlainNetwork, "dice"))
# In double precision, where both orders of summation give the same.
TOLERANCE = 1e-6


@contextlib.contextmanager
def at_work(ground: Ground) -> Iterator[None]:
    """nnU-Net finds its folders, keeps its results in a temporary one, and prints nothing; kernels as it has them."""
    with (
        cudnn_chooses(by_timing=True),
        tempfile.TemporaryDirectory() as results,
        contextlib.redirect_stdout(io.StringIO()),
        patch.dict(os.environ, {**ground.environment(), "nnUNet_results": results}),
    ):
        yield


def make(kind: type[Any], ground: Ground, device: torch.device, **settings: Any) -> Any:
    """A trainer with the stock model's weights, in its second epoch, which never learns; call it :func:`at_work`."""
    plans = json.loads(ground.plans.read_text(encoding="utf-8"))
    mine = {**SETTINGS, **(ON_CPU if device.type == "cpu" else {}), **settings}
    plans["configurations"][ground.configuration][KEY] = mine
    plans["continue_training"] = False
    dataset_json = json.loads((ground.dataset / "dataset.json").read_text(encoding="utf-8"))
    trainer = kind(plans, ground.configuration, 0, dataset_json, device)
    trainer.initialize()
    weights = torch.load(ground.checkpoint, map_location=device, weights_only=False)["network_weights"]
    getattr(trainer.network, "_orig_mod", trainer.network).load_state_dict(weights)
    trainer.on_train_start()
    # The first one chooses the precision of the attack, on a GPU the second one takes up CUDA graphs.
    trainer.on_train_epoch_start()
    if hasattr(trainer, "note_memory"):
        trainer.note_memory()
    trainer.on_train_epoch_start()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    return trainer


def make_stock(ground: Ground, device: torch.device, compiled: bool = False, **settings: Any) -> Any:
    """Stock nnU-Net, eager unless told otherwise, whatever the other trainers are."""
    with patch.dict(os.environ, {"nnUNet_compile": "1" if compiled else "0"}):
        return make(KINDS[STOCK], ground, device, **settings)


def make_all(ground: Ground, device: torch.device, **settings: Any) -> dict[str, Any]:
    """One trainer of each kind, and on CUDA stock nnU-Net compiled."""
    trainers = {STOCK: make_stock(ground, device, **settings)}
    if device.type == "cuda":
        trainers[COMPILED] = make_stock(ground, device, compiled=True, **settings)
    return trainers | {name: make(kind, ground, device, **settings) for name, kind in KINDS.items() if name != STOCK}


def capture_graphs(trainer: Any, batch: Mapping[str, Any]) -> None:
    """Have a trainer capture all of its CUDA graphs now, of every number of samples; without graphs do nothing.

    A training does so once, and replays them for the rest of it.
    """
    graphs = getattr(trainer, "_graphs", None)
    if graphs is None:
        return
    step_of(trainer, batch, 0)
    if trainer.attack_sizes == 1:
        return
    targets = [part.to(trainer.device) for part in batch["target"]]
    images = batch["data"].to(trainer.device)
    with undisturbed(trainer.bare_network):
        oracle = trainer.attack_oracle(targets, trainer.sample_loss, trainer.criterion)
        for size in graphs.sizes:
            index = torch.arange(size, device=trainer.device)
            oracle.ascent(images[index], index)
            oracle.dice(images[index], index)


def prepare_step(trainer: Any, batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The batch for one trainer; IMA's margins of its samples, and its noise, are the same for one ``seed``."""
    if isinstance(trainer, nnUNetTrainerIMA):
        samples = trainer.samples_of(batch)
        drawn = torch.randn(len(samples), generator=torch.Generator().manual_seed(seed))
        trainer.margins.update(samples, (MARGIN + SPREAD * drawn).clamp(0.5, SETTINGS["epsilon"]))
        trainer.generator.manual_seed(seed)
        # A change that is measured may need to know the batch before the clock runs.
        if hasattr(trainer, "before_step"):
            trainer.before_step(batch, seed)
    return copy.deepcopy(dict(batch))


def step_of(trainer: Any, batch: Mapping[str, Any], seed: int) -> tuple[float, Mapping[str, float]]:
    """Seconds of a step, and what it counted."""
    mine, found = prepare_step(trainer, batch, seed), {}
    seconds = seconds_of(lambda: found.update(trainer.train_step(mine)), trainer.device)
    samples = len(batch["keys"])
    return seconds, found.get("counts", [{"samples": samples, "forward_passes": samples}])[0]


def measure(trainers: Mapping[str, Any], loader: Any, steps: int, warm_up: int, title: str) -> dict[str, Any]:
    """Ratios, passes and parts of every trainer, and what loading costs.

    Args:
        trainers: by name, the stock one among them.
        loader: TE's, whose batches hold what every trainer needs.
        steps: of each.
        warm_up: steps of each that do not count, before those.
        title: of the progress bar.
    """
    stock = trainers[STOCK]
    others = [name for name in trainers if name != STOCK]
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    ratios: dict[str, list[float]] = {name: [] for name in others}
    counted: dict[str, list[Mapping[str, float]]] = {name: [] for name in trainers}
    loading: dict[str, list[float]] = {name: [] for name in (STOCK, IMA, TE) if name in trainers}
    captured = next(loader)
    for trainer in trainers.values():
        capture_graphs(trainer, captured)
    for step in tqdm(range(warm_up + steps), desc=title, unit="round", dynamic_ncols=True):
        batch = next(loader)
        before, counts = step_of(stock, batch, step)
        around = [before]
        # Nobody always comes after the same one.
        for name in (*others[step % len(others) :], *others[: step % len(others)]):
            own, found = step_of(trainers[name], batch, step)
            after, _ = step_of(stock, batch, step)
            around.append(after)
            if step >= warm_up:
                seconds[name].append(own)
                ratios[name].append(2 * own / (before + after))
                counted[name].append(found)
            before = after
        if step >= warm_up:
            seconds[STOCK] += around
            counted[STOCK].append(counts)
            for name, times in loading.items():
                times.append(seconds_of(partial(next, trainers[name].dataloader_train), stock.device) / mean(around))
    rows = {
        name: {
            "ratio": summary(ratios[name]) if name != STOCK else {"median": 1.0, "low": None, "high": None},
            **_to_compiled(name, ratios),
            "seconds": round(median(seconds[name]), 5),
            "passes_per_sample": round(mean(c["forward_passes"] / c["samples"] for c in counted[name]), 2),
            "shares": {
                key: round(mean(c[key] / c["samples"] for c in counted[name]), 3)
                for key in SHARES
                if key in counted[name][0]
            },
        }
        for name in trainers
    }
    for name, parts in where_time_goes(trainers, loader, max(2, steps // 3), title).items():
        rows[name]["parts"] = parts
    return {"rows": rows, "loading": {name: summary(times) for name, times in loading.items()}}


def _to_compiled(name: str, ratios: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The ratio to a compiled stock step, if there is one: by way of the eager steps beside both, in each round."""
    if COMPILED not in ratios:
        return {}
    compiled = ratios[COMPILED]
    own = ratios.get(name, [1.0] * len(compiled))
    return {"ratio_to_compiled": summary([mine / other for mine, other in zip(own, compiled, strict=True)])}


def where_time_goes(trainers: Mapping[str, Any], loader: Any, steps: int, title: str) -> dict[str, dict[str, float]]:
    """Seconds of each part of a step, in stock steps; a GPU is waited for at every border of a part."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for step in tqdm(range(steps), desc=f"{title}, parts", unit="round", dynamic_ncols=True):
        batch = next(loader)
        stock = mean(step_of(trainers[STOCK], batch, step)[0] for _ in range(3))
        for name, trainer in trainers.items():
            clock, mine = Clock(trainer.device), prepare_step(trainer, batch, step)
            with watched(trainer, clock, PLAIN_PASSES):
                trainer.train_step(mine)
            found[name].append({part: clock.seconds.get(part, 0.0) / stock for part in PARTS})
    return {
        name: {part: round(median(step[part] for step in steps), 3) for part in PARTS} for name, steps in found.items()
    }


class Agreement(NamedTuple):
    """How far two IMA steps on one batch are apart, in double precision.

    Attributes:
        attacked, crossed: samples that were perturbed, and that crossed the boundary.
        same_crossed: whether these are the same samples.
        images: largest L2 distance between the perturbed images of a sample, in z-scores.
        margins: largest difference between new margins.
        loss: relative.
        gradient: of the weights, relative.
    """

    attacked: int
    crossed: int
    same_crossed: bool
    images: float
    margins: float
    loss: float
    gradient: float

    @property
    def holds(self) -> bool:
        """Whether both did the same work; with nothing perturbed, or nothing crossed, that cannot be said."""
        apart = max(self.images, self.margins, self.loss, self.gradient)
        return self.attacked > 0 and self.crossed > 0 and self.same_crossed and apart <= TOLERANCE


def agreement(ima: Any, plain: Any, batch: Mapping[str, Any], seed: int = 0) -> Agreement:
    """Compare one step of IMA with one of the straightforward reference; both keep weights and margins."""
    (points, crossed, attacked, margins, loss, gradient), reference = (
        _step_in_double(trainer, batch, seed) for trainer in (ima, plain)
    )
    if not bool(attacked.equal(reference[2])):
        return Agreement(int(attacked.sum()), 0, False, *[float("inf")] * 4)
    images = (points[attacked] - reference[0][attacked]).flatten(1).norm(dim=1)
    return Agreement(
        int(attacked.sum()),
        int(crossed.sum()),
        bool(crossed.equal(reference[1])),
        float(images.max()) if len(images) else 0.0,
        float((margins - reference[3]).abs().max()),
        abs(loss - reference[4]) / abs(loss),
        float((gradient - reference[5]).norm() / gradient.norm()),
    )


def _step_in_double(
    trainer: Any, batch: Mapping[str, Any], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor]:
    """Perturbed images, which crossed, which were attacked, new margins, loss, gradient of the weights."""
    table, kept = trainer.margins, copy.deepcopy(trainer.margins)
    mine = prepare_step(trainer, batch, seed)
    samples, images = trainer.samples_of(batch), mine["data"].double()
    mine["data"] = images
    crossed, attacked = (torch.zeros(len(images), dtype=torch.bool) for _ in range(2))
    points, record = images.clone(), {}

    def spy(name: str) -> Any:
        inner = getattr(trainer, name)

        def call(*args: Any) -> Any:
            record["args"], record["found"] = args, inner(*args)
            return record["found"]

        return patch.object(trainer, name, call)

    read = table.margins
    plain = isinstance(trainer, PlainIMA)
    trainer.bare_network.double()
    try:
        # Margins are kept in single precision, with which double ones do not mix.
        in_double = patch.object(table, "margins", lambda chosen: read(chosen).double())
        no_graphs = patch.object(trainer, "_graphs", None)
        exact = patch.object(trainer, "attack_autocast", contextlib.nullcontext)
        with (
            in_double,
            no_graphs,
            exact,
            patch.object(trainer.optimizer, "step"),
            spy("generate" if plain else "_generate"),
        ):
            loss = float(trainer.train_step(mine)["loss"])
        gradients = [weight.grad for weight in trainer.network.parameters() if weight.grad is not None]
        gradient = torch.cat([part.flatten() for part in gradients]).cpu()
    finally:
        trainer.bare_network.float()
        trainer.optimizer.zero_grad(set_to_none=True)
    margins = table.margins(samples)
    trainer.margins = kept
    found, beta, _ = record["found"]
    if plain:
        attacked = record["args"][3].cpu()
        points, crossed = found.cpu(), beta.cpu() & attacked
    else:
        index = record["args"][2].cpu()
        attacked[index], crossed[index], points[index] = True, beta.cpu(), found.cpu()
    return points, crossed, attacked, margins, loss, gradient


def measure_trainers(
    ground: Ground, device: torch.device, steps: int, warm_up: int, title: str, **settings: Any
) -> dict[str, Any]:
    """The part for one dimension; ``settings`` differ from those of this program.

    Raises:
        RuntimeError: the straightforward reference and IMA do not do the same work.
    """
    with at_work(ground):
        trainers = make_all(ground, device, **settings)
        agreed = check(trainers)
        result = measure(trainers, trainers[TE].dataloader_train, steps, warm_up, title)
    plan = trainers[STOCK].configuration_manager
    return {
        "network": {
            "features": list(plan.network_arch_init_kwargs["features_per_stage"]),
            "patch": list(plan.patch_size),
            "batch": plan.batch_size,
        },
        "agreement": agreed._asdict(),
        "precision": {name: _precision(trainer) for name, trainer in trainers.items()},
        **result,
    }


def check(trainers: Mapping[str, Any], tries: int = 20) -> Agreement:
    """See that the reference does IMA's work, on the first batch in which a sample crosses.

    Raises:
        RuntimeError: it does not, or no sample crossed in so many batches.
    """
    for seed in range(tries):
        found = agreement(trainers[IMA], trainers[PLAIN], next(trainers[TE].dataloader_train), seed)
        if found.holds:
            return found
        if found.crossed or not found.same_crossed or found.images > TOLERANCE:
            break
    raise RuntimeError(
        f"IMA and its reference do not do the same work, or nothing crossed in {tries} batches: {found}."
    )


def _precision(trainer: Any) -> str:
    if not hasattr(trainer, "attack_autocast"):
        return "nnU-Net's"
    attack = "single" if trainer.attack_autocast is contextlib.nullcontext else "mixed"
    graphs = trainer._graphs
    if graphs is None:
        return f"attack {attack}"
    return f"attack {attack}, CUDA graphs" + (f" refused ({graphs.refused})" if graphs.refused else "")
