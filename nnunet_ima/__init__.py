"""Increasing-margin adversarial training and segmentation attacks: the mathematics, on tensors."""

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.labels import Labels
from nnunet_ima.losses import SegmentationLoss
from nnunet_ima.margins import MarginTable
from nnunet_ima.threat import ThreatModel

__version__ = "0.1.0"

__all__ = ["DiceCriterion", "Labels", "MarginTable", "SegmentationLoss", "ThreatModel", "UserError"]
