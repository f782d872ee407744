"""Two moons: where do clean training, SAT with too large an epsilon, and IMA put the decision boundary?

Figure 7 and section 3.1 of the IMA paper (arXiv 2005.09147, earlier versions), with this project's own core. A point
of the plane is an image of two channels and one voxel, (2, 1, 1), and its class is a target (1, 1, 1) of 0 or 1.

    python benchmarks/moons.py -o docs/pictures/moons.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_moons
from torch import Tensor, nn

from nnunet_ima.attacks.bpgd import generate_adversarial
from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.attacks.pgd import PGD, ascend
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, cross_entropy, first
from nnunet_ima.lp import random_in_ball, random_on_sphere
from nnunet_ima.margins import MarginTable, updated_margins
from nnunet_ima.threat import ThreatModel

Method = Literal["STD", "SAT", "IMA"]
METHODS: tuple[Method, ...] = get_args(Method)

# Classes 0 and 1, softmax. Although nnU-Net's class 0 is background, the Dice of a sample of one voxel is 1 if its
# class was predicted and 0 if not, for either class: a point of class 0 that is predicted as such holds no foreground
# and none was found (Dice 1 by convention), and one predicted as class 1 is all false positive. So "Dice above the
# threshold" is "rightly classified", and the moons need no detour over regions. What the IMA trainer does for images
# without foreground (they have no margin) is a rule of segmentation, which a classification of points cannot use.
LABELS = Labels()
CRITERION = DiceCriterion(labels=LABELS)

RADIUS = 1.0
CENTRES = ((0.0, 0.0), (1.0, 0.5))
"""The noise-free moons of ``make_moons``: the upper half of a circle (class 0), the lower half of another (class 1)."""


class Points(NamedTuple):
    """Points of the plane as a segmentation task.

    Attributes:
        images: (N, 2, 1, 1), x and y.
        targets: (N, 1, 1, 1) of 0. and 1.
    """

    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the paper's (supplement G.1).

    Attributes:
        epsilon: L2 radius of SAT, largest margin of IMA, in the units of the plane. The noise-free moons come as close
            as 0.5, so that balls of more than 0.25 around the two classes overlap, and sooner around noisy points. At
            0.3, the paper's, SAT asks for both classes at one place, and IMA's margins have to stop short of it.
        delta_epsilon: expansion step Δε of IMA. The paper's, for its other data sets, is epsilon / epochs.
        epochs: passes over the points.
        batch_size: points a step.
        steps: K of PGD, for SAT and IMA, each 4 · radius / K long.
        seed: of the initial weights, the order of the points, and the start noise.
    """

    epsilon: float = 0.3
    delta_epsilon: float = 0.01
    epochs: int = 30
    batch_size: int = 128
    steps: int = 20
    seed: int = 0


def moons(count: int, noise: float, seed: int) -> Points:
    """Draw ``count`` points, half of each class, with Gaussian noise of standard deviation ``noise``."""
    points, classes = make_moons(count, noise=noise, random_state=seed)
    return Points(
        torch.from_numpy(points).float().reshape(-1, 2, 1, 1), torch.from_numpy(classes).float().reshape(-1, 1, 1, 1)
    )


def make_network(seed: int) -> nn.Sequential:
    """The paper's network, from points (B, 2, 1, 1) to logits (B, 2, 1, 1); no global random state changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(2, 32), nn.LeakyReLU()),
            *(nn.Linear(32, 64), nn.LayerNorm(64), nn.LeakyReLU()),
            *(nn.Linear(64, 128), nn.LayerNorm(128), nn.LeakyReLU()),
            nn.Linear(128, 2),
            nn.Unflatten(1, (2, 1, 1)),
        )


def point_loss(outputs: Outputs, targets: Outputs) -> Tensor:
    """Cross entropy (B,) of each point: what is minimised in training and ascended by every attack."""
    return cross_entropy(first(outputs), first(targets), LABELS)


def train(method: Method, points: Points, recipe: Recipe) -> nn.Module:
    """Train the paper's network on ``points``, by Adam with its default parameters.

    The three methods differ in what they make of a batch, and in nothing else.
    """
    network = make_network(recipe.seed)
    optimizer = torch.optim.Adam(network.parameters())
    generator = torch.Generator().manual_seed(recipe.seed)
    margins = MarginTable(recipe.delta_epsilon, recipe.epsilon, "l2")
    for _ in range(recipe.epochs):
        for batch in torch.split(torch.randperm(len(points.images), generator=generator), recipe.batch_size):
            images, targets = points.images[batch], points.targets[batch]
            if method == "STD":
                loss = point_loss(network(images), targets).mean()
            elif method == "SAT":
                loss = sat_loss(network, images, targets, recipe, generator)
            else:
                loss = ima_loss(network, images, targets, batch.tolist(), margins, recipe, generator)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return network.eval()


def sat_loss(network: nn.Module, images: Tensor, targets: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mean loss of the points where K steps of PGD ended: design section 5, Madry et al. 2018."""
    threat = ThreatModel("l2", recipe.epsilon)
    index = torch.arange(len(images))
    perturbed = images + random_in_ball(images, threat.norm, threat.radius(images), generator)
    with undisturbed(network):
        oracle = Oracle(network, targets, point_loss, CRITERION)
        for _ in range(recipe.steps):
            perturbed = ascend(threat, perturbed, images, oracle.ascent(perturbed, index).gradient, 4 / recipe.steps)
    return point_loss(network(perturbed), targets).mean()


def ima_loss(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    numbers: Sequence[int],
    margins: MarginTable,
    recipe: Recipe,
    generator: torch.Generator,
) -> Tensor:
    """(L0 + L1) / 2 of a batch, and new margins for its points ``numbers``: lines 2 to 17 of Algorithm 1."""
    samples = [("moons", number) for number in numbers]
    outputs = network(images)
    clean_loss = point_loss(outputs, targets)
    index = CRITERION.is_correct(CRITERION.dice(outputs.detach(), targets)).nonzero()[:, 0]
    if not len(index):
        return clean_loss.mean()

    estimated = margins.margins(samples)
    threat = ThreatModel("l2", estimated).select(index)
    radius = threat.radius(images[index])
    start_norm = torch.minimum((radius - margins.step).clamp_min(margins.step), radius)
    start = images[index] + random_on_sphere(images[index], threat.norm, start_norm, generator)
    with undisturbed(network):
        oracle = Oracle(network, targets, point_loss, CRITERION)
        found = generate_adversarial(oracle, CRITERION, threat, images[index], start, index, recipe.steps)

    again = network(found.images)
    perturbed_loss = clean_loss.index_copy(0, index, point_loss(again, targets[index]))
    still_correct = CRITERION.is_correct(CRITERION.dice(again.detach(), targets[index]))
    distance = threat.distance(found.images, images[index])
    new = updated_margins(estimated[index], distance, still_correct, found.crossed, margins.step)
    margins.update([samples[i] for i in index.tolist()], new)
    return (clean_loss + perturbed_loss).mean() / 2


def accuracy(network: nn.Module, points: Points, epsilon: float = 0.0, steps: int = 100) -> float:
    """Share of the points that are rightly classified, under PGD of L2 radius ``epsilon`` if that is above 0."""
    attack = PGD(ThreatModel("l2", epsilon), CRITERION, point_loss, steps=steps if epsilon else 0)
    return float(CRITERION.is_correct(attack(network, *points).dice).float().mean())


class Middle(NamedTuple):
    """The middle line: where both noise-free moons are equally far.

    Attributes:
        points: (M, 2), in order along the line.
        nearest: (2, M, 2), the point of either moon that is nearest to each of them.
        half_gap: (M,), the distance to either.
    """

    points: NDArray[np.float64]
    nearest: NDArray[np.float64]
    half_gap: NDArray[np.float64]


def nearest_on_moon(points: NDArray[np.float64], moon: int) -> NDArray[np.float64]:
    """The points of a noise-free moon that are nearest to ``points`` (..., 2); moon 1 is moon 0 turned about."""
    centre, sign = np.array(CENTRES[moon]), 1 - 2 * moon
    x, y = np.moveaxis(sign * (points - centre), -1, 0)
    # Below its half circle the nearest point is the end on the same side.
    angle = np.where(y >= 0, np.arctan2(y, x), np.where(x >= 0, 0.0, np.pi))
    return centre + sign * RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1)


def middle_line(spacing: float = 0.01) -> Middle:
    """The middle line as far as it runs between the moons: inside their convex hull.

    It is the zero contour of the difference of the two distances, on a grid of ``spacing``.
    """
    from contourpy import contour_generator
    from scipy.spatial import Delaunay

    x, y = np.arange(-1.2, 2.2, spacing), np.arange(-0.7, 1.2, spacing)
    grid = np.stack(np.meshgrid(x, y), -1)
    away = [np.linalg.norm(grid - nearest_on_moon(grid, moon), axis=-1) for moon in (0, 1)]
    (line,) = (np.asarray(line) for line in contour_generator(x, y, away[0] - away[1]).lines(0.0))
    t = np.linspace(0, np.pi, 200)
    arc = np.stack([np.cos(t), np.sin(t)], -1)
    hull = Delaunay(np.concatenate([CENTRES[0] + arc, CENTRES[1] - arc]))
    line = line[hull.find_simplex(line) >= 0]
    nearest = np.stack([nearest_on_moon(line, moon) for moon in (0, 1)])
    return Middle(line, nearest, np.linalg.norm(line - nearest[0], axis=-1))


def wrong_side(network: nn.Module, middle: Middle, places: int = 400) -> NDArray[np.float64]:
    """How far the decision boundary is from each point of the middle line, (M,), as a share of half the gap.

    A point of the middle line and the two points of the moons nearest to it make a way across the gap: half a gap
    from moon 0 to the middle, half a gap on to moon 1. All before the middle should be class 0, all behind it class 1.
    The share of a half that the network gets wrong is, for a boundary crossed once, its distance to the middle.
    Positive: the boundary lies on moon 1's side (moon 0's class reaches over the middle); negative: on moon 0's.
    1 or −1: it has reached a moon.
    """
    share = (np.arange(places) + 0.5)[:, None, None] / places
    halves = middle.points + share * (middle.nearest - middle.points)[:, None]
    way = torch.from_numpy(halves).float().reshape(-1, 2, 1, 1)
    with torch.no_grad():
        classes = network(way).argmax(1).reshape(halves.shape[:3]).numpy()
    return np.asarray((classes[1] == 0).mean(0) - (classes[0] == 1).mean(0))


def boundary_offset(network: nn.Module, middle: Middle) -> float:
    """Mean distance of the decision boundary from the middle line, as a share of half the gap, in [0, 1]."""
    return float(np.abs(wrong_side(network, middle)).mean())


def draw(networks: Sequence[tuple[str, nn.Module]], points: Points, middle: Middle, epsilon: float, file: Path) -> None:
    """One panel a network: points, decision regions, boundary, middle line, and the mean offset in its title."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    x, y = np.meshgrid(np.linspace(-1.35, 2.35, 371), np.linspace(-0.85, 1.35, 221))
    grid = torch.from_numpy(np.stack([x, y], -1)).float().reshape(-1, 2, 1, 1)
    positions, classes = points.images.flatten(1).numpy(), points.targets.flatten().numpy()
    with plt.style.context("default"):
        figure, panels = plt.subplots(
            1, len(networks), figsize=(12.6, 3.5), dpi=110, sharex=True, sharey=True, layout="constrained"
        )
        for panel, (name, network) in zip(panels, networks, strict=True):
            with torch.no_grad():
                logits = network(grid).flatten(1)
            height = (logits[:, 1] - logits[:, 0]).reshape(x.shape).numpy()
            panel.contourf(x, y, height, levels=[-np.inf, 0, np.inf], colors=["#d6e6f4", "#fde3cd"])
            for label, color in enumerate(("#1f6fb4", "#d9600f")):
                panel.scatter(*positions[classes == label].T, s=4, color=color, linewidths=0, label=f"class {label}")
            panel.contour(x, y, height, levels=[0], colors="black", linewidths=1.8)
            panel.plot([], [], color="black", linewidth=1.8, label="decision boundary")
            panel.plot(*middle.points.T, color="#2a9d3a", linewidth=1.8, linestyle=(0, (4, 2)), label="middle line")
            offset = boundary_offset(network, middle)
            panel.set_title(f"{name}: mean offset {100 * offset:.0f} % of half the gap", fontsize=11)
            panel.plot([-1.2, -1.2 + epsilon], [-0.7, -0.7], color="dimgrey", linewidth=2.5, solid_capstyle="butt")
            panel.text(-1.2 + epsilon / 2, -0.66, f"ε = {epsilon:g}", color="dimgrey", ha="center", va="bottom")
            panel.set_aspect("equal")
            panel.tick_params(labelsize=8)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, markerscale=3)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="png")
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the three networks, print what was measured and draw the picture."""
    parser = argparse.ArgumentParser(description="IMA's decision boundary on two moons (Figure 7 of the paper).")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures/moons.png"), help="the picture")
    parser.add_argument("--points", type=int, default=2000, help="training points (default: 2000; the paper's: 20000)")
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation of the points (default: 0.05)")
    parser.add_argument("--epsilon", type=float, default=Recipe.epsilon, help="of SAT, and at most of IMA (0.3)")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="default: 30, the paper's")
    parser.add_argument("--seed", type=int, default=0, help="of points and training (default: 0)")
    chosen = parser.parse_args(arguments)

    recipe = Recipe(chosen.epsilon, chosen.epsilon / chosen.epochs, chosen.epochs, seed=chosen.seed)
    points = moons(chosen.points, chosen.noise, chosen.seed)
    unseen = moons(2000, chosen.noise, chosen.seed + 10_000)
    middle = middle_line()
    levels = (0.0, 0.1, 0.2, 0.3)
    print(f"| | mean offset | {' | '.join(f'PGD-100 {level:g}' if level else 'clean' for level in levels)} |")
    print("|" + " --- |" * (len(levels) + 2))
    networks = []
    for method in METHODS:
        network = train(method, points, recipe)
        networks.append((method, network))
        figures = [boundary_offset(network, middle), *(accuracy(network, unseen, level) for level in levels)]
        print(f"| {method} | {' | '.join(f'{100 * figure:.1f} %' for figure in figures)} |", flush=True)
    shown = Points(points.images[:1200], points.targets[:1200])
    draw(networks, shown, middle, recipe.epsilon, chosen.output)


if __name__ == "__main__":
    main()
