"""Random numbers of an attack that takes a few of them for each sample and query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# For so many queries at once a sample's numbers are drawn: each call of a generator takes microseconds, and a GPU would
# wait for as many calls as there are samples at each query.
AHEAD = 100


class Draws:
    """Uniform random numbers in [0, 1) for each sample and query; which they are does not depend on other samples.

    Args:
        generators: one for each sample.
        width: how many numbers a query takes.
    """

    def __init__(self, generators: Sequence[torch.Generator], width: int) -> None:
        self._generators, self._width = list(generators), width
        self._ahead = torch.empty((len(self._generators), 0, width), dtype=torch.double)

    def next(self) -> Tensor:
        """The numbers of the next query, (n, width), in double precision on the CPU."""
        if not self._ahead.shape[1]:
            shape = (AHEAD, self._width)
            blocks = [torch.rand(shape, generator=one, dtype=torch.double) for one in self._generators]
            self._ahead = torch.stack(blocks)
        now, self._ahead = self._ahead[:, 0], self._ahead[:, 1:]
        return now

    def of(self, kept: Sequence[int]) -> Draws:
        """Of some of the samples only, from the next query on."""
        some = Draws([self._generators[i] for i in kept], self._width)
        some._ahead = self._ahead[list(kept)]
        return some


__all__ = ["Draws"]
