"""What stands behind the names of the attacks in a report, for those who do not know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_ima.attacks import ATTACKS
from nnunet_ima.evaluation.results import Results


@dataclass(frozen=True)
class AttackRun:
    """An attack as it was asked for, and what it does."""

    text: str
    about: str


def attacks_of(runs: Sequence[Results]) -> list[AttackRun]:
    """All attacks of these runs; of an ensemble with the members that ran."""
    members: dict[str, dict[str, None]] = {}
    for item in (item for run in runs for item in run.attacked):
        members.setdefault(str(item["attack"]), {}).update(dict.fromkeys(item.get("by_attack", {})))
    return [AttackRun(text, _about(text, list(names))) for text, names in members.items()]


def _about(text: str, members: Sequence[str]) -> str:
    """The first line of the attack's own documentation, in plain text."""
    attack = ATTACKS.get(text.partition(":")[0])
    first = (attack.__doc__ or "").splitlines()[0].replace("``", "") if attack else "an attack of another version."
    return f"{first} Members: {', '.join(members)}." if members else first
