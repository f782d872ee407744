"""Attacks on segmentation networks, one a file, one call: network, images and targets in; perturbed images out."""

from nnunet_ima.attacks.apgd import APGD
from nnunet_ima.attacks.attack import Attack, AttackResult
from nnunet_ima.attacks.bpgd import BPGD
from nnunet_ima.attacks.pgd import PGD
from nnunet_ima.attacks.white_noise import WhiteNoise

ATTACKS: dict[str, type[Attack]] = {attack.name: attack for attack in (WhiteNoise, PGD, BPGD, APGD)}

__all__ = ["APGD", "ATTACKS", "BPGD", "PGD", "Attack", "AttackResult", "WhiteNoise"]
