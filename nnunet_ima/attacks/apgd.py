"""Auto-PGD: Croce & Hein 2020, https://arxiv.org/abs/2003.01690, Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.lp import per_sample
from nnunet_ima.seeds import sample_generators
from nnunet_ima.threat import ThreatModel

# The paper's constants: momentum α, and the share ρ of steps that must raise the loss between two checkpoints.
ALPHA = 0.75
RHO = 0.75
# Of the steps, in each of the two larger balls of SEA's schedule.
SHRINKING_SHARE = 0.3


@dataclass(frozen=True)
class APGD(Attack):
    """PGD with momentum whose step starts at 2ε and is halved, from the best point so far, when it stops paying.

    The step is halved at checkpoint w_j if (1) fewer than ρ of the steps since w_{j−1} raised the loss, or (2) neither
    the step nor the highest loss changed since w_{j−1}.

    Attributes:
        steps: N_iter of the paper.
        restarts: random starts on the surface of the ball, the first one at ``start`` if there is one; more are never
            weaker.
        schedule: ``constant``, or ``shrinking``, which is that of SEA (https://arxiv.org/abs/2306.12941, "red-ε"): 30 %
            of the steps in a ball of 2ε, 30 % in one of 1.5ε, and the rest in that of ε, each part a run of Algorithm 1
            from where the part before found the lowest Dice. What is outside the ball of ε earns nothing.
        eot: loss, gradient and Dice are the mean over this many passes (expectation over transformation, Athalye et al.
            2018, https://arxiv.org/abs/1802.00420); 20 for networks that draw random numbers, as in AutoAttack.
    """

    name: ClassVar[str] = "apgd"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"schedule": ("constant", "shrinking")}
    steps: int = 100
    restarts: int = 1
    schedule: str = "constant"
    eot: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eot < 1:
            raise ValueError(f"apgd: eot is {self.eot}; it must be at least 1.")

    @property
    def repeats(self) -> int:
        """See :attr:`Attack.repeats`."""
        return self.eot

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return True

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        for restart in range(self.restarts):
            active = self.worth_attacking(best)
            if not len(active):
                return
            generators = sample_generators(images[active], self.seed, self.name, restart)
            threat, clean = self.threat.select(active), images[active]
            done = 0
            point = None if self.start is None or restart else self.start[active]
            for factor, steps in self._parts():
                ball = threat if factor == 1 else threat.with_epsilon(factor * torch.as_tensor(threat.epsilon))
                if point is None:
                    point = clean + ball.draw_on_sphere(clean, generators)
                found = best if factor == 1 else BestSoFar(images)
                climb = _Climb(ball, clean, ball.project(point, clean), active)
                self._climb(oracle.under(best=found), climb, found, done, steps)
                point, done = found.images[active], done + steps

    def _parts(self) -> list[tuple[float, int]]:
        """Size of the ball, in ε, and number of steps in it."""
        if self.schedule == "constant":
            return [(1.0, self.steps)]
        early = int(SHRINKING_SHARE * self.steps)
        return [(2.0, early), (1.5, early), (1.0, self.steps - 2 * early)]

    def _climb(self, oracle: Oracle, state: _Climb, best: BestSoFar, done: int, steps: int) -> None:
        """Algorithm 1; samples from which nothing more can be gained leave."""
        marks = checkpoints(steps)
        since_mark = {mark: mark - earlier for earlier, mark in pairwise(marks)}
        for step in range(steps):
            answer = oracle.ascent(state.point, state.index, progress=(done + step) / self.steps)
            state.record(answer.loss, answer.gradient, raised_counts=step > 0)
            if step in since_mark:
                state.halve_where_stuck(since_mark[step])
            state.leave(self.unfinished(best.dice[state.index]))
            if not len(state.index):
                return
            state.move(first_step=step == 0)
        oracle.dice(state.point, state.index)


def checkpoints(steps: int) -> list[int]:
    """Steps w_j = ⌈p_j N⌉ with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06); starts with 0."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Rounding first: 0.22 * 50 is 11.000000000000002 in floating point.
    marks = [int(-(-round(share * steps, 6) // 1)) for share in shares]
    return [mark for i, mark in enumerate(marks) if mark <= steps and mark not in marks[:i]]


class _Climb:
    """The state of Algorithm 1 for the samples that are still in play, each tensor (n, ...)."""

    def __init__(self, threat: ThreatModel, images: Tensor, start: Tensor, index: Tensor) -> None:
        samples = len(index)
        self.threat, self.images, self.index = threat, images, index
        self.point, self.previous = start, start
        self.gradient = torch.zeros_like(start)
        self.top_point, self.top_gradient = start, self.gradient
        self.top_loss = start.new_full((samples,), -torch.inf)
        self.last_loss = self.top_loss
        self.step = start.new_full((samples,), 2.0)  # η, in units of ε
        self.raised = start.new_zeros(samples)
        self.step_at_mark, self.top_at_mark = self.step, self.top_loss

    def record(self, loss: Tensor, gradient: Tensor, raised_counts: bool) -> None:
        """Take in loss and gradient at ``point``: lines 7 to 9 of Algorithm 1."""
        if raised_counts:
            self.raised = self.raised + (loss > self.last_loss)
        self.last_loss, self.gradient = loss, gradient
        higher = loss > self.top_loss
        self.top_loss = torch.where(higher, loss, self.top_loss)
        self.top_point = torch.where(per_sample(higher, self.point), self.point, self.top_point)
        self.top_gradient = torch.where(per_sample(higher, gradient), gradient, self.top_gradient)

    def halve_where_stuck(self, steps_since_mark: int) -> None:
        """Conditions 1 and 2 at a checkpoint: halve the step and go back to the best point (lines 10 to 14)."""
        stuck = self.raised < RHO * steps_since_mark
        stuck |= (self.step_at_mark == self.step) & (self.top_at_mark == self.top_loss)
        self.step_at_mark, self.top_at_mark = self.step, self.top_loss
        self.step = torch.where(stuck, self.step / 2, self.step)
        self.point = torch.where(per_sample(stuck, self.point), self.top_point, self.point)
        self.gradient = torch.where(per_sample(stuck, self.gradient), self.top_gradient, self.gradient)
        self.raised = torch.zeros_like(self.raised)

    def move(self, first_step: bool) -> None:
        """One step with momentum (Eq. 4, 5): z = Π(x + η h(g)); x' = Π(x + α (z − x) + (1 − α)(x − previous))."""
        gradient = torch.where(self.threat.perturbable(self.images), self.gradient, torch.zeros_like(self.gradient))
        direction = self.threat.steepest(gradient)
        length = per_sample(self.step, self.point) * self.threat.radius(self.images)
        target = self.threat.project(self.point + length * direction, self.images)
        if not first_step:
            momentum = ALPHA * (target - self.point) + (1 - ALPHA) * (self.point - self.previous)
            target = self.threat.project(self.point + momentum, self.images)
        self.previous, self.point = self.point, target

    def leave(self, stays: Tensor) -> None:
        """Drop the samples where ``stays`` (n,) is False."""
        if bool(stays.all()):
            return
        kept = stays.nonzero()[:, 0]
        self.threat = self.threat.select(kept)
        for field in ("images", "index", "point", "previous", "gradient", "top_point", "top_gradient", "top_loss",
                      "last_loss", "step", "raised", "step_at_mark", "top_at_mark"):  # fmt: skip
            setattr(self, field, getattr(self, field)[kept])
