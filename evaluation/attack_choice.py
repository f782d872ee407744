"""Read an attack from the command line: ``apgd``, or with its settings, ``apgd:steps=20,loss=dlr``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from nnunet_ima.attack_losses import LOSSES
from nnunet_ima.attacks import ATTACKS, Attack, AutoAttack
from nnunet_ima.attacks.attack import MODES
from nnunet_ima.errors import UserError
from nnunet_ima.threat import ThreatModel

# Parts of an attack that may be left out.
MAY_BE_ZERO = ("targets", "bisections")
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
    words: dict[str, tuple[str, ...]] = {**attack.choices, "mode": MODES}
    if attack.climbs:
        words["loss"] = tuple(LOSSES)
    numbers = {
        field.name: field.default
        for field in fields(attack)
        if field.name not in _SHARED and isinstance(field.default, (int, float))
    }
    settings: dict[str, Any] = {}
    for pair in filter(None, budget.split(",")):
        key, _, value = pair.partition("=")
        if key in settings:
            raise UserError(f"The attack {name} is given {key} twice: {text!r}.")
        if key in words:
            settings[key] = _read_word(name, key, value, words[key])
        elif key in numbers:
            settings[key] = _read_number(name, key, value, type(numbers[key]))
        else:
            raise UserError(f"The attack {name} has no setting {key!r}; it has {', '.join([*numbers, *words])}.")
    try:
        attack(ThreatModel("l2", 0.0), **settings)
    except ValueError as error:
        raise UserError(f"The attack {text!r} cannot be: {error}") from error
    return AttackChoice(name, text, partial(attack, **settings))


def members_of_choice(choice: AttackChoice) -> dict[str, dict[str, Any]] | None:
    """Settings of an ensemble's members by name, for JSON; None for any other attack."""
    attack = choice.make(ThreatModel("l2", 0.0))
    if not isinstance(attack, AutoAttack):
        return None
    return {name: _settings_of(member) for name, member in attack.chosen_members().items()}


def definition_of(choice: AttackChoice) -> dict[str, Any]:
    """All that stands behind what the user wrote, defaults and an ensemble's members too, for JSON."""
    attack = choice.make(ThreatModel("l2", 0.0))
    settings = {"mode": attack.mode, **_settings_of(attack)}
    members = members_of_choice(choice)
    return settings if members is None else {**settings, "members": members}


def _settings_of(attack: Attack) -> dict[str, Any]:
    own = {field.name: getattr(attack, field.name) for field in fields(attack) if field.name not in _SHARED}
    return {"attack": attack.name, "loss": attack.loss or attack.default_loss, **own}


def _read_word(attack: str, key: str, value: str, allowed: tuple[str, ...]) -> str:
    if value in allowed:
        return value
    raise UserError(f"{attack}:{key} is {value!r}; it must be one of {', '.join(allowed)}.")


def _read_number(attack: str, key: str, value: str, kind: type) -> Any:
    try:
        number = kind(value)
    except ValueError:
        number = kind(0)
    allowed = 0 < number < 1e9 or (key in MAY_BE_ZERO and value == "0")
    if not allowed:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{attack}:{key} is {value!r}; it must be {wanted} above 0.")
    return number
