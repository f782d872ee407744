"""Read an attack from the command line: ``apgd``, or with its budget, ``apgd:steps=20,restarts=2``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from nnunet_ima.attacks import ATTACKS, Attack
from nnunet_ima.attacks.bpgd import BOUNDARY_SEARCHES
from nnunet_ima.errors import UserError

_SHARED = {field.name for field in fields(Attack)}


@dataclass(frozen=True)
class AttackChoice:
    """An attack that waits for its threat model: its name, how the user wrote it, and how to make it."""

    name: str
    text: str
    make: Callable[..., Attack]


def parse_attack(text: str) -> AttackChoice:
    """Read ``name`` or ``name:setting=value,...``.

    Raises:
        UserError: the attack or a setting is unknown, or a value is not allowed.
    """
    name, _, budget = text.partition(":")
    if name not in ATTACKS:
        raise UserError(f"There is no attack {name!r}; there are {', '.join(ATTACKS)}.")
    attack = ATTACKS[name]
    defaults = {field.name: field.default for field in fields(attack) if field.name not in _SHARED}
    settings: dict[str, Any] = {}
    for pair in filter(None, budget.split(",")):
        key, _, value = pair.partition("=")
        if key not in defaults:
            raise UserError(f"The attack {name} has no setting {key!r}; it has {', '.join(defaults)}.")
        settings[key] = _read(name, key, value, defaults[key])
    return AttackChoice(name, text, partial(attack, **settings))


def _read(attack: str, key: str, value: str, default: Any) -> Any:
    if isinstance(default, str):
        if value in BOUNDARY_SEARCHES:
            return value
        raise UserError(f"{attack}:{key} is {value!r}; it must be one of {', '.join(BOUNDARY_SEARCHES)}.")
    kind = type(default)
    try:
        number = kind(value)
    except ValueError:
        number = kind(0)
    if not 0 < number < 1e9:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{attack}:{key} is {value!r}; it must be {wanted} above 0.")
    return number
