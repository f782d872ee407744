"""Attacks on segmentation networks, one a file, one call: network, images and targets in; perturbed images out."""

from nnunet_ima.attacks.apgd import APGD
from nnunet_ima.attacks.apgd_targeted import TargetedAPGD
from nnunet_ima.attacks.attack import Attack, AttackResult
from nnunet_ima.attacks.autoattack import AutoAttack, AutoAttackResult
from nnunet_ima.attacks.bpgd import BPGD
from nnunet_ima.attacks.checks import Finding, check_network
from nnunet_ima.attacks.fab import FAB
from nnunet_ima.attacks.fgsm import FGSM
from nnunet_ima.attacks.ifgsm import IFGSM
from nnunet_ima.attacks.pgd import PGD
from nnunet_ima.attacks.spsa import SPSA
from nnunet_ima.attacks.square import Square
from nnunet_ima.attacks.white_noise import WhiteNoise

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (WhiteNoise, FGSM, IFGSM, PGD, BPGD, APGD, TargetedAPGD, FAB, SPSA, Square, AutoAttack)
}
"""Every attack by its name, which is that of the command line."""

__all__ = [
    "APGD",
    "ATTACKS",
    "BPGD",
    "FAB",
    "FGSM",
    "IFGSM",
    "PGD",
    "SPSA",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackResult",
    "Finding",
    "Square",
    "TargetedAPGD",
    "WhiteNoise",
    "check_network",
]
