"""What an attack pass costs in each precision and form, and whether lower precision weakens an attack.

A pass is one forward and backward pass of a batch with the gradient of nnU-Net's loss for each sample's image, on
validation patches of a trained model. Cost: eager, channels-last, compiled, as a CUDA graph, for several numbers of
patches. Precision: how far the gradients are off, and the mean Dice that PGD-20 leaves.

    python benchmarks/attack_passes.py -m <model folder> [-f 0] [-device cuda] [--levels 3 10]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.attacks.pgd import climb
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.evaluation.batch import load_batch
from nnunet_ima.evaluation.cases import ValidationCases
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.evaluation.protocols import Protocol, parse_level
from nnunet_ima.evaluation.run import select_samples
from nnunet_ima.files import write_text
from nnunet_ima.losses import SegmentationLoss
from nnunet_ima.precision import Autocast, use_exact_convolutions

RESULTS = Path(__file__).parent / "results"
PGD_STEPS, PGD_STEP = 20, 0.2


@contextmanager
def tf32() -> Iterator[None]:
    """Let convolutions round their inputs to TF32."""
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = False


def main() -> None:
    """Measure, print, and write a JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-f", "--fold", type=int, default=0)
    parser.add_argument("--samples", type=int, default=366)
    parser.add_argument("--sizes", type=int, nargs="+", default=[366, 128, 32])
    parser.add_argument("--levels", nargs="+", default=["3", "10"], help="L2")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "attack_passes.json")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    use_exact_convolutions()
    precisions: dict[str, Autocast] = {
        "fp32": nullcontext,
        "fp16": partial(torch.autocast, device.type, dtype=torch.float16),
        "bf16": partial(torch.autocast, device.type, dtype=torch.bfloat16),
    }
    if device.type == "cuda":
        precisions["tf32"] = tf32
    model = load_model(options.model, options.fold, "checkpoint_final.pth", device)
    cases = ValidationCases(model)
    chosen = select_samples(cases, options.samples, 0, progress=False, whole_cases=False).samples
    loss, criterion = SegmentationLoss(model.labels), DiceCriterion(labels=model.labels)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": versions(),
        "model": model.describe(),
        "milliseconds": {},
        "gradient_error": {},
        "pgd20_mean_dice": {},
    }
    images, targets, _ = load_batch(cases, chosen, Protocol("sound", "l2"), None, device)
    with undisturbed(model.network):
        result["milliseconds"] = costs(model.network, images, targets, loss, precisions, options)
        for name, autocast in precisions.items():
            result["gradient_error"][name] = errors(model.network, images[:64], targets[:64], loss, autocast)
        for level in options.levels:
            images, targets, threat = load_batch(
                cases, chosen, Protocol("sound", "l2"), parse_level(level, "l2"), device
            )
            for name, autocast in precisions.items():
                oracle = Oracle(model.network, targets, loss, None, autocast=autocast)
                start = threat.project(images, images)
                found = climb(oracle, threat, images, start, PGD_STEPS, PGD_STEP)
                dice = Oracle(model.network, targets, loss, criterion).dice(found, torch.arange(len(images)).to(device))
                result["pgd20_mean_dice"][f"L2 {level}, {name}"] = round(float(dice.mean()), 4)
    text = json.dumps(result, indent=1) + "\n"
    write_text(options.results, text)
    sys.stdout.write(text)


def costs(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: SegmentationLoss,
    precisions: dict[str, Autocast],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Milliseconds of a pass in each precision and form."""
    found: dict[str, float] = {}
    forms: dict[str, nn.Module] = {"eager": network}
    two_dimensional = images.ndim == 4
    last = torch.channels_last if two_dimensional else torch.channels_last_3d
    forms["channels last"] = copy.deepcopy(network).to(memory_format=last)
    for size in options.sizes:
        batch, target = images[:size], targets[:size]
        index = torch.arange(len(batch), device=batch.device)
        for precision, autocast in precisions.items():
            if options.compile:
                forms["compiled"] = compiled_anew(network)
            for form, module in forms.items():
                oracle = Oracle(module, target, loss, None, autocast=autocast)
                key = f"{form}, {precision}, {len(batch)}"
                found[key] = timed(partial(oracle.ascent, batch, index), options.repeats)
            if batch.is_cuda and precision != "tf32":
                oracle = Oracle(
                    network, target, loss, None, autocast=autocast, graphs=CudaGraphs(len(batch)), checked=True
                )
                key = f"CUDA graph, {precision}, {len(batch)}"
                found[key] = timed(partial(oracle.ascent, batch, index), options.repeats)
    return found


def compiled_anew(network: nn.Module) -> nn.Module:
    """Compiled for what it is asked next. After eight sizes and precisions torch would run the others eagerly."""
    torch.compiler.reset()
    compiled = torch.compile(network, dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled


def timed(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call, the median after three to warm up."""
    taken = []
    for number in range(repeats + 3):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= 3:
            taken.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(taken), 2)


def errors(
    network: nn.Module, images: Tensor, targets: Tensor, loss: SegmentationLoss, autocast: Autocast
) -> dict[str, float]:
    """Relative error of the samples' gradients: median, 90 % quantile, largest."""
    index = torch.arange(len(images), device=images.device)
    exact = Oracle(network, targets, loss, None).ascent(images, index).gradient.flatten(1)
    mixed = Oracle(network, targets, loss, None, autocast=autocast).ascent(images, index).gradient.flatten(1)
    relative = ((mixed - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)).float().cpu()
    quantiles = torch.quantile(relative, torch.tensor([0.5, 0.9, 1.0])).tolist()
    return dict(zip(("median", "90 %", "largest"), (round(value, 4) for value in quantiles), strict=True))


if __name__ == "__main__":
    main()
