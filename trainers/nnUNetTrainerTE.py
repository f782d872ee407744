"""TE, temporal ensembling: Dong et al. 2022, https://arxiv.org/abs/2106.01606, Eq. 5, for segmentation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor
from torch import distributed as dist

from nnunet_ima.attacks.oracle import finite_logits, undisturbed
from nnunet_ima.averages import PredictionAverages, checkpoint_bytes, memory_bytes
from nnunet_ima.coordinate_loader import CoordinateDataLoader
from nnunet_ima.divergence import as_list, probabilities_of, squared_distance
from nnunet_ima.errors import UserError
from nnunet_ima.losses import Outputs, SegmentationLoss, first
from nnunet_ima.memory_limit import memory_limit
from nnunet_ima.settings import PERTURBATION
from nnunet_ima.tile_loader import TileDataLoader
from nnunet_ima.trainers.nnUNetTrainerAdversarial import Batch, Step
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.training_log import Panel

# Of this machine's memory, the share that the running averages may take.
MOST_MEMORY = 0.5
# Of the GPU's memory that is free when a training starts, the share that they may take there. Nothing but the network
# is in it then: the training's own passes, the optimizer, and CUDA graphs, which take as much again, are yet to come.
MOST_FREE_MEMORY = 0.25


def place_of_averages(needed: int, device: torch.device, free: int) -> torch.device:
    """Where averages of ``needed`` bytes are kept: where the training is, if they fit there, else on the CPU.

    Args:
        needed: bytes.
        device: of the training.
        free: bytes free there.
    """
    return device if device.type == "cuda" and needed <= MOST_FREE_MEMORY * free else torch.device("cpu")


class nnUNetTrainerTE(nnUNetTrainerSAT):
    """SAT, and a pull of the prediction on a perturbed sample towards the running average of past clean ones.

    The averages live in the coordinates of the cases, at full resolution; a patch reads and writes them through the
    crop, rotation, scaling and mirroring that nnU-Net's augmentation gave it.
    """

    reads: ClassVar[Collection[str]] = (*PERTURBATION, "te_momentum", "te_weight", "te_start", "te_end")
    loader_class: ClassVar[type[TileDataLoader]] = CoordinateDataLoader
    panels: ClassVar[Sequence[Panel]] = (
        Panel("loss", {"perturbed_losses": "perturbed", "pulls": "weighted pull to the average"}),
        Panel("weight", {"te_weights": "of the pull"}),
        Panel("share of samples", {"correct_share": "correct though perturbed"}),
        Panel("per sample", {"passes_per_sample": "forward passes a step"}),
    )

    def start_method(self, samples: int) -> None:  # noqa: ARG002 (nothing here depends on it)
        """No average yet."""
        heads, shapes = self.label_manager.num_segmentation_heads, self.training_shapes
        needed, saved = memory_bytes(shapes, heads), checkpoint_bytes(shapes, heads)
        # Each rank holds all of them; those on a GPU come into this memory, too, to be merged and saved.
        copies = dist.get_world_size() if self.is_ddp else 1
        memory = memory_limit()
        if copies * needed > MOST_MEMORY * memory:
            raise UserError(
                f"TE keeps an average prediction of every training case, {copies * needed / 2**30:.1f} GiB for these; "
                f"that is more than half of the {memory / 2**30:.1f} GiB of memory of this machine or job: train on "
                f"fewer cases, or with another method."
            )
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        device = place_of_averages(needed, self.device, free)
        self.averages = PredictionAverages(self.settings.te_momentum, shapes, heads, device)
        taken = f"up to {copies * needed / 2**20:.0f} MiB of memory"
        if device.type == "cuda":
            taken = f"{needed / 2**20:.0f} MiB of the GPU's memory, from now on"
        elif self.device.type == "cuda":
            taken += f", not of the GPU's, of which they would take more than {MOST_FREE_MEMORY:.0%} of what is free"
        self.print_to_log_file(f"TE's averages take {taken}; and up to {saved / 2**20:.0f} MiB in a checkpoint.")

    def adversarial_step(self, batch: Batch) -> Step:
        """Eq. 5: the loss and the pull at the inner maximum of both."""
        weight = self.pull_weight()
        if weight is None:
            perturbed, passes = self.perturb(batch, batch.targets, self.sample_loss)
            outputs = self.forward(perturbed)
            loss = self.nnunet_loss(outputs, batch.targets)
            return Step(loss, self.te_counts(outputs, batch, passes, loss, torch.zeros(()), 0.0))
        average, known = self._averaged(batch)
        pull = _Pull(self.labels.regions)
        # One weight a sample: as a tensor, so that a CUDA graph serves all epochs.
        weights = torch.full((len(average),), weight, device=average.device)
        reference = [*as_list(batch.targets), average, known, weights]
        perturbed, passes = self.perturb(batch, reference, _PulledLoss(self.sample_loss, pull))
        outputs = self.forward(perturbed)
        loss, pulled = self.nnunet_loss(outputs, batch.targets), weight * pull(outputs, average, known).mean()
        passes += len(batch.images)
        return Step(loss + pulled, self.te_counts(outputs, batch, passes, loss, pulled, weight))

    def pull_weight(self) -> float | None:
        """w · exp(−5 (1 − t)²), t from 0 to 1 between ``te_start`` and ``te_end``; None before: no averages yet."""
        settings, progress = self.settings, self.current_epoch / self.num_epochs
        if progress < settings.te_start:
            return None
        length = settings.te_end - settings.te_start
        grown = 1.0 if length == 0 else min((progress - settings.te_start) / length, 1.0)
        return settings.te_weight * math.exp(-5 * (1 - grown) ** 2)

    def _averaged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Take the clean predictions into the averages, then read these: (B, K, *patch) and where there are any."""
        assert batch.coordinates is not None
        with undisturbed(self.bare_network), torch.no_grad():
            logits = finite_logits(self.bare_network, batch.images, self.attack_autocast, len(batch.images))
        cases = [case for case, _ in batch.samples]
        predictions = probabilities_of(logits, self.labels.regions)
        average, known = self.averages.update_and_read(cases, batch.coordinates, predictions)
        return average.to(self.device), known.to(self.device) & self.labels.valid(first(batch.targets))

    def te_counts(
        self, outputs: Outputs, batch: Batch, passes: int, loss: Tensor, pull: Tensor, weight: float
    ) -> dict[str, float]:
        """For the log."""
        counts = self.counts(outputs, batch.targets, passes + len(batch.images), perturbed_losses=loss, pulls=pull)
        return {**counts, "te_weights": weight}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Bring the ranks' averages together, then log."""
        if self.is_ddp:
            # One case after the other: all at once, each rank would hold those of all ranks several times.
            for case in sorted(self.training_shapes):
                self.averages.merge(self.from_all_ranks(self.averages.changes([case])))
        super().on_train_epoch_end(train_outputs)

    def on_train_end(self) -> None:
        """As every training; then averages make room for nnU-Net's final validation, if they are on the GPU."""
        super().on_train_end()
        if self.averages.device.type != "cpu":
            del self.averages
            empty_cache(self.device)

    def method_state(self) -> dict[str, Any]:
        """The averages."""
        return {"averages": self.averages.state_dict()}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the averages of a checkpoint."""
        self.averages.load_state_dict(state["averages"])
        self.print_to_log_file(f"TE continues with the averages of {len(self.averages)} cases.")


@dataclass(frozen=True)
class _Pull:
    """Mean square of (prediction − average), at full resolution, over voxels that have an average."""

    regions: bool

    def __call__(self, outputs: Outputs, average: Tensor, known: Tensor) -> Tensor:
        """(B,)."""
        return squared_distance(probabilities_of(first(outputs), self.regions), average, known)


@dataclass(frozen=True)
class _PulledLoss:
    """What the inner attack climbs: loss + w · pull, (B,). Equal ones compute the same, as CUDA graphs ask for."""

    sample_loss: SegmentationLoss
    pull: _Pull

    def __call__(self, outputs: Outputs, reference: Outputs) -> Tensor:
        """Of ``reference``: targets, average, where known, w (B,)."""
        *targets, average, known, weights = as_list(reference)
        loss = self.sample_loss(outputs, targets if not isinstance(outputs, Tensor) else targets[0])
        return loss + weights * self.pull(outputs, average, known.bool())
