"""nnU-Net's own training log and progress picture, with the curves of adversarial training added."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from nnunet_ima.files import atomic_path

SECONDS_BETWEEN_PICTURES = 60.0


@dataclass(frozen=True)
class Panel:
    """One more panel of the progress picture: the label of its vertical axis, and its curves (log key to legend)."""

    label: str
    curves: Mapping[str, str]


class AdversarialLogger(LocalLogger):
    """nnU-Net's logger with further values an epoch, which also show in ``progress.png``."""

    def __init__(self, panels: Sequence[Panel], verbose: bool = False) -> None:
        super().__init__(verbose)
        self.panels = panels
        # Whether the picture is drawn however little time has passed, as after the last epoch.
        self.draw_at_once = False
        # Of pictures that were drawn.
        self.drawn = 0
        self._last = -math.inf
        for panel in panels:
            for key in panel.curves:
                self.my_fantastic_logging.setdefault(key, [])

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw nnU-Net's picture, then add the panels below it; but if this was done less than a minute ago, wait.

        It takes some seconds, and an epoch of the paper's trainings takes some seconds on a GPU.
        """
        if not self.draw_at_once and time.monotonic() - self._last < SECONDS_BETWEEN_PICTURES:
            return
        self._draw(output_folder)
        self.drawn, self._last = self.drawn + 1, time.monotonic()

    def _draw(self, output_folder: str) -> None:
        super().plot_progress_png(output_folder)
        if not self.panels:
            return
        picture = Path(output_folder) / "progress.png"
        with Image.open(picture) as stock:
            panels = self._draw_panels(stock.width)
            stacked = Image.new("RGB", (stock.width, stock.height + panels.height), "white")
            stacked.paste(stock.convert("RGB"), (0, 0))
        stacked.paste(panels, (0, stacked.height - panels.height))
        with atomic_path(picture) as temporary:
            stacked.save(temporary, format="png", compress_level=1)

    def _draw_panels(self, width: int) -> Image.Image:
        """The panels as an image of the given width."""
        # nnU-Net draws 30 inches wide in fonts of 2.5 times the usual size; the same here, but flatter.
        dpi, rows = width / 30, (len(self.panels) + 1) // 2
        figure, all_axes = plt.subplots(rows, 2, figsize=(30, 9 * rows), dpi=dpi, squeeze=False)
        for panel, axes in zip(self.panels, all_axes.flat, strict=False):
            for key, legend in panel.curves.items():
                values = self.my_fantastic_logging[key]
                # Not every value is measured in every epoch; what stands alone needs a dot to be seen.
                measured = [(epoch, value) for epoch, value in enumerate(values) if value == value]
                marker = "o" if len(measured) < len(values) else None
                axes.plot(
                    *zip(*measured, strict=True) if measured else ([], []), linewidth=4, marker=marker, label=legend
                )
            axes.set_xlabel("epoch")
            axes.set_ylabel(panel.label)
            axes.legend(fontsize="x-small")
        figure.tight_layout()
        pixels = BytesIO()
        figure.savefig(pixels, format="png")
        plt.close(figure)
        pixels.seek(0)
        return Image.open(pixels).convert("RGB")


def draw_margins(histograms: Sequence[Sequence[int]], maximum: float, unit: str, file: Path) -> None:
    """Draw ``margins.png``: how the margins spread over the epochs.

    Args:
        histograms: for each epoch, how many samples' margins lie in each of the equal bins of [0, maximum].
        maximum: ε_train.
        unit: of the margins, for the axis.
        file: where to write the picture.
    """
    counts = np.array(histograms, dtype=float).T
    share = counts / np.maximum(counts.sum(0, keepdims=True), 1)
    centres = (np.arange(len(counts)) + 0.5) * maximum / len(counts)
    with plt.style.context("default"):
        figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
        picture = axes.imshow(
            100 * share,
            origin="lower",
            aspect="auto",
            cmap="viridis",
            vmin=0,
            extent=(-0.5, counts.shape[1] - 0.5, 0, maximum),
            interpolation="nearest",
        )
        axes.plot(range(counts.shape[1]), centres @ share, color="white", linewidth=2, label="mean")
        axes.legend(loc="upper left", facecolor="black", labelcolor="white", framealpha=0.4)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"margin ({unit})")
        axes.set_title("Margins of the training samples drawn so far")
        figure.colorbar(picture, label="% of samples")
        figure.tight_layout()
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)
