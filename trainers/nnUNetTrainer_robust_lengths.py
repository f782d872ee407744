"""Variants that differ in length and learning rate alone, named as nnU-Net names its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES

# Section 3.5 of the IMA paper: 50 epochs of 50 iterations.
PAPER: Mapping[str, Any] = {"num_epochs": 50, "num_iterations_per_epoch": 50}
LONG: Mapping[str, Any] = {"num_epochs": 250}
# A trained network needs neither nnU-Net's 1,000 epochs nor its learning rate of 0.01.
FINETUNE: Mapping[str, Any] = {"num_epochs": 100, "initial_lr": 0.001}


class nnUNetTrainerIMA_50epochs(nnUNetTrainerIMA):
    """The paper's length: 50 epochs of 50 iterations."""

    lengths: ClassVar[Mapping[str, Any]] = PAPER


class nnUNetTrainerSAT_50epochs(nnUNetTrainerSAT):
    """The paper's length: 50 epochs of 50 iterations."""

    lengths: ClassVar[Mapping[str, Any]] = PAPER


class nnUNetTrainerTE_50epochs(nnUNetTrainerTE):
    """The paper's length: 50 epochs of 50 iterations."""

    lengths: ClassVar[Mapping[str, Any]] = PAPER


class nnUNetTrainerTRADES_50epochs(nnUNetTrainerTRADES):
    """The paper's length: 50 epochs of 50 iterations."""

    lengths: ClassVar[Mapping[str, Any]] = PAPER


class nnUNetTrainerSTD_50epochs(nnUNetTrainerSTD):
    """The paper's length: 50 epochs of 50 iterations."""

    lengths: ClassVar[Mapping[str, Any]] = PAPER


class nnUNetTrainerIMA_250epochs(nnUNetTrainerIMA):
    """250 of nnU-Net's epochs."""

    lengths: ClassVar[Mapping[str, Any]] = LONG


class nnUNetTrainerSAT_250epochs(nnUNetTrainerSAT):
    """250 of nnU-Net's epochs."""

    lengths: ClassVar[Mapping[str, Any]] = LONG


class nnUNetTrainerTE_250epochs(nnUNetTrainerTE):
    """250 of nnU-Net's epochs."""

    lengths: ClassVar[Mapping[str, Any]] = LONG


class nnUNetTrainerTRADES_250epochs(nnUNetTrainerTRADES):
    """250 of nnU-Net's epochs."""

    lengths: ClassVar[Mapping[str, Any]] = LONG


class nnUNetTrainerSTD_250epochs(nnUNetTrainerSTD):
    """250 of nnU-Net's epochs."""

    lengths: ClassVar[Mapping[str, Any]] = LONG


class nnUNetTrainerIMA_finetune(nnUNetTrainerIMA):
    """Harden a model that is trained already: 100 epochs at a tenth of nnU-Net's learning rate.

    Give it the weights with the setting ``start_from``, or with ``-pretrained_weights``.
    """

    lengths: ClassVar[Mapping[str, Any]] = FINETUNE
