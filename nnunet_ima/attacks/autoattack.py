"""AutoAttack for segmentation: an ensemble of attacks, of which the lowest Dice of each sample counts.

Croce & Hein 2020, https://arxiv.org/abs/2003.01690: APGD on cross entropy, targeted APGD on DLR, FAB and Square, none
of which needs to be tuned. For segmentation there are more losses to climb, and two modes: in ``dice`` every member
attacks every sample, as in Table 3 of the IMA paper; in ``threshold`` a sample leaves once it is wrong, as in
classification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunet_ima.attacks.apgd import APGD
from nnunet_ima.attacks.apgd_targeted import TargetedAPGD
from nnunet_ima.attacks.attack import Attack, AttackResult
from nnunet_ima.attacks.fab import FAB
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.attacks.square import Square
from nnunet_ima.losses import Outputs

MakeAttack = Callable[..., Attack]

# What found most on our models (docs/attacks.md), and first in every ensemble: whoever is at Dice 0 costs the others
# nothing.
STRONG: dict[str, MakeAttack] = {
    "apgd-balanced-ce": partial(APGD, loss="balanced-ce"),
    "apgd-dice-ce-shrinking": partial(APGD, loss="dice-ce", schedule="shrinking"),
    "apgd-dice-odds": partial(APGD, loss="dice-odds"),
}
# The names are those of by_attack. "standard" has the members and budgets of the original program, and those of
# "strong": no claim should rest on an attack that a cheaper one of ours beats.
VERSIONS: dict[str, dict[str, MakeAttack]] = {
    "standard": {
        **STRONG,
        "apgd-dice-ce": partial(APGD, loss="dice-ce"),
        "apgd-ce": partial(APGD, loss="ce"),
        "apgd-dlr": partial(APGD, loss="dlr"),
        "apgd-t": TargetedAPGD,
        "fab": FAB,
        "square": Square,
    },
    "fast": {
        "apgd-dice-ce": partial(APGD, loss="dice-ce", steps=50),
        "apgd-balanced-ce": partial(APGD, loss="balanced-ce", steps=50),
    },
    "strong": STRONG,
}


@dataclass(frozen=True)
class AutoAttackResult(AttackResult):
    """What the ensemble found.

    Attributes:
        by_attack: what each member found on its own, by its name, in the order in which they ran. A sample from which
            nothing more could be gained was not attacked by the members that followed: its Dice is NaN there, its
            images are the clean ones, and its passes are 0.
    """

    by_attack: Mapping[str, AttackResult]


@dataclass(frozen=True)
class AutoAttack(Attack):
    """Run the members one after the other and keep the lowest Dice of each sample.

    Attributes:
        version: ``standard``, with the members and budgets of the original and those of ``strong``, for every claim;
            ``fast``, to look at a model; ``strong``, what our measurements found to reach the lowest Dice for its
            passes (docs/attacks.md).
        members: instead of a version, attacks of your own by name. Only their budgets and losses count: threat model,
            criterion, mode, seed and so on are those of the ensemble.
    """

    name: ClassVar[str] = "autoattack"
    climbs: ClassVar[bool] = False
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"version": tuple(VERSIONS)}
    version: str = "standard"
    members: Mapping[str, Attack] | Sequence[Attack] | None = None

    def __call__(self, network: nn.Module, images: Tensor, targets: Outputs) -> AutoAttackResult:
        """See :meth:`Attack.__call__`."""
        with self.session(network, images, targets) as (oracle, best):
            clean_dice = best.dice.clone()
            by_attack = self._run_members(oracle, images.detach().to(best.images), best)
        return AutoAttackResult(
            best.images.to(images.dtype),
            best.dice,
            clean_dice,
            oracle.forward_passes,
            oracle.backward_passes,
            by_attack,
        )

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        self._run_members(oracle, images, best)

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return all(member.takes_windows for member in self.chosen_members().values())

    @property
    def repeats(self) -> int:
        """As many as the member that asks most often, so that no sample begins with a lucky draw."""
        return max((member.repeats for member in self.chosen_members().values()), default=1)

    def chosen_members(self) -> dict[str, Attack]:
        """The members, with what they share."""
        shared: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(Attack) if field.name != "loss"
        }
        if self.members is None:
            return {name: make(**shared) for name, make in VERSIONS[self.version].items()}
        if isinstance(self.members, Mapping):
            return {name: replace(member, **shared) for name, member in self.members.items()}
        names = [member.name for member in self.members]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several members are called {', '.join(twice)}; give them as a mapping from names.")
        return {member.name: replace(member, **shared) for member in self.members}

    def _run_members(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> dict[str, AttackResult]:
        clean, clean_dice = best.images.clone(), best.dice.clone()
        found: dict[str, AttackResult] = {}
        for name, member in self.chosen_members().items():
            attacked = self.unfinished(best.dice)
            own = BestSoFar(clean)
            # What is finished here is finished for the member, which then leaves it alone.
            own.dice = torch.where(attacked, clean_dice, best.dice)
            before = oracle.forward_passes.clone(), oracle.backward_passes.clone()
            member.run(oracle.under(loss=member.loss_function(), best=own, repeats=member.repeats), images, own)
            forward, backward = oracle.forward_passes - before[0], oracle.backward_passes - before[1]
            index = attacked.nonzero()[:, 0]
            best.update(index, own.images[index], own.dice[index])
            dice = torch.where(attacked, own.dice, torch.nan)
            found[name] = AttackResult(own.images, dice, clean_dice, forward, backward)
        return found
