"""Slices with their contours as PNG, to stand in the page."""

from __future__ import annotations

import base64
import io
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np

from nnunet_ima.evaluation.examples import Example, Picture
from nnunet_ima.evaluation.pictures import LINE_STYLES

TRUTH, FOUND = "#2ca02c", "#ff3b30"
SMALLEST = 320


def both_sides(example: Example) -> tuple[str, str]:
    """Before and after, each as a data URI: green the reference, red what the network finds."""
    low, high = float(example.image.min()), float(example.image.max())
    before = _draw(example.image, example.target, example.before, low, high)
    return before, _draw(example.perturbed, example.target, example.after, low, high)


def perturbation(example: Example) -> tuple[str, float]:
    """What was added, as a data URI; red is brighter, blue is darker. And what the strongest colour means."""
    difference = example.perturbed - example.image
    most = float(np.abs(difference).max())
    end = max(most, 1e-12)
    return _embed(difference, "RdBu_r", -end, end, []), most


def _draw(image: Picture, target: Picture, found: Picture, low: float, high: float) -> str:
    return _embed(image, "gray", low, high, [(target, TRUTH), (found, FOUND)])


def _embed(image: Picture, colours: str, low: float, high: float, contours: list[tuple[Picture, str]]) -> str:
    height, width = image.shape
    scale = max(1, -(-SMALLEST // max(height, width)))
    with plt.style.context("default"):
        figure = plt.figure(figsize=(width * scale / 100, height * scale / 100), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(image, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        for masks, colour in contours:
            for mask, style in zip(masks, cycle(LINE_STYLES), strict=False):
                if mask.any() and not mask.all():
                    axes.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.6, linestyles=style)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
