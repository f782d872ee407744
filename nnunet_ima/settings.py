"""Settings of adversarial training: where each value comes from, and what is allowed.

A value is, in this order: what the user wrote under the key ``nnunet_ima`` of the plans configuration; the paper's, for
the paper's datasets in 2D; computed from the plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from nnunet_ima.attacks.bpgd import BOUNDARY_SEARCHES, BoundarySearch
from nnunet_ima.dice import REDUCTIONS, Reduction
from nnunet_ima.errors import UserError
from nnunet_ima.lp import NORMS, Norm

KEY = "nnunet_ima"

AttackPrecision = Literal["auto", "single"]
ATTACK_PRECISIONS: tuple[AttackPrecision, ...] = get_args(AttackPrecision)

Origin = Literal["user", "trainer", "paper", "self-configured", "default"]
"""Where a value comes from; ``trainer``: from the name of the trainer, such as ``nnUNetTrainerIMA_50epochs``."""


@dataclass(frozen=True)
class Settings:
    """What a training does; every value can be overridden in the plans configuration.

    Attributes:
        norm: of the perturbations.
        epsilon: ε_train, the largest perturbation of a training sample, in z-scores over the patch.
        delta_epsilon: Δε, by how much a margin grows at a visit.
        steps: K of the inner attack.
        step_factor: a step is ``step_factor`` · margin / K.
        bisections: halvings of the search for the boundary.
        boundary_search: ``path`` (Algorithm 2) or ``origin`` (Algorithm 3).
        random_start: whether IMA's inner attack starts at noise, or at the sample itself, as Algorithm 2 is printed.
        dice_threshold: above it a segmentation is correct.
        dice_reduction: how the Dice of several classes is put together.
        beta: weight of IMA's perturbed loss, (1 − β) L0 + β L1; 0.5 in the paper.
        trades_beta: weight of TRADES' divergence; 6 in its paper.
        te_momentum: η of TE's running averages; 0.9 in its paper.
        te_weight: of TE's pull towards the averages (mean square over voxels and classes) once fully grown; 300 in the
            authors' program.
        te_start, te_end: between which shares of the training that weight grows.
        robust_every: epochs between measurements of the robust Dice (PGD-10 on fixed validation patches); 0 for none.
        robust_patches: how many patches that is measured on.
        robust_epsilon: at which noise level; ε/3 if nothing is said, None without perturbation.
        attack_precision: ``auto``, mixed where that is faster and finds as much, or ``single``.
        snapshots: how many times IMA keeps the weights, at equal steps of the largest margin up to ε; 0 for never.
        num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch: length of the training; None for nnU-Net's.
        initial_lr: None for nnU-Net's.
        save_every: epochs between two checkpoints.
        start_from: a checkpoint of nnU-Net whose whole network the training starts from, output layers included
            (``-pretrained_weights`` leaves those out); None for random weights, or those of ``-pretrained_weights``.
    """

    norm: Norm = "l2"
    epsilon: float = 0.0
    delta_epsilon: float = 0.0
    steps: int = 20
    step_factor: float = 4.0
    bisections: int = 10
    boundary_search: BoundarySearch = "path"
    random_start: bool = True
    dice_threshold: float = 0.6
    dice_reduction: Reduction = "mean"
    beta: float = 0.5
    trades_beta: float = 6.0
    te_momentum: float = 0.9
    te_weight: float = 300.0
    te_start: float = 0.5
    te_end: float = 0.7
    robust_every: int = 5
    robust_patches: int = 16
    robust_epsilon: float | None = None
    attack_precision: AttackPrecision = "auto"
    snapshots: int = 8
    num_epochs: int | None = None
    num_iterations_per_epoch: int | None = None
    num_val_iterations_per_epoch: int | None = None
    initial_lr: float | None = None
    # nnU-Net saves every 50 epochs; an adversarial epoch costs as much as ten of those.
    save_every: int = 5
    start_from: str | None = None


@dataclass(frozen=True)
class _Number:
    low: float
    high: float
    whole: bool = False
    low_is_allowed: bool = True
    high_is_allowed: bool = True

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        lower = "at least" if self.low_is_allowed else "above"
        if math.isinf(self.high):
            return f"{kind} {lower} {self.low:g}"
        upper = "at most" if self.high_is_allowed else "under"
        return f"{kind} {lower} {self.low:g} and {upper} {self.high:g}"

    def allows(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        try:
            number = float(value)
        except OverflowError:  # a whole number above all floats
            return False
        above = number >= self.low if self.low_is_allowed else number > self.low
        below = number <= self.high if self.high_is_allowed else number < self.high
        return above and below and math.isfinite(number)


@dataclass(frozen=True)
class _Choice:
    choices: tuple[str, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(f'"{choice}"' for choice in self.choices)

    def allows(self, value: object) -> bool:
        return isinstance(value, str) and value in self.choices


@dataclass(frozen=True)
class _File:
    def __str__(self) -> str:
        return "the path of a checkpoint"

    def allows(self, value: object) -> bool:
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value


@dataclass(frozen=True)
class _Truth:
    def __str__(self) -> str:
        return "true or false"

    def allows(self, value: object) -> bool:
        return isinstance(value, bool)


_ALLOWED: dict[str, _Number | _Choice | _File | _Truth] = {
    "norm": _Choice(NORMS),
    "epsilon": _Number(0, math.inf),
    "delta_epsilon": _Number(0, math.inf, low_is_allowed=False),
    "steps": _Number(1, 1000, whole=True),
    "step_factor": _Number(0, math.inf, low_is_allowed=False),
    "bisections": _Number(1, 60, whole=True),
    "boundary_search": _Choice(BOUNDARY_SEARCHES),
    "random_start": _Truth(),
    "dice_threshold": _Number(0, 1, high_is_allowed=False),
    "dice_reduction": _Choice(REDUCTIONS),
    "beta": _Number(0, 1),
    "trades_beta": _Number(0, math.inf),
    "te_momentum": _Number(0, 1, high_is_allowed=False),
    "te_weight": _Number(0, math.inf),
    "te_start": _Number(0, 1),
    "te_end": _Number(0, 1),
    "robust_every": _Number(0, math.inf, whole=True),
    "robust_patches": _Number(1, 10_000, whole=True),
    "robust_epsilon": _Number(0, math.inf, low_is_allowed=False),
    "attack_precision": _Choice(ATTACK_PRECISIONS),
    "snapshots": _Number(0, 1000, whole=True),
    "num_epochs": _Number(1, math.inf, whole=True),
    "num_iterations_per_epoch": _Number(1, math.inf, whole=True),
    "num_val_iterations_per_epoch": _Number(1, math.inf, whole=True),
    "initial_lr": _Number(0, math.inf, low_is_allowed=False),
    "save_every": _Number(1, math.inf, whole=True),
    "start_from": _File(),
}

# What every training reads, what every perturbation does, and the rest of IMA's.
LENGTHS = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr")
SHARED = (*LENGTHS, "save_every", "start_from")
ROBUST = ("robust_every", "robust_patches", "robust_epsilon", "attack_precision")
PERTURBATION = ("norm", "epsilon", "steps", "step_factor", "dice_threshold", "dice_reduction", *ROBUST)

# Section 3.5 of the final paper: L2, 2D slices.
PAPER: dict[str, dict[str, float]] = {
    "Dataset002_Heart": {"epsilon": 20.0, "delta_epsilon": 5.0},
    "Dataset004_Hippocampus": {"epsilon": 15.0, "delta_epsilon": 2.0},
    "Dataset005_Prostate": {"epsilon": 40.0, "delta_epsilon": 10.0},
}

# Power law through the paper's three settings, ε = 3.57 N^0.1785 with N = patch voxels × channels (2,240, 81,920 and
# 204,800 give 14, 27 and 32 for the paper's 15, 20 and 40). A constant noise a voxel (ε ~ √N) does not describe them.
_EPSILON_FACTOR, _EPSILON_EXPONENT = 3.57, 0.1785

# Steps from Δε to ε in the paper: 20/5 and 40/10 at the least, 15/2 at the most. With few visits a third of them must
# be enough, but not with larger steps than the paper's: the start noise has norm Δε, and noise is a poor perturbation.
_FEWEST_EXPANSIONS, _MOST_EXPANSIONS, _VISITS_PER_EXPANSION = 4.0, 7.5, 3.0


@dataclass(frozen=True)
class Plan:
    """What self-configuration needs to know of a planned training.

    Attributes:
        dataset: nnU-Net's name, such as ``Dataset004_Hippocampus``.
        patch_size: voxels along each axis, two or three of them.
        channels: of the image.
        num_epochs, num_iterations_per_epoch, batch_size: of the training.
    """

    dataset: str
    patch_size: tuple[int, ...]
    channels: int
    num_epochs: int
    num_iterations_per_epoch: int
    batch_size: int


@dataclass(frozen=True)
class Configured:
    """Settings, and where each value came from.

    Attributes:
        settings: all of them.
        origins: of those that the training's method reads.
    """

    settings: Settings
    origins: Mapping[str, Origin]

    @property
    def in_force(self) -> dict[str, Any]:
        """The values that the method reads."""
        return {name: getattr(self.settings, name) for name in self.origins}

    def describe(self) -> str:
        """One line a setting: name, value, origin; for logs."""
        width = max(len(name) for name in self.origins)
        return "\n".join(f"  {name:<{width}}  {value}  ({self.origins[name]})" for name, value in self.in_force.items())


def validate(overrides: object, where: str) -> dict[str, Any]:
    """Check what a user wrote under the key ``nnunet_ima``.

    Args:
        overrides: the parsed value.
        where: names the place in the error message.

    Raises:
        UserError: it is no table of settings, has an unknown name, a wrong type, or a value out of range.
    """
    if not isinstance(overrides, Mapping):
        raise UserError(f'{where} is {overrides!r}; it must be a table of settings such as {{"epsilon": 15}}.')
    for name, value in overrides.items():
        if name not in _ALLOWED:
            raise UserError(f"{where} has the unknown setting {name!r}; allowed are {', '.join(_ALLOWED)}.")
        if not _ALLOWED[name].allows(value):
            raise UserError(f"{where} sets {name} to {value!r}; it must be {_ALLOWED[name]}.")
    start, end = (overrides.get(name, getattr(Settings, name)) for name in ("te_start", "te_end"))
    if start > end:
        raise UserError(f"{where} sets te_start to {start} and te_end to {end}; te_start must not be above te_end.")
    return dict(overrides)


def configure(
    overrides: Mapping[str, Any],
    plan: Plan,
    samples: int,
    reads: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Configured:
    """Put the settings of a training together.

    Args:
        overrides: what the user wrote, already validated.
        plan: the planned training, its length with the overrides applied.
        samples: training samples, that is tiles of nnU-Net's sliding window over all training cases.
        reads: settings that the method reads; None for all. The others may be set, for another method's sake.
        defaults: of the method, where they differ from :class:`Settings`.
    """
    norm: Norm = overrides.get("norm", "l2")
    computed: dict[str, float] = _from_paper(plan, norm)
    origin: Origin = "paper" if computed else "self-configured"
    epsilon = overrides.get("epsilon", computed.get("epsilon", default_epsilon(plan, norm)))
    computed.setdefault("epsilon", epsilon)
    # The paper's Δε belongs to the paper's ε: with another ε it is computed.
    own_step = "epsilon" in overrides or "delta_epsilon" not in computed
    if own_step:
        computed["delta_epsilon"] = default_delta_epsilon(epsilon, expected_visits(plan, samples))
    own = {"delta_epsilon"} if own_step else set()
    if epsilon > 0:
        # Where a model of this method still holds and a stock one does not: there the Dice tells most.
        computed["robust_epsilon"] = max(_two_digits(epsilon / 3), math.ulp(0.0))
        own.add("robust_epsilon")

    def origin_of(name: str) -> Origin:
        if name in overrides:
            return "user"
        if name not in computed:
            return "default"
        return "self-configured" if name in own else origin

    names = [field.name for field in fields(Settings) if reads is None or field.name in reads]
    settings = replace(Settings(), **{**(defaults or {}), **computed, **overrides})
    return Configured(settings, {name: origin_of(name) for name in names})


def explain(configured: Configured, plan: Plan, samples: int) -> list[str]:
    """Sentences on what was computed, and from what."""
    settings, origins = configured.settings, configured.origins
    voxels, visits = math.prod(plan.patch_size) * plan.channels, expected_visits(plan, samples)
    patch = " x ".join(map(str, plan.patch_size))
    told = [
        f"{samples} training samples (tiles of {patch} voxels, {plan.channels} channels) are drawn about {visits:.1f} "
        f"times each: {plan.num_epochs} epochs of {plan.num_iterations_per_epoch} batches of {plan.batch_size}."
    ]
    if origins.get("epsilon") == "self-configured" and settings.norm == "l2":
        told.append(
            f"epsilon {settings.epsilon:g} = {_EPSILON_FACTOR} * {voxels}^{_EPSILON_EXPONENT}: a power law through the "
            f"paper's three datasets, in the number of voxels of a patch times channels."
        )
    elif origins.get("epsilon") == "self-configured":
        told.append(
            f"epsilon {settings.epsilon:g}: the energy of the power law for L2, spread evenly over {voxels} voxels."
        )
    elif origins.get("epsilon") == "paper":
        told.append(f"epsilon {settings.epsilon:g} and what belongs to it are the paper's for {plan.dataset} in 2D.")
    if origins.get("delta_epsilon") == "self-configured":
        told.append(
            f"delta_epsilon {settings.delta_epsilon:g}: a margin moves once a visit, so epsilon is reached in a third "
            f"of the visits if a step between epsilon/{_MOST_EXPANSIONS:g} and epsilon/{_FEWEST_EXPANSIONS:g} (the "
            f"paper's smallest and largest) allows."
        )
    if origins.get("robust_epsilon") == "self-configured":
        told.append(f"robust_epsilon {settings.robust_epsilon:g} = epsilon/3, for the robust Dice during training.")
    if "delta_epsilon" in origins and visits < 3 * _FEWEST_EXPANSIONS:
        told.append(
            "So few visits leave margins small: train longer, or on fewer cases, or start from a trained model."
        )
    return told


def default_epsilon(plan: Plan, norm: Norm) -> float:
    """ε_train for a dataset the paper does not name, to two digits, in z-scores.

    L2: a power law through the paper's values in the number of voxels × channels. Linf: the same energy spread evenly.
    """
    voxels = math.prod(plan.patch_size) * plan.channels
    epsilon = _EPSILON_FACTOR * voxels**_EPSILON_EXPONENT
    return _two_digits(epsilon if norm == "l2" else epsilon / math.sqrt(voxels))


def default_delta_epsilon(epsilon: float, visits: float) -> float:
    """Δε between ε/7.5 and ε/4, the paper's smallest and largest, to two digits.

    A margin moves once a visit, so the fewer the visits the larger the step: one that is never stopped reaches ε within
    a third of its visits, if these bounds allow.
    """
    if epsilon == 0:
        return 1.0  # no perturbation at all: any step is clipped to 0
    expansions = min(max(visits / _VISITS_PER_EXPANSION, _FEWEST_EXPANSIONS), _MOST_EXPANSIONS)
    return max(_two_digits(epsilon / expansions), math.ulp(0.0))


def expected_visits(plan: Plan, samples: int) -> float:
    """How often a training sample is drawn on average."""
    return plan.num_epochs * plan.num_iterations_per_epoch * plan.batch_size / max(samples, 1)


def _from_paper(plan: Plan, norm: Norm) -> dict[str, float]:
    if len(plan.patch_size) != 2 or norm != "l2":
        return {}
    return dict(PAPER.get(plan.dataset, {}))


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
