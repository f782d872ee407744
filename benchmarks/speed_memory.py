"""Peak memory of a step of each trainer, each in a process of its own.

On CUDA it is the most that PyTorch had reserved of the GPU during the steps, weights and graphs included: what must be
free for the training. On a CPU it is how far the
process's resident memory rose above what it held before them (Linux only): weights, data and libraries do not count.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from speed_models import Ground
from speed_trainers import KINDS, TE, at_work, capture_graphs, make, step_of
from tqdm import tqdm

STEPS = 3
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_memory(ground: Ground, names: Sequence[str], device: torch.device, title: str) -> dict[str, float | None]:
    """MiB of each trainer's step, None where this system does not tell."""
    found = {}
    for name in tqdm(names, desc=title, unit="process", dynamic_ncols=True):
        # A process that did something before would show that, too.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found[name] = process.submit(peak_of, ground, name, str(device)).result()
    return found


def peak_of(ground: Ground, name: str, device_name: str) -> float | None:
    """MiB that some steps of a trainer take at most."""
    device = torch.device(device_name)
    with at_work(ground):
        trainer = make(KINDS[name], ground, device)
        # TE's batches hold what every trainer needs; its own memory must not count.
        # In single precision it measures none, with attacks of its own.
        loader = make(KINDS[TE], ground, torch.device("cpu"), attack_precision="single").dataloader_train
        batches = [next(loader) for _ in range(STEPS)]
        if device.type == "cuda":
            # What making the trainer took does not count.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        held = reset_peak()
        capture_graphs(trainer, batches[0])
        for seed, batch in enumerate(batches):
            step_of(trainer, batch, seed)
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved(device) / 2**20, 1)
    return None if held is None else round(peak() - held, 1)


def reset_peak() -> float | None:
    """MiB that this process holds now, from where its peak counts from now on; None if the system cannot do that."""
    try:
        RESET.write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def peak() -> float:
    """MiB that this process held at most since :func:`reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> float:
    values: Mapping[str, str] = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return int(values[key].split()[0]) / 1024
