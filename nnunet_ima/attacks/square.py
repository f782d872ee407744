"""Square attack: random search with squares, and no gradient. Andriushchenko et al. 2020, arxiv.org/abs/1912.00049."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.draws import Draws
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.lp import Norm, lp_norm, per_sample
from nnunet_ima.seeds import sample_generators
from nnunet_ima.threat import ThreatModel

# The paper halves the squares' area at these of 10,000 queries.
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
OF_QUERIES = 10_000
Window = tuple[slice, ...]


@dataclass(frozen=True)
class Square(Attack):
    """Algorithms 1 to 3 of the paper: a change of a random square (in 3D a cube) is kept if it raises the loss.

    Linf: every voxel is at ±ε; a square gets one sign a channel. L2: the perturbation keeps norm ε; mass is moved from
    one square to another, in a pyramid whose halves have opposite signs.

    Attributes:
        n_queries: passes for each sample, the first on the initial stripes (5,000 in AutoAttack).
        p_init: share of the image that the first squares cover (0.8 in AutoAttack).
    """

    name: ClassVar[str] = "square"
    default_loss: ClassVar[str] = "dice-odds"
    n_queries: int = 5000
    p_init: float = 0.8

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        index = self.worth_attacking(best)
        if not len(index) or not self.n_queries:
            return
        generators = sample_generators(images, self.seed, self.name)
        propose = _linf_proposals if self.threat.norm == "linf" else _l2_proposals
        threat, clean, mine = self.threat.select(index), images[index], [generators[i] for i in index.tolist()]
        begin = _stripes if self.threat.norm == "linf" else _tiles
        # Piece by piece, which is slow on a GPU.
        parts = [begin(image, generator) for image, generator in zip(clean.cpu(), mine, strict=True)]
        draws = Draws(mine, draws_per_query(self.threat.norm, *images.shape[1:]))
        delta = torch.stack(parts).to(clean)
        point = threat.project(clean + _scaled(delta, threat, clean), clean)
        loss, _ = oracle.score(point, index)
        for query in range(1, self.n_queries):
            stays = self.unfinished(best.dice[index])
            if not bool(stays.all()):
                kept = stays.nonzero()[:, 0]
                threat, clean, index, loss = threat.select(kept), clean[kept], index[kept], loss[kept]
                delta, point, draws = delta[kept], point[kept], draws.of(kept.tolist())
            if not len(index):
                return
            share = covered_share(self.p_init, query, self.n_queries)
            radius = per_sample(threat.radius(clean).flatten(1).amax(1), clean)
            current = delta if threat.norm == "linf" else (point - clean) / radius.clamp_min(1e-12)
            tried = propose(current, share, draws.next())
            candidate = threat.project(clean + _scaled(tried, threat, clean), clean)
            new_loss, _ = oracle.score(candidate, index, progress=query / self.n_queries)
            better = new_loss > loss
            loss = torch.where(better, new_loss, loss)
            point = torch.where(per_sample(better, point), candidate, point)
            delta = torch.where(per_sample(better, delta), tried, delta)


def draws_per_query(norm: Norm, channels: int, *spatial: int) -> int:
    """How many random numbers a proposal takes: corners of its squares, signs, and in L2 an axis."""
    corners = len(spatial) if norm == "linf" else 2 * len(spatial) + 1
    return corners + channels


def covered_share(p_init: float, query: int, n_queries: int) -> float:
    """Share of the image that a square covers at a query: ``p_init``, halved at fixed shares of the budget."""
    place = query / n_queries * OF_QUERIES
    return p_init / 2.0 ** sum(place > mark for mark in HALVED_AT)


def side(share: float, spatial: Sequence[int]) -> int:
    """Side of a square (cube) that covers ``share`` of an image, at least 1 and less than its shortest side."""
    longest = max(1, min(spatial) - 1)
    wanted: float = (share * math.prod(spatial)) ** (1 / len(spatial))
    return min(max(round(wanted), 1), longest)


def odd_side(share: float, spatial: Sequence[int]) -> int:
    """Of L2's squares: odd, and at least 3 where the image has room for it."""
    length = max(side(share, spatial), min(3, *spatial))
    return length + 1 if length % 2 == 0 and length < min(spatial) else length


def _scaled(delta: Tensor, threat: ThreatModel, images: Tensor) -> Tensor:
    """``delta`` in units of ε (Linf: per channel) as a perturbation; voxels that may not change take no part."""
    delta = delta * threat.perturbable(images)
    if threat.norm == "l2":
        length = per_sample(lp_norm(delta, "l2"), delta)
        delta = delta / torch.where(length > 0, length, torch.ones_like(length))
    return delta * threat.radius(images)


def _signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return (2 * torch.randint(0, 2, tuple(shape), generator=generator) - 1).to(like)


def _corners(length: int, spatial: Sequence[int], draws: Tensor) -> Tensor:
    """The corner of a random square for each sample, (n, axes), from as many numbers."""
    return (draws * torch.tensor([max(1, size - length + 1) for size in spatial])).long()


def _random_signs(draws: Tensor, like: Tensor) -> Tensor:
    """±1 for each sample and channel, (n, C, 1, ..., 1), from numbers (n, C)."""
    return torch.where(draws < 0.5, -1.0, 1.0).to(like).reshape(*draws.shape, *[1] * (like.ndim - 2))


def _inside(corners: Tensor, length: int, spatial: Sequence[int]) -> Tensor:
    """True (n, 1, *spatial) in the squares at ``corners`` (n, axes)."""
    inside = torch.ones((len(corners), 1, *[1] * len(spatial)), dtype=torch.bool, device=corners.device)
    for axis in range(len(spatial)):
        place = _offsets(corners, axis, spatial)
        inside = inside & ((place >= 0) & (place < length))[:, None]
    return inside


def _offsets(corners: Tensor, axis: int, spatial: Sequence[int]) -> Tensor:
    """How far a voxel lies from the corner along an axis: (n, 1, ..., size, ..., 1)."""
    place = torch.arange(spatial[axis], device=corners.device) - corners[:, axis : axis + 1]
    return place.reshape(len(corners), *(size if i == axis else 1 for i, size in enumerate(spatial)))


def _fitting(pattern: Tensor, region: Tensor) -> Tensor:
    """The part of ``pattern`` (1 or C, *spatial) that fits into a region at the edge of the image."""
    part: Window = (slice(None), *(slice(0, size) for size in region.shape[1:]))
    return pattern[part]


def _stripes(image: Tensor, generator: torch.Generator) -> Tensor:
    """±1 in stripes along the first spatial axis, one sign for each stripe and channel (Linf's start)."""
    channels, first, *rest = image.shape
    return _signs((channels, 1, *rest), generator, image).expand(channels, first, *rest).clone()


def _linf_proposals(delta: Tensor, share: float, draws: Tensor) -> Tensor:
    """Algorithm 2 for each sample of (n, C, *spatial): a square of one sign a channel.

    ``draws`` (n, axes + C) is what is random about it: the square's corner, its signs.
    """
    channels, *spatial = delta.shape[1:]
    length = side(share, spatial)
    corner, signs = torch.split(draws, [len(spatial), channels], dim=1)
    inside = _inside(_corners(length, spatial, corner).to(delta.device), length, spatial)
    return torch.where(inside, _random_signs(signs, delta), delta)


def _tiles(image: Tensor, generator: torch.Generator) -> Tensor:
    """Pyramids side by side, each with a random sign a channel (L2's start)."""
    channels, *spatial = image.shape
    length = max(1, min(spatial) // 5)
    delta = torch.zeros_like(image)
    counts = [max(1, size // length) for size in spatial]
    # What is left over lies half on either side.
    first = [(size - count * length) // 2 for size, count in zip(spatial, counts, strict=True)]
    for place in range(math.prod(counts)):
        corner, rest = [], place
        for count, start in zip(counts, first, strict=True):
            rest, step = divmod(rest, count)
            corner.append(start + step * length)
        window: Window = (slice(None), *(slice(c, c + length) for c in corner))
        drawn = torch.rand((1,), generator=generator, dtype=torch.double)
        along = int(_pyramid_axis(length, len(spatial), drawn))
        pattern = _two_pyramids(length, len(spatial)).transpose(0, along).to(image)
        signs = _signs((channels, *[1] * len(spatial)), generator, image)
        region = delta[window]
        region += _fitting(pattern * signs, region)
    return delta


def _l2_proposals(delta: Tensor, share: float, draws: Tensor) -> Tensor:
    """Algorithm 3 for each sample of (n, C, *spatial).

    One square is emptied, and its mass and what is missing to norm 1 put into another. ``draws`` (n, 2 axes + 1 + C) is
    what is random about it: the corners of the square to be filled and of that to be emptied, the axis along which the
    two pyramids lie, the signs.
    """
    channels, *spatial = delta.shape[1:]
    axes, length = len(spatial), odd_side(share, spatial)
    to_fill, to_empty, axis, sign = torch.split(draws, [axes, axes, 1, channels], dim=1)
    place, emptied_at = (_corners(length, spatial, one).to(delta.device) for one in (to_fill, to_empty))
    along = _pyramid_axis(length, axes, axis[:, 0]).to(delta.device)
    signs = _random_signs(sign, delta)
    filled, emptied = (_inside(corners, length, spatial) for corners in (place, emptied_at))

    def over_channel(values: Tensor) -> Tensor:
        return values.flatten(2).sum(2).reshape(signs.shape)

    square = delta.square()
    missing = per_sample(1 - square.flatten(1).sum(1), delta)
    free = missing / channels + over_channel(square * (filled | emptied))
    old = delta * filled
    pattern = _placed(_two_pyramids(length, axes).to(delta), place, along, spatial)
    fresh = (pattern * signs + old / (1e-10 + over_channel(old.square()).sqrt())) * filled
    fresh = fresh / (1e-10 + over_channel(fresh.square()).sqrt()) * free.clamp_min(0).sqrt()
    return torch.where(filled, fresh, torch.where(emptied, torch.zeros_like(delta), delta))


def _pyramid_axis(length: int, axes: int, draws: Tensor) -> Tensor:
    """Along which axis the two pyramids lie, (n,); a single voxel has none."""
    return (draws * axes).long() if length // 2 else torch.zeros(len(draws), dtype=torch.long)


def _placed(pattern: Tensor, corners: Tensor, along: Tensor, spatial: Sequence[int]) -> Tensor:
    """``pattern``, turned along an axis for each sample, with its corner at ``corners``: (n, 1, *spatial).

    Outside its square it holds what its edge holds.
    """
    turned = torch.stack([pattern.transpose(0, axis) for axis in range(pattern.ndim)])
    last = pattern.shape[0] - 1
    places = [_offsets(corners, axis, spatial).clamp(0, last) for axis in range(len(spatial))]
    where = (along.reshape(-1, *[1] * len(spatial)), *places)
    return turned[where][:, None]


def _two_pyramids(length: int, axes: int) -> Tensor:
    """Pattern η of the paper, of norm 1: two pyramids of opposite sign side by side along the first axis."""
    half = length // 2
    if half == 0:
        return torch.ones((length,) * axes)
    parts = [_pyramid((n, *(length,) * (axes - 1))) for n in (half, length - half)]
    pattern = torch.cat([parts[0] / parts[0].norm(), -parts[1] / parts[1].norm()])
    return pattern / float(pattern.norm())


def _pyramid(shape: Sequence[int]) -> Tensor:
    """Nested boxes around the voxel ⌊n / 2⌋ of each axis, the k-th reaching k − 1 to each side, of weight 1 / k²."""
    far = torch.zeros(tuple(shape))
    for axis, size in enumerate(shape):
        steps = (torch.arange(size) - size // 2).abs().to(far)
        far = torch.maximum(far, steps.reshape(-1, *[1] * (len(shape) - axis - 1)))
    boxes = torch.arange(1, max(shape) // 2 + 2)
    return ((far[..., None] <= boxes - 1) / boxes.square()).sum(-1)


__all__ = ["Square", "covered_share", "draws_per_query", "odd_side", "side"]
