"""What an attack may ask a network, and the one place where its best answers are kept and its passes are counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ima.attack_losses import LossFunction
from nnunet_ima.attacks.graphs import CudaGraphs, Question
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.losses import Outputs, first
from nnunet_ima.lp import per_sample
from nnunet_ima.precision import Autocast, single_precision

Watch = Callable[[Tensor], None]
"""Is told, after each pass, how many passes each sample has taken so far, forward and backward: (B,) of int64."""


class Ascent(NamedTuple):
    """Loss (B,), its gradient with respect to the images (B, C, *spatial), and Dice (B,) at the same point."""

    loss: Tensor
    gradient: Tensor
    dice: Tensor


class BestSoFar:
    """For each sample of a batch, the perturbed image with the lowest Dice that was seen."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.dice = torch.full((images.shape[0],), torch.inf, device=images.device)

    def update(self, index: Tensor, images: Tensor, dice: Tensor) -> None:
        """Keep ``images`` of the samples ``index`` where their Dice is lower than what is kept."""
        better = dice < self.dice[index]
        self.images[index[better]] = images[better]
        self.dice[index[better]] = dice[better]


class Oracle:
    """Answers with a network's Dice and loss gradient at points that an attack proposes.

    Every answer is offered to ``best``, so that no attack can return less than the best it has seen, and every pass is
    counted per sample. Use it inside :func:`undisturbed`.

    Args:
        network: takes images (B, C, *spatial), returns logits (B, K, *spatial) or a list of them (deep supervision).
        targets: of all samples of the batch, as ``loss`` and ``criterion`` read them.
        loss: (outputs, targets) to one value a sample; what the attack ascends.
        criterion: gives the Dice; None where nobody asks for it (the inner attack of a training that only climbs): the
            Dice of every answer is then NaN.
        chunk: run the network on exactly this many images at a time, filling up with zeros. A sample's numbers then do
            not depend on which and how many other samples are attacked with it: convolution kernels round differently
            for different batch sizes, and 100 steps amplify that. None runs whatever is asked in one go.
        autocast: makes the context in which the network runs (mixed precision on CUDA).
        best: where to keep the best points; None keeps none.
        repeats: answer with the mean over this many passes, for a network that draws random numbers: of a single lucky
            draw nothing is kept.
        graphs: on CUDA, answer by replaying graphs, in passes of their sizes instead of ``chunk``. Losses and criteria
            that are equal must then compute the same.
        checked: the targets are known to belong to the network; else the first answer looks at them.
        rounding: makes of points and index the images that the network is really asked about, and that are kept; None
            for the points themselves.
        watch: is told of each pass; it must not change what it is given.

    A pass that has to be repeated in single precision, because half precision overflowed, counts once.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: Outputs,
        loss: LossFunction,
        criterion: DiceCriterion | None,
        chunk: int | None = None,
        autocast: Autocast = nullcontext,
        best: BestSoFar | None = None,
        repeats: int = 1,
        graphs: CudaGraphs | None = None,
        checked: bool = False,
        rounding: Callable[[Tensor, Tensor], Tensor] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self._rounding = rounding
        self._repeats = repeats
        self._graphs = graphs
        self._readable = checked
        self._network = network
        self._targets = targets
        self._loss = loss
        self._criterion = criterion
        self._chunk = chunk
        self._autocast = autocast
        self._best = best
        samples = first(targets).shape[0]
        self.forward_passes = torch.zeros(samples, dtype=torch.long)
        self.backward_passes = torch.zeros(samples, dtype=torch.long)

    @property
    def target(self) -> Tensor:
        """Full-resolution target (B, ...) of all samples."""
        return first(self._targets)

    def under(
        self,
        loss: LossFunction | None = None,
        beside: Tensor | None = None,
        best: BestSoFar | None = None,
        repeats: int | None = None,
    ) -> Oracle:
        """The same oracle with another loss, whose passes count with this one's.

        Args:
            loss: what :meth:`ascent` and :meth:`score` answer with; None for the same.
            beside: a tensor (B, ...) that the loss finds behind the targets: it gets [target, beside].
            best: where to keep the best points instead, for points that must not count: outside the threat model.
            repeats: as for the class; None for the same.
        """
        other = copy.copy(self)
        if loss is not None:
            other._loss = loss
        if beside is not None:
            other._targets = [self.target, beside]
        if best is not None:
            other._best = best
        if repeats is not None:
            other._repeats = repeats
        return other

    def rounded(self, images: Tensor, index: Tensor) -> Tensor:
        """The images that the network is really asked about when it is asked about these (n, C, *spatial)."""
        return images if self._rounding is None else self._rounding(images.detach(), index)

    def logits(self, images: Tensor, index: Tensor) -> Tensor:
        """Full-resolution logits (n, K, *spatial) of ``images`` (n, C, *spatial) for the samples ``index`` (n,).

        Raises:
            UserError: the output is NaN or infinite, in single precision too.
        """
        with torch.no_grad():
            images = self.rounded(images, index)
            parts = [finite_logits(self._network, part, self._autocast, real)[:real]
                     for part, _, real in self._parts(images, index)]  # fmt: skip
        self._count(self.forward_passes, index)
        return torch.cat(parts)

    def score(self, images: Tensor, index: Tensor, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """Loss and Dice (n,) of ``images``, without a gradient: what a black-box attack may ask.

        Raises:
            UserError: the output is NaN or infinite, in single precision too.
        """
        loss, images = self._loss_at(progress), self.rounded(images, index)

        def once() -> tuple[Tensor, Tensor]:
            parts = [self._score_of(loss, *part) for part in self._parts(images, index)]
            return _cat([part[0] for part in parts], images), _cat([part[1] for part in parts], images)

        with torch.no_grad():
            losses, dice = self._mean(once)
        return losses, self._record(images, index, dice)

    def dice(self, images: Tensor, index: Tensor) -> Tensor:
        """Dice (n,) of ``images`` (n, C, *spatial), which are candidates for the samples ``index`` (n,).

        Raises:
            UserError: the output is NaN or infinite, in single precision too.
        """
        images = self.rounded(images, index)
        with torch.no_grad():
            (dice,) = self._mean(lambda: (_cat([self._dice_of(*part) for part in self._parts(images, index)], images),))
        return self._record(images, index, dice)

    def ascent(self, images: Tensor, index: Tensor, progress: float = 0.0) -> Ascent:
        """Loss, gradient and Dice at ``images`` (n, C, *spatial) for the samples ``index`` (n,).

        Args:
            images: candidates for the samples.
            index: of the samples.
            progress: share of the attack that is over, in [0, 1], for a loss that changes during it.

        Raises:
            UserError: the loss or its gradient is NaN or infinite, in single precision too.
        """
        loss, images = self._loss_at(progress), self.rounded(images, index)

        def once() -> tuple[Tensor, Tensor, Tensor]:
            parts = [self._ascent_of(loss, *part) for part in self._parts(images, index)]
            gradient = torch.cat([p.gradient for p in parts]) if parts else torch.zeros_like(images)
            return _cat([p.loss for p in parts], images), gradient, _cat([p.dice for p in parts], images)

        losses, gradient, dice = self._mean(once)
        self._count(self.backward_passes, index)
        return Ascent(losses, gradient, self._record(images, index, dice))

    def _mean(self, once: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The mean of what ``once`` answers, over the repeats."""
        if self._repeats == 1:
            return once()
        return tuple(
            torch.stack(values).mean(0) for values in zip(*(once() for _ in range(self._repeats)), strict=True)
        )

    def _record(self, images: Tensor, index: Tensor, dice: Tensor) -> Tensor:
        self._count(self.forward_passes, index)
        if self._best is not None:
            self._best.update(index, images.detach(), dice)
        return dice

    def _count(self, passes: Tensor, index: Tensor) -> None:
        passes.index_add_(0, index.cpu(), torch.full((len(index),), self._repeats, dtype=torch.long))
        if self._watch is not None:
            self._watch(self.forward_passes + self.backward_passes)

    def _loss_at(self, progress: float) -> LossFunction:
        changing: Callable[[float], LossFunction] | None = getattr(self._loss, "at", None)
        return self._loss if changing is None else changing(progress)

    def _parts(self, images: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Outputs, int]]:
        """Images and targets in runs of ``chunk``, or of a graph's size, filled up; and how many of each are real."""
        start = 0
        while start < len(index):
            left = len(index) - start
            size = self._graphs.size_for(left) if self._graphs else self._chunk or left
            part = index[start : start + size]
            missing = size - len(part)
            targets = _take(self._targets, part, missing)
            yield _fill(images[start : start + size], missing), targets, len(part)
            start += size

    def _can_replay(self, loss: LossFunction | None = None) -> bool:
        """Whether a graph may answer: it cannot look at targets, repeat random numbers, or hold a loss that changes."""
        steady = loss is None or (_compares(loss) and self._loss is loss)
        return self._graphs is not None and self._readable and self._repeats == 1 and steady

    def _score_of(self, loss: LossFunction, images: Tensor, targets: Outputs, real: int) -> tuple[Tensor, Tensor]:
        if self._can_replay(loss):
            losses, dice, finite = self._ask(
                ("score", loss), lambda x, *y: self._score_and_finite(loss, x, _like(targets, y)), images, targets
            )
            if bool(finite[:real].all()):
                return losses[:real], dice[:real]
        logits = finite_logits(self._network, images, self._autocast, real)
        # A black box shows its prediction, not what deep supervision makes of it.
        return loss(logits, targets)[:real], self._dice(logits, targets)[:real]

    def _dice_of(self, images: Tensor, targets: Outputs, real: int) -> Tensor:
        if self._can_replay():
            dice, finite = self._ask("dice", self._dice_and_finite, images, targets)
            if bool(finite[:real].all()):
                return dice[:real]
        logits = finite_logits(self._network, images, self._autocast, real)
        return self._dice(logits, targets)[:real]

    def _ascent_of(self, loss: LossFunction, images: Tensor, targets: Outputs, real: int) -> Ascent:
        if not self._can_replay(loss):
            found = self._differentiate(loss, images, targets, self._autocast)
        else:
            found = Ascent(
                *self._ask(
                    ("ascent", loss),
                    lambda x, *y: tuple(self._differentiate(loss, x, _like(targets, y), self._autocast)),
                    images,
                    targets,
                )
            )
        answer = Ascent(*(part[:real] for part in found))
        bad = _unusable(answer)
        if not bool(bad.any()):
            return answer
        # Half precision overflowed: these samples, and no neighbour, get their answer in the images' own precision.
        where = bad.nonzero()[:, 0]
        again = self._in_single_precision(loss, images, targets, where)
        if bool(_unusable(again).any()):
            # NaN logits read as class 0, and a step along such a gradient ends at an image of NaN: like a success.
            raise UserError("the network cannot be attacked: its loss, or the gradient, is NaN or infinite.")
        return Ascent(*(old.index_copy(0, where, new.to(old)) for old, new in zip(answer, again, strict=True)))

    def _in_single_precision(self, loss: LossFunction, images: Tensor, targets: Outputs, where: Tensor) -> Ascent:
        """Of the samples ``where`` of a pass, in passes of half its size, as these take twice the memory.

        They are filled up, so that no sample's numbers depend on which others are repeated. Where the caller chose the
        size of passes, they are of that size: the network may take no other.
        """
        size, parts = self._chunk if self._chunk and not self._graphs else -(-len(images) // 2), []
        for start in range(0, len(where), size):
            index = where[start : start + size]
            missing = size - len(index)
            some, theirs = _fill(images[index], missing), _take(targets, index, missing)
            found = self._differentiate(loss, some, theirs, partial(single_precision, images.device))
            parts.append(Ascent(*(part[: len(index)] for part in found)))
        return Ascent(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _ask(self, kind: Hashable, question: Question, images: Tensor, targets: Outputs) -> tuple[Tensor, ...]:
        """The answer of a graph; what else it depends on belongs to its kind."""
        assert self._graphs is not None
        inputs = [images, *([targets] if isinstance(targets, Tensor) else targets)]
        whole = (kind, self._criterion, self._autocast, self._network)
        return self._graphs.ask(whole, question, self._network, inputs)

    def _score_and_finite(self, loss: LossFunction, images: Tensor, targets: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        with self._autocast():
            logits = first(self._network(images)).float()
        return loss(logits, targets), self._dice(logits, targets), torch.isfinite(logits).flatten(1).all(1)

    def _dice_and_finite(self, images: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            logits = first(self._network(images)).float()
        return self._dice(logits, targets), torch.isfinite(logits).flatten(1).all(1)

    def _differentiate(
        self, loss_function: LossFunction, images: Tensor, targets: Outputs, autocast: Autocast
    ) -> Ascent:
        with torch.enable_grad():
            images = images.detach().requires_grad_(True)
            with autocast():
                outputs = self._network(images)
            loss = loss_function(outputs, targets)
            # The loss is a mean over voxels: in half precision its gradient (about 1/voxels) would underflow to zero. A
            # power of two changes no digit of it in any other precision.
            scale = 2.0 ** round(math.log2(images[0, 0].numel()))
            # A network behind a step function does not depend on the image as far as autograd knows.
            gradient = torch.zeros_like(images)
            if loss.requires_grad:
                (found,) = torch.autograd.grad(loss.sum() * scale, images, allow_unused=True)
                gradient = gradient if found is None else found
        logits = first(outputs).detach()
        # A loss of the caller's may not see all of them; NaN logits read as class 0.
        finite = torch.isfinite(logits).flatten(1).all(1)
        loss = torch.where(finite, loss.detach(), torch.nan)
        return Ascent(loss, gradient / scale, self._dice(logits, targets))

    def _dice(self, logits: Tensor, targets: Outputs) -> Tensor:
        if self._criterion is None:
            return torch.full((len(logits),), torch.nan, device=logits.device)
        if not self._readable:
            self._criterion.check(logits, self.target)
            self._readable = True
        return self._criterion.dice(logits, first(targets)).float()


def finite_logits(network: nn.Module, images: Tensor, autocast: Autocast, real: int) -> Tensor:
    """Full-resolution logits of ``images``, without NaN or infinity in the first ``real`` of them.

    A sample for which half precision overflows is computed again without it: NaN logits would read as class 0, and so
    as a successful attack.

    Raises:
        UserError: the output is NaN or infinite in single precision, too.
    """
    with autocast():
        logits = first(network(images)).float()
    bad = ~torch.isfinite(logits).flatten(1).all(1)
    if bool(bad[:real].any()):
        with single_precision(images.device):
            again = first(network(images)).float()
        logits = torch.where(per_sample(bad, logits), again, logits)
        if not bool(torch.isfinite(logits[:real]).all()):
            raise UserError("the network cannot be attacked: its output is NaN or infinite.")
    return logits


def _unusable(answer: Ascent) -> Tensor:
    """True (n,) where loss or gradient is NaN or infinite."""
    return ~(torch.isfinite(answer.gradient).flatten(1).all(1) & torch.isfinite(answer.loss))


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Attack ``network`` in evaluation mode and without weight gradients; leave it as it was found, even on an error.

    Evaluation mode keeps dropout from blurring gradients and batch norm from learning from perturbed images.
    """
    modes = [(module, module.training) for module in network.modules()]
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if any(training for _, training in modes):
        network.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in learning:
            parameter.requires_grad_(True)


def _compares(loss: object) -> bool:
    """Whether a loss that is equal to ``loss`` is known to compute the same."""
    if not is_dataclass(loss):
        return False
    parameters = getattr(type(loss), "__dataclass_params__")  # noqa: B009 (mypy does not know it)
    return bool(parameters.frozen and parameters.eq) and all(part.compare for part in fields(loss))


def _like(targets: Outputs, parts: Sequence[Tensor]) -> Outputs:
    """``parts`` in the form of ``targets``: a tensor, or a list of them."""
    return parts[0] if isinstance(targets, Tensor) else list(parts)


def _take(values: Outputs, index: Tensor, missing: int) -> Outputs:
    if isinstance(values, Tensor):
        return _fill(values[index], missing)
    return [_fill(value[index], missing) for value in values]


def _fill(values: Tensor, missing: int) -> Tensor:
    if missing <= 0:
        return values
    return torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])


def _cat(parts: Sequence[Tensor], images: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else images.new_zeros(0)
