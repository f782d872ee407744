"""What is needed to repeat a run: its settings, its command, and what its models and attacks were."""

from __future__ import annotations

import shlex
from typing import Any

from nnunet_ima.evaluation.identity import read_run
from nnunet_ima.evaluation.results import Results

# Of summary.json. Older runs lack some of them.
_TOLD = (
    "model", "exported_from", "training", "protocol", "criterion", "attacks", "classes", "patch_size",
    "normalisation", "seed", "max_samples", "samples_seed", "end_to_end", "batch_size", "samples_in_a_pass_reduced_to",
    "device", "gpu", "threads", "date", "versions",
)  # fmt: skip
# Of run.json, which is what numbers depend on: there since there are runs.
_IDENTITY = {"levels": "levels", "samples in a pass": "samples_in_a_pass", "ensembles": "ensembles"}
# As nnU-Net's own parsers spell them; argparse takes them shortened, too.
_OF_PARTS = ("-num_parts", "-part_id")
_FEWEST_LETTERS = len("-pa")


def settings_of_run(run: Results) -> dict[str, Any]:
    """Everything that is known of how it was made."""
    found = {name: run.summary[name] for name in _TOLD if name in run.summary}
    identity = read_run(run.folder)["identity"]
    return found | {name: identity[key] for key, name in _IDENTITY.items() if key in identity and name not in found}


def command_of_run(run: Results) -> str:
    """The command that makes the whole run: that of one of its parts, without which part it was."""
    command = str(run.summary["command"])
    whole = without_parts(command)
    if whole == command:
        return command
    return (
        f"{whole}\n# It was run in parts, which changes no number; command, device and threads are those of the part "
        f"that began first."
    )


def without_parts(command: str) -> str:
    """Without ``-num_parts`` and ``-part_id``; as it is if it has none."""
    try:
        words = shlex.split(command)
    except ValueError:  # no shell's line
        return command
    kept: list[str] = []
    left_out = False  # whether the next word is the value of an option that is left out
    for word in words:
        if left_out:
            left_out = False
        elif _is_of_parts(word.partition("=")[0]):
            left_out = "=" not in word
        else:
            kept.append(word)
    return command if len(kept) == len(words) else shlex.join(kept)


def _is_of_parts(option: str) -> bool:
    return len(option) >= _FEWEST_LETTERS and any(name.startswith(option) for name in _OF_PARTS)
