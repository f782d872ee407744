"""What stands behind the names of the attacks in a report, for those who do not know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nnunet_ima.attacks import ATTACKS, Attack
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.identity import differences
from nnunet_ima.evaluation.results import Results
from nnunet_ima.threat import ThreatModel


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


def same_attack(one: str, other: str) -> bool:
    """Whether two texts ask for the same: settings in another order, or written out where they are the defaults.

    What stands behind the names in each run is another matter: :func:`other_definition`.
    """
    return one == other or (made_attack(one) is not None and made_attack(one) == made_attack(other))


def other_definition(run: Results, text: str, than: Results, their_text: str) -> list[str]:
    """How what stands behind an attack's name in a run differs from another run's; empty too if one does not tell."""
    here, there = (one.summary.get("attacks", {}).get(name) for one, name in ((run, text), (than, their_text)))
    return [] if here is None or there is None else differences(there, here)


@cache
def made_attack(text: str) -> Attack | None:
    """The attack that a text asks for, with a threat model that is no matter; None if this version has no such."""
    try:
        return parse_attack(text).make(ThreatModel("l2", 0.0))
    except UserError:
        return None


def _about(text: str, members: Sequence[str]) -> str:
    """The first line of the attack's own documentation, in plain text."""
    attack = ATTACKS.get(text.partition(":")[0])
    first = (attack.__doc__ or "").splitlines()[0].replace("``", "") if attack else "an attack of another version."
    return f"{first} Members: {', '.join(members)}." if members else first
