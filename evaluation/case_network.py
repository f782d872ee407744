"""A whole case as one image of one network: nnU-Net's sliding window over it, padding included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ima.evaluation.cases import Case
from nnunet_ima.evaluation.sliding_window import SlidingWindow
from nnunet_ima.overlap import Place


class CaseNetwork(nn.Module):
    """From a case without its padding, (1, C, z, y, x), to its logits (1, K, z, y, x).

    Args:
        window: the sliding window.
        case: padded, for its size.
        unperturbed: (C, Z, Y, X), the padded case.
        attacked: boxes of the padded case; an attack changes nothing outside them. Of windows that none of them touches
            the logits are computed once.
    """

    def __init__(self, window: SlidingWindow, case: Case, unperturbed: Tensor, attacked: Sequence[Place]) -> None:
        super().__init__()
        self.window, self._unpad, self._shape = window, case.unpad, unperturbed.shape[1:]
        places = window.places(self._shape)
        self._reached = [place for place in places if any(overlap(place, box) for box in attacked)]
        with torch.no_grad():
            self._constant = window.sum(unperturbed, [place for place in places if place not in self._reached])
            self._weights = window.weights(places, self._shape)

    @property
    def windows(self) -> list[Place]:
        """Those windows that an attack reaches, in the case without its padding, and what of them lies in it."""
        return [
            tuple(
                slice(max(axis.start - inside.start, 0), min(axis.stop, inside.stop) - inside.start)
                for axis, inside in zip(place, self._unpad, strict=True)
            )
            for place in self._reached
        ]

    def forward(self, image: Tensor) -> Tensor:
        """See the class; only within the boxes may ``image`` differ from the unperturbed one."""
        around = [
            margin
            for inside, size in zip(reversed(self._unpad), reversed(self._shape), strict=True)
            for margin in (inside.start, size - inside.stop)
        ]
        logits = (self.window.sum(functional.pad(image[0], around), self._reached) + self._constant) / self._weights
        z, y, x = self._unpad
        return logits[None, :, z, y, x]


def overlap(place: Place, other: Place) -> bool:
    """Whether two boxes share a voxel."""
    return all(one.start < two.stop and two.start < one.stop for one, two in zip(place, other, strict=True))
