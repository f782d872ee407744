"""What a step of every trainer and every attack costs, as a ratio, and where the time goes.

Trainers: seconds and passes of a step against stock nnU-Net's on the same batches, and IMA's against a straightforward
implementation of Algorithms 1 to 3 (every sample, every pass), which is seen to do the same work first. Hardened: the
same of a model of which more samples are correct, so that a step does more, where ``-o`` holds one. Attacks:
against a straightforward PGD. Memory: of a step, in a process of its own. Savings: what would make IMA's step cheaper.

    python benchmarks/speed.py -o <folder of hippocampus_small.py> --data <Task04_Hippocampus> [-device cpu]
    python benchmarks/speed.py --data <Task04_Hippocampus> -device cuda

On a CPU the networks are small, and ``-o`` gives the half-trained 2D one; what is missing is planned, preprocessed and
trained for a while in ``--work``, on 24 cases. On CUDA they are as planned, in the trainers' own precision.
Parts that are run again replace what the result holds of them; others stay, with the conditions they were run under.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hippocampus_small import RESULTS
from speed_attacks import ITEMS, known, measure_attacks, models_of
from speed_memory import measure_memory
from speed_models import DIMENSIONS, find_ground, hardened
from speed_savings import measure_savings
from speed_table import table
from speed_trainers import KINDS, MARGIN, SETTINGS, SPREAD, measure_trainers

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import choose_device, versions
from nnunet_ima.files import write_text
from nnunet_ima.threads import use_threads_as_told

PARTS = ("trainers", "hardened", "memory", "attacks", "savings")


def main() -> None:
    """Measure the parts that are asked for; write ``speed_<device>.json`` and ``.md``."""
    options = _parser().parse_args()
    try:
        run(options)
    except UserError as error:
        raise SystemExit(str(error)) from None


def run(options: argparse.Namespace) -> None:
    """Each part of each dimension is written as soon as it is there."""
    device = choose_device(options.device)
    use_threads_as_told(device)
    names = known(options.attacks)
    if options.samples < 2:
        raise UserError("--samples must be at least 2: PGD and its reference are compared on two first.")
    file = options.results / f"speed_{device.type}.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for dimension in options.dimensions:
        ground = find_ground(dimension, options.output, options.data, options.work, device.type, options.compile)
        for part in options.parts:
            title = f"{part}, {dimension}"
            if part == "trainers":
                found: Any = measure_trainers(ground, device, options.steps, options.warm_up, title)
            elif part == "hardened":
                later = hardened(ground)
                if later is None:
                    continue
                found = measure_trainers(later, device, options.steps, options.warm_up, title)
            elif part == "memory":
                found = {"mib": measure_memory(ground, list(KINDS), device, title)}
            elif part == "attacks":
                attacked = models_of(dimension, options.output, ground)
                found = {"rows": measure_attacks(attacked, names, options.level, options.samples, device)}
                found |= {"level": f"L2 {options.level}", "samples": options.samples}
            else:
                found = measure_savings(ground, device, options.steps, options.warm_up, title)
            result.setdefault(dimension, {})[part] = {"conditions": _conditions(options, device), **found}
            result["settings"] = {**SETTINGS, "margins": {"mean": MARGIN, "standard_deviation": SPREAD}}
            options.results.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(result, indent=1) + "\n")
            write_text(file.with_suffix(".md"), table(result))
    sys.stdout.write(table(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # the text above is laid out by hand
    parser.add_argument("-o", "--output", type=Path, help="folder of hippocampus_small.py; nothing in it is changed")
    parser.add_argument("--data", type=Path, help="a task folder of the Decathlon; a phantom unless given")
    parser.add_argument("--work", type=Path, default=Path("demo/speed"), help="where to make what is missing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    parser.add_argument("--steps", type=int, default=15, help="measured of each trainer")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each trainer before those")
    parser.add_argument("--samples", type=int, default=8, help="validation slices or tiles that are attacked")
    parser.add_argument("--attacks", nargs="+", default=list(ITEMS), metavar="NAME", help="instead of all of them")
    parser.add_argument("--level", default="5", help="L2, of the attacks")
    parser.add_argument("--compile", action="store_true", help="let nnU-Net compile the network")
    parser.add_argument("--contended", action="store_true", help="note that other processes ran on the machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the table go")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    return parser


def _conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Command (without the folders of this machine), hardware and versions."""
    shown = ["benchmarks/speed.py"]
    shown += ["-o", "WORK"] if options.output else []
    shown += ["--data", options.data.resolve().name] if options.data else []
    shown += ["--parts", *options.parts, "--dimensions", *options.dimensions, "--steps", str(options.steps)]
    shown += ["--warm-up", str(options.warm_up)]
    shown += ["--samples", str(options.samples), "--level", options.level, "-device", device.type]
    shown += ["--attacks", *options.attacks] if options.attacks != list(ITEMS) else []
    shown += ["--compile"] if options.compile else []
    return {
        "command": "python " + shlex.join(shown),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            # On a CPU this is worth a factor of two; "" lets them spin.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
            "load_average": round(os.getloadavg()[0], 1),
            "alone": not options.contended,
        },
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
