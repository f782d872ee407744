"""Is an evaluation the one that a command would make? Told by what it sealed, not by the command's words alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import members_of_choice, parse_attack
from nnunet_ima.evaluation.command_line import read_arguments
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.evaluate import read_fold
from nnunet_ima.evaluation.identity import read_run, refuse_different
from nnunet_ima.evaluation.protocols import read_levels
from nnunet_ima.evaluation.results import read_summary
from nnunet_ima.files import sha256_of


def is_finished(folder: Path, command: Sequence[str]) -> bool:
    """Whether ``folder`` holds the finished evaluation that a command would make.

    Where it was made, on which device, and with which versions of other packages does not matter: they decide the last
    digits of a number, and the report shows them. The weights are compared where the command's checkpoint is there.

    Args:
        folder: of the results; it may lie elsewhere than the command says.
        command: ``nnunet_ima evaluate`` with its arguments, ``--levels`` among them.

    Raises:
        UserError: it holds a finished evaluation, but another one, whose differences are named; or one that is damaged
            or was changed.
    """
    if not (folder / "summary.json").is_file():
        return False
    read_summary(folder)
    wanted = asked_for(command)
    refuse_different(_same_keys(read_run(folder)["identity"], wanted), wanted, folder)
    return True


def is_of_this(head: Mapping[str, Any], command: str, checkpoint: Path) -> bool:
    """Whether a run was begun by this very command, of the weights that are here now, by this very program.

    So ``select`` and ``grid`` know what they measured before: candidates are compared with each other, so all are
    measured by one program, and figures of weights that are no more say nothing of those in their place.

    Args:
        head: of the run, or its summary, which begins with it.
        command: as it is noted.
        checkpoint: the file; where there is none, no run is of it.
    """
    return bool(
        head.get("command") == command
        and head["model"]["sha256"] == digest_of(checkpoint)
        and head["versions"] == versions()
    )


def begun_in(folder: Path) -> dict[str, Any]:
    """The head of the run in a folder; empty where there is none, or it is damaged."""
    try:
        return dict(read_run(folder)["head"])
    except UserError:
        return {}


def digest_of(checkpoint: Path) -> str:
    """SHA-256 of a file; empty where there is none."""
    if not checkpoint.is_file():
        return ""
    now = checkpoint.stat()
    return _digest(checkpoint, now.st_mtime_ns, now.st_size)


def asked_for(command: Sequence[str]) -> dict[str, Any]:
    """What :func:`~nnunet_ima.evaluation.description.identify` says of a command's run, as far as its words tell it."""
    options = read_arguments(command[1:])
    attacks = [parse_attack(text) for text in dict.fromkeys(options.attacks)]
    members = {attack.text: members_of_choice(attack) for attack in attacks}
    chosen_apart = options.max_samples is not None and options.samples_seed != options.seed
    wanted = {
        "model": {
            "fold": read_fold(options.fold),
            "checkpoint": options.checkpoint,
            **_weights(options.model / f"fold_{options.fold}" / options.checkpoint),
        },
        "protocol": options.protocol,
        "norm": options.norm,
        "levels": [level.text for level in read_levels(options.levels, options.norm)],
        "attacks": [attack.text for attack in attacks],
        "max samples": options.max_samples,
        "seed": options.seed,
        "case level": not options.no_cases,
        "version of": {"nnunet_ima": versions()["nnunet_ima"]},
        "ensembles": {text: found for text, found in members.items() if found is not None} or None,
        "end to end": None if options.end_to_end == "off" else options.end_to_end,
        "samples seed, if not the attacks'": options.samples_seed if chosen_apart else None,
    }
    # As it comes back from a file.
    plain: dict[str, Any] = json.loads(json.dumps(wanted))
    return plain


def _same_keys(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Of an identity, what is asked for; what is not in it is None."""
    return {
        key: {name: there.get(key, {}).get(name) for name in value}
        if key in ("model", "version of")
        else there.get(key)
        for key, value in wanted.items()
    }


def _weights(checkpoint: Path) -> dict[str, str]:
    """Their digest, nothing where there is no such file: results may have been taken elsewhere without the model."""
    found = digest_of(checkpoint)
    return {"sha256": found} if found else {}


@cache
def _digest(file: Path, _changed: int, _size: int) -> str:
    return sha256_of(file)
