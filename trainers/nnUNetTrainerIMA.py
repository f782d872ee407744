"""Increasing-Margin Adversarial training: Algorithm 1 of arXiv 2005.09147 v10, for segmentation (3.5.2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nnunet_ima.attacks.bpgd import generate_adversarial
from nnunet_ima.attacks.oracle import undisturbed
from nnunet_ima.losses import Outputs, first
from nnunet_ima.lp import random_on_sphere
from nnunet_ima.margins import MarginTable, SampleId, updated_margins
from nnunet_ima.settings import PERTURBATION, expected_visits
from nnunet_ima.threat import ThreatModel
from nnunet_ima.trainers.nnUNetTrainerAdversarial import Batch, Step, nnUNetTrainerAdversarial
from nnunet_ima.training_log import Panel, draw_margins
from nnunet_ima.units import short, unit_of

HISTOGRAM_BINS = 30
QUANTILES = (0.1, 0.5, 0.9)
SNAPSHOTS = "snapshot_epoch_*.pth"


class nnUNetTrainerIMA(nnUNetTrainerAdversarial):
    """Train each sample on itself and on a perturbed copy that just about stays correct.

    How far a sample is perturbed is its margin: it grows by Δε when the perturbed sample stays correct, and shrinks
    when the perturbation went too far.
    """

    reads: ClassVar[Collection[str]] = (
        *PERTURBATION,
        "delta_epsilon",
        "bisections",
        "boundary_search",
        "random_start",
        "beta",
        "snapshots",
    )
    # Samples leave the attack one after the other.
    attack_sizes: ClassVar[int] = 12
    panels: ClassVar[Sequence[Panel]] = (
        Panel("loss", {"clean_losses": "clean", "perturbed_losses": "perturbed"}),
        Panel(
            "share of samples",
            {"correct_share": "correct, of those with foreground", "crossed_share": "crossed, of those perturbed"},
        ),
        Panel(
            "margin",
            {
                "margin_mean": "mean",
                "margin_10": "10 % quantile",
                "margin_50": "median",
                "margin_90": "90 % quantile",
            },
        ),
        Panel("per sample", {"passes_per_sample": "forward passes a step", "visits_mean": "visits so far"}),
    )

    def start_method(self, samples: int) -> None:
        """Every margin starts at Δε."""
        settings = self.settings
        self.margins = MarginTable(settings.delta_epsilon, settings.epsilon, settings.norm)
        self.histograms: list[list[int]] = []
        # Epochs after which the weights were kept, with the largest margin then.
        self.snapshots: list[tuple[int, float]] = []
        self.print_to_log_file(f"IMA draws each sample about {expected_visits(self.plan(), samples):.1f} times.")

    def adversarial_step(self, batch: Batch) -> Step:
        """Lines 2 to 17 of Algorithm 1 for a batch."""
        images, targets, samples = batch.images, batch.targets, batch.samples
        outputs = self.forward(images)
        clean_loss = self.nnunet_loss(outputs, targets)

        # g(z) = y, for samples that have a margin at all: those with foreground.
        logits, target = first(outputs).detach(), first(targets)
        correct = self.criterion.is_correct(self.criterion.dice(logits, target))
        foreground = self.criterion.has_foreground(target, logits.shape[1])
        margins = self.margins.margins(samples).to(self.device)
        index = (correct & foreground & (margins > 0)).nonzero()[:, 0]

        threat = self.patch_threat(images, margins).select(index)
        perturbed, crossed, passes = self._generate(images[index], targets, index, threat)
        if len(index) or not self.is_ddp:
            perturbed_loss, still_correct = self._perturbed_loss(outputs, perturbed, targets, index, clean_loss)
        else:
            # The loss, and layers that synchronise, gather from all ranks: a rank must not skip the second pass because
            # it has nothing perturbed. It sends one clean sample through again, which changes nothing.
            anyone = torch.zeros(1, dtype=torch.long, device=images.device)
            perturbed_loss, _ = self._perturbed_loss(outputs, images[:1], targets, anyone, clean_loss)
            still_correct = crossed

        distance = threat.distance(perturbed, images[index])
        new_margins = margins.clone()
        new_margins[index] = updated_margins(margins[index], distance, still_correct, crossed, self.margins.step)
        self._update(samples, new_margins, foreground)

        beta = self.settings.beta
        return Step(
            loss=(1 - beta) * clean_loss + beta * perturbed_loss,
            counts={
                "steps": 1,
                "samples": len(samples),
                "foreground": int(foreground.sum()),
                "correct": int((correct & foreground).sum()),
                "perturbed": len(index),
                "crossed": int(crossed.sum()),
                "forward_passes": len(samples) + len(index) + passes,
                "clean_loss": float(clean_loss.detach()),
                "perturbed_loss": float(perturbed_loss.detach()),
            },
        )

    def _generate(
        self, images: Tensor, targets: Outputs, index: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor, int]:
        """GenAdv for the samples ``index``: perturbed images, which crossed (β), and forward passes spent."""
        if not len(index):
            return images, torch.zeros(0, dtype=torch.bool, device=images.device), 0
        settings = self.settings
        with undisturbed(self.bare_network):
            oracle = self.attack_oracle(targets, self.sample_loss, self.criterion)
            found = generate_adversarial(
                oracle,
                self.criterion,
                threat,
                images,
                threat.project(images + self._start_noise(images, threat), images),
                index,
                settings.steps,
                settings.step_factor,
                settings.bisections,
                settings.boundary_search,
            )
        return found.images, found.crossed, int(oracle.forward_passes.sum())

    def _start_noise(self, images: Tensor, threat: ThreatModel) -> Tensor:
        """Random noise of norm max(E − Δε, Δε), but never more than E; none without ``random_start``."""
        if not self.settings.random_start:
            return torch.zeros_like(images)
        radius = threat.radius(images)
        norm = torch.minimum((radius - self.margins.step).clamp_min(self.margins.step), radius)
        return random_on_sphere(images, threat.norm, norm, self.generator, threat.perturbable(images))

    def _perturbed_loss(
        self, outputs: Outputs, perturbed: Tensor, targets: Outputs, index: Tensor, clean_loss: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L1, and whether each perturbed sample is correct (lines 6 to 10).

        nnU-Net's loss may pool Dice over the batch, so L1 is its loss on the whole batch, in which the perturbed
        samples' outputs stand in for the clean ones. Without any it is L0, and so is the step: stock nnU-Net's.
        """
        if not len(index):
            return clean_loss, torch.zeros(0, dtype=torch.bool, device=perturbed.device)
        again = self.forward(perturbed)
        mixed: Outputs
        if isinstance(outputs, Tensor):
            mixed = outputs.index_copy(0, index, first(again))
        else:
            mixed = [clean.index_copy(0, index, other) for clean, other in zip(outputs, again, strict=True)]
        dice = self.criterion.dice(first(again).detach(), first(targets)[index])
        return self.nnunet_loss(mixed, targets), self.criterion.is_correct(dice)

    def _update(self, samples: Sequence[SampleId], margins: Tensor, foreground: Tensor) -> None:
        drawn = foreground.nonzero()[:, 0].tolist()
        self.margins.update([samples[i] for i in drawn], margins[drawn].cpu())

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Bring the ranks' margins together, then log."""
        self.margins.merge(self.from_all_ranks(self.margins.changes()))
        super().on_train_epoch_end(train_outputs)

    def epoch_log(self, counts: Mapping[str, float]) -> Mapping[str, float]:
        """Losses, shares, margins and passes of the epoch."""
        margins = self.margins.all_margins()
        has_margins = len(margins) > 0
        quantiles = torch.quantile(margins, torch.tensor(QUANTILES)).tolist() if has_margins else [0.0] * len(QUANTILES)
        counted = torch.histc(margins, HISTOGRAM_BINS, 0, self.settings.epsilon or 1.0)
        self.histograms.append([int(count) for count in counted])
        return {
            "clean_losses": counts["clean_loss"] / counts["steps"],
            "perturbed_losses": counts["perturbed_loss"] / counts["steps"],
            "correct_share": counts["correct"] / max(counts["foreground"], 1),
            "crossed_share": counts["crossed"] / max(counts["perturbed"], 1),
            "margin_mean": float(margins.mean()) if has_margins else 0.0,
            **{f"margin_{100 * q:.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
            "passes_per_sample": counts["forward_passes"] / counts["samples"],
            "visits_mean": float(self.margins.all_visits().float().mean()) if has_margins else 0.0,
        }

    def on_train_start(self) -> None:
        """As every training; snapshots of a training that is not continued, or of epochs that were lost, go."""
        super().on_train_start()
        if self.local_rank == 0:
            kept = {self._snapshot_file(epoch).name for epoch, _ in self.snapshots}
            for file in Path(self.output_folder).glob(SNAPSHOTS):
                if file.name not in kept:
                    file.unlink()

    def on_epoch_end(self) -> None:
        """As nnU-Net, but a snapshot comes before the checkpoint that knows of it; then the picture of margins."""
        self._keep_snapshot()
        before = self.pictures_drawn
        super().on_epoch_end()
        if self.local_rank == 0 and self.pictures_drawn > before:
            unit = short(unit_of(self.configuration_manager.normalization_schemes))
            unit = f"{self.settings.norm.upper().replace('LINF', 'Linf')}, {unit}"
            file = Path(self.output_folder) / "margins.png"
            try:
                draw_margins(self.histograms, self.settings.epsilon or 1.0, unit, file)
            except OSError as error:
                # No picture is worth a training.
                self.print_to_log_file(f"{file} could not be drawn: {error}")

    def _keep_snapshot(self) -> None:
        """Keep the weights when the largest margin has reached the next of ``snapshots`` equal steps up to ε.

        Supplement C.2: the largest margin is the handle on the trade-off; nnunet_ima select chooses among these.
        """
        wanted, epsilon = self.settings.snapshots, self.settings.epsilon
        if not wanted or not epsilon or not len(self.margins):
            return
        # Margins are sums of steps, which rounding may leave a little short.
        largest, before = float(self.margins.all_margins().max()), self.snapshots[-1][1] if self.snapshots else 0.0
        if math.floor(largest / epsilon * wanted + 1e-4) > math.floor(before / epsilon * wanted + 1e-4):
            self.snapshots.append((self.current_epoch, largest))
            self.save_weights(self._snapshot_file(self.current_epoch))

    def _snapshot_file(self, epoch: int) -> Path:
        return Path(self.output_folder) / SNAPSHOTS.replace("*", f"{epoch:04d}")

    def method_state(self) -> dict[str, Any]:
        """The margins, their histograms, and the snapshots so far."""
        snapshots = [list(snapshot) for snapshot in self.snapshots]
        return {"margins": self.margins.state_dict(), "histograms": self.histograms, "snapshots": snapshots}

    def described(self) -> dict[str, Any]:
        """Also the largest margin so far."""
        margins = self.margins.all_margins()
        return {**super().described(), "largest_margin": float(margins.max()) if len(margins) else None}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the margins of a checkpoint."""
        self.margins.load_state_dict(state["margins"])
        self.histograms = [list(histogram) for histogram in state["histograms"]]
        self.snapshots = [(int(epoch), float(largest)) for epoch, largest in state.get("snapshots", [])]
        self.print_to_log_file(f"IMA continues with the margins of {len(self.margins)} samples.")
