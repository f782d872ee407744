"""What all adversarial trainings share: settings, sample identity, per-sample state, the step, and the log."""

from __future__ import annotations

import json
import math
import pickle
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_ima import __version__
from nnunet_ima.attack_losses import LossFunction
from nnunet_ima.attack_strength import LEAST_STRENGTH, attack_strength
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.checkpoints import safe_load, started_from_unknown, training_cases
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError, is_out_of_memory
from nnunet_ima.files import atomic_path, remove_leftovers, sha256_of, write_text
from nnunet_ima.fixed_patches import FixedPatches, fixed_patches
from nnunet_ima.gradient_error import GradientError, gradient_error
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, SegmentationLoss, first
from nnunet_ima.lp import random_in_ball
from nnunet_ima.margins import SampleId
from nnunet_ima.precision import Autocast, faster_autocast, precision_of, training_autocast, use_exact_convolutions
from nnunet_ima.primitives import keep_primitives
from nnunet_ima.provenance import exported_from
from nnunet_ima.robust_dice import RobustDice
from nnunet_ima.settings import KEY, LENGTHS, SHARED, Configured, Origin, Plan, Settings, configure, validate
from nnunet_ima.step_memory import StepMemory, name_of_gpu
from nnunet_ima.threads import use_threads_as_told
from nnunet_ima.threat import ThreatModel, freeze_channels, freeze_voxels, image_range
from nnunet_ima.tile_loader import TileDataLoader
from nnunet_ima.tiles import count_tiles
from nnunet_ima.training_log import AdversarialLogger, Panel

T = TypeVar("T")

ROBUST_PANEL = Panel("Dice", {"mean_fg_dice": "pseudo Dice", "robust_dice": "the same under PGD-10, fixed patches"})


@dataclass(frozen=True)
class Batch:
    """What nnU-Net's loader gives, on the training's device.

    Attributes:
        images: (B, C, *spatial).
        targets: nnU-Net's; a list with deep supervision.
        samples: identity of each.
        coordinates: (B, 3, *spatial) on the CPU, from where in its case each voxel was taken; None unless
            :attr:`nnUNetTrainerAdversarial.loader_class` gives them.
    """

    images: Tensor
    targets: Outputs
    samples: Sequence[SampleId]
    coordinates: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a method makes of one batch.

    Attributes:
        loss: scalar, to be minimised.
        counts: named numbers that add up over steps and ranks; :meth:`nnUNetTrainerAdversarial.epoch_log` turns their
            sums into the epoch's log.
    """

    loss: Tensor
    counts: Mapping[str, float]


class nnUNetTrainerAdversarial(nnUNetTrainer):
    """nnU-Net's trainer with another training step; a method overrides the abstract ones of the last section.

    Planning, augmentation, network, schedule, loss, validation and checkpoints stay nnU-Net's. Not for use itself.
    """

    panels: ClassVar[Sequence[Panel]] = ()
    # Settings that the method reads beside the shared ones, and its own defaults.
    reads: ClassVar[Collection[str]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    loader_class: ClassVar[type[TileDataLoader]] = TileDataLoader
    # Of how many sizes the passes of the inner attack are: 1 if it always attacks the whole batch.
    attack_sizes: ClassVar[int] = 1
    # What a variant changes about nnU-Net's length and learning rate; the user's settings go before it.
    lengths: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature)
    ) -> None:
        with _exit_with_sentence():
            if type(self).adversarial_step is nnUNetTrainerAdversarial.adversarial_step:
                raise UserError(f"{type(self).__name__} is only the base of trainers; use -tr nnUNetTrainerIMA.")
            self.overrides = _read_overrides(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        use_threads_as_told(device)
        keep_primitives(device)
        for name, value in {**self.lengths, **self.overrides}.items():
            if name in LENGTHS:
                setattr(self, name, value)
        self.save_every = self.overrides.get("save_every", Settings.save_every)
        measured = (ROBUST_PANEL,) if "robust_every" in self.reads else ()
        self.all_panels = (*self.panels, *measured)
        self.logger.local_logger = AdversarialLogger(self.all_panels)
        # What is in force; put together in on_train_start, when the training cases are known.
        self.device: torch.device
        self.configured: Configured
        self.settings: Settings
        self.criterion: DiceCriterion
        self.sample_loss: SegmentationLoss
        self._resumed_from: str | None = None
        self._saved: Mapping[str, Any] | None = None
        # Highest geometric mean of pseudo Dice and robust Dice so far.
        self.best_robust: float | None = None
        self._robust_dice: RobustDice | None = None
        self._by_cpu: Any = None
        self.attack_autocast: Autocast = nullcontext
        # Whether attacks are in mixed precision; None before it was measured, and where none is faster.
        self._attacks_mixed: bool | None = None
        self._graphs: CudaGraphs | None = None
        self._refusal_told = False
        self._no_room = False
        # None before the first epoch on a GPU.
        self._memory: StepMemory | None = None
        # Whether it started with -pretrained_weights, of which nnU-Net tells a trainer nothing.
        self._unknown_start = False
        # Cases that the weights learned from before this training.
        self._learned_before: frozenset[str] = frozenset()

    # ---- settings and state

    @property
    def labels(self) -> Labels:
        """How nnU-Net's targets are to be read."""
        return Labels(self.label_manager.has_regions, self.label_manager.ignore_label)

    @property
    def image_channels(self) -> int:
        """Channels of the image, without the one-hot channels of a cascade; older datasets call them modalities."""
        return len(self.dataset_json.get("modality") or self.dataset_json["channel_names"])

    def on_train_start(self) -> None:
        """Start as nnU-Net does, then put settings and state together and say what they are."""
        with _exit_with_sentence():
            if self._resumed_from is not None and self._saved is None:
                raise UserError(
                    f"{self._resumed_from} holds no {type(self).__name__} state (it was written by stock nnU-Net or an "
                    f"older version), so the training cannot be continued with --c; start a new one from its weights "
                    f"with -pretrained_weights {self._resumed_from}."
                )
            if self.local_rank == 0:
                remove_leftovers(Path(self.output_folder))
            # Before the data is unpacked: a wrong file should not be found out after minutes.
            if self._resumed_from is None:
                self._begin_anew()
            super().on_train_start()
            use_exact_convolutions()
            self._configure()

    def _begin_anew(self) -> None:
        # What an earlier training left in this folder must not pass for this one's.
        if self.local_rank == 0:
            for name in ("checkpoint_best_robust.pth", "checkpoint_selected.pth"):
                (Path(self.output_folder) / name).unlink(missing_ok=True)
        start = self.overrides.get("start_from")
        # nnU-Net initialises before this call only to load -pretrained_weights.
        self._unknown_start = self.was_initialized and start is None
        if start is not None:
            self._start_from(Path(start))

    def _start_from(self, file: Path) -> None:
        """Take over a whole network. nnU-Net's ``-pretrained_weights`` leaves the output layers out."""
        if not self.was_initialized:
            self.initialize()
        if not file.is_file():
            raise UserError(f"The setting start_from names {file.absolute()}, which is no file; give a checkpoint.")
        checkpoint = safe_load(file)
        labels = checkpoint["init_args"].get("dataset_json", {}).get("labels")
        if labels != self.dataset_json["labels"]:
            raise UserError(
                f"{file} was trained with the labels {labels}, this dataset has {self.dataset_json['labels']}, so its "
                f"output layers mean something else; remove start_from and use -pretrained_weights {file}."
            )
        try:
            self.bare_network.load_state_dict(checkpoint["network_weights"])
        except RuntimeError as error:
            raise UserError(
                f"{file} holds another network than the plans describe, so the training cannot start from it "
                f"({_one_line(error)}); use plans with its architecture."
            ) from error
        self.print_to_log_file(f"All weights, those of the output layers included, are taken from {file}.")
        # Of an exported checkpoint, only the note beside the model says what it learned from before.
        fold = file.absolute().parent
        before = exported_from(fold.parent, fold.name.removeprefix("fold_"), sha256_of(file))
        self._unknown_start = started_from_unknown(checkpoint) or (before is not None and before.started_from_unknown)
        if checkpoint["init_args"].get("plans", {}).get("dataset_name") == self.plans_manager.dataset_name:
            splits = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
            known = json.loads(splits.read_text(encoding="utf-8")) if splits.is_file() else []
            self._learned_before = training_cases(checkpoint, known, self._all_cases())
            if before is not None and before.training_cases:
                self._learned_before = before.training_cases

    def _all_cases(self) -> list[str]:
        dataset_class = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        return list(dataset_class.get_identifiers(self.preprocessed_dataset_folder))

    def _configure(self) -> None:
        self.training_shapes = _shapes(_loader(self.dataloader_train)._data)
        samples = self.count_samples()
        self.configured = self._configured()
        self.settings = self.configured.settings
        self.criterion = DiceCriterion(self.settings.dice_threshold, self.settings.dice_reduction, self.labels)
        # nnU-Net's loss with one value a sample, with its deep-supervision weights.
        weights = getattr(self.loss, "weight_factors", None)
        self.sample_loss = SegmentationLoss(self.labels, None if weights is None else tuple(weights))
        self.generator = torch.Generator(self.device)
        self.generator.seed()
        self._fix_patches()
        self.start_method(samples)
        if self._saved is not None:
            self._learned_before = frozenset(self._saved.get("training_cases", ()))
            self.best_robust = self._saved.get("best_robust")
            self.load_method_state(self._saved["state"])
            self._take_up_precision(self._saved.get("attacks_mixed"), self._saved.get("attacks_mixed_in", "float16"))
            self._unknown_start = bool(self._saved.get("started_from_unknown"))
            memory = self._saved.get("memory")
            self._memory = None if memory is None else StepMemory.from_dict(memory)
        known = self._learned_before & self._cases_of(self.dataloader_val)
        if known and self.fold != "all":
            self.print_to_log_file(
                f"WARNING: {len(known)} validation cases of this fold were training cases of the network this training "
                f"started from; validation flatters it."
            )
        self.print_to_log_file(
            f"\n{type(self).__name__}: {samples} training samples in {len(self.training_shapes)} cases; settings:\n"
            f"{self.configured.describe()}\n",
            add_timestamp=False,
        )
        unread = [name for name in self.overrides if name not in self.configured.origins]
        if unread:
            self.print_to_log_file(f"Settings for other methods, of no effect here: {', '.join(unread)}.")
        if self.local_rank == 0:
            write_text(Path(self.output_folder) / "nnunet_ima_settings.json", json.dumps(self.described(), indent=2))

    def plan(self) -> Plan:
        """What self-configuration needs to know."""
        return Plan(
            dataset=self.plans_manager.dataset_name,
            patch_size=tuple(self.configuration_manager.patch_size),
            channels=self.image_channels,
            num_epochs=self.num_epochs,
            num_iterations_per_epoch=self.num_iterations_per_epoch,
            batch_size=self.configuration_manager.batch_size,
        )

    def preview(self) -> tuple[Configured, Plan, int]:
        """What a training would use, without starting one: settings, plan, number of training samples."""
        # Of a cascade only the shapes are needed, not what the first stage found.
        self.folder_with_segs_from_previous_stage = None
        training, _ = self.get_tr_and_val_datasets()
        self.training_shapes = _shapes(training)
        return self._configured(), self.plan(), self.count_samples()

    def count_samples(self) -> int:
        """Training samples: tiles of all training cases."""
        patch_size = self.configuration_manager.patch_size
        return sum(count_tiles(shape, patch_size) for shape in self.training_shapes.values())

    def _configured(self) -> Configured:
        configured = configure(self.overrides, self.plan(), self.count_samples(), (*SHARED, *self.reads), self.defaults)
        # What is said to be in force is: a length that was left to nnU-Net is nnU-Net's.
        settings = replace(configured.settings, **{name: getattr(self, name) for name in LENGTHS})
        by_name: dict[str, Origin] = {name: "trainer" for name in self.lengths if name not in self.overrides}
        return Configured(settings, {**configured.origins, **by_name})

    def described(self) -> dict[str, Any]:
        """What checkpoints and ``nnunet_ima_settings.json`` say of the training, beside the method's state."""
        return {
            "trainer": type(self).__name__,
            "nnunet_ima": __version__,
            "settings": self.configured.in_force,
            "origins": dict(self.configured.origins),
            "best_robust": self.best_robust,
            "started_from_unknown": self._unknown_start,
            # All that the weights are known to have learned from, so that an evaluation knows.
            "training_cases": sorted(self._learned_before | self._cases_of(self.dataloader_train)),
        }

    def on_train_end(self) -> None:
        """As nnU-Net; CUDA graphs hold on to memory, which its final validation can use."""
        super().on_train_end()
        self._graphs = None
        empty_cache(self.device)

    # ---- measured on fixed patches: precision, robust Dice

    def _fix_patches(self) -> None:
        settings = self.settings
        self._patches: FixedPatches | None = None
        wanted = settings.robust_every or self._faster_autocast() is not nullcontext
        # Without perturbation there is nothing to measure.
        if "robust_every" not in self.configured.origins or not settings.epsilon or not wanted:
            return
        loader = _loader(self.dataloader_val)
        patches = fixed_patches(loader, settings.robust_patches, self.label_manager.ignore_label)
        if not len(patches.images):
            self.print_to_log_file(
                "No validation case holds foreground, so there is no robust Dice, and attacks run in single precision."
            )
            return
        self._patches = FixedPatches(
            patches.images.to(self.device), self._on_device(patches.targets), patches.outside.to(self.device)
        )
        if settings.robust_every:
            self._start_robust_dice(self._patches)

    def _start_robust_dice(self, patches: FixedPatches) -> None:
        self._robust_dice = RobustDice(
            images=patches.images,
            targets=first(patches.targets),
            threat=self._robust_threat(patches),
            criterion=self.criterion,
            # On a GPU it may have to run in single precision, which takes twice the memory.
            batch_size=max(1, self.batch_size if self.device.type == "cpu" else self.batch_size // 2),
        )

    def _robust_threat(self, patches: FixedPatches) -> ThreatModel:
        epsilon = self.settings.robust_epsilon
        assert epsilon is not None
        radius = torch.full((len(patches.images),), epsilon, device=self.device)
        return self.patch_threat(patches.images, radius, patches.outside)

    def on_train_epoch_start(self) -> None:
        """Start as nnU-Net does, then choose the precision of the epoch's attacks."""
        super().on_train_epoch_start()
        with _exit_with_sentence():
            self._choose_precision()

    def _faster_autocast(self) -> Autocast:
        """The precision that attacks may be in, if it finds as much: single if nothing else is faster, or wanted."""
        return nullcontext if self.settings.attack_precision == "single" else faster_autocast(self.device)

    def _choose_precision(self) -> None:
        """Attack in the precision that is faster while that finds what single precision finds.

        Measured with the inner attack's own steps on fixed validation patches, as often as the robust Dice is.
        """
        mixed = self._faster_autocast()
        every = self.settings.robust_every or Settings.robust_every
        if mixed is nullcontext or (self._attacks_mixed is not None and self.current_epoch % every):
            self._keep_graphs()
            return
        before, self.attack_autocast = self.attack_autocast, nullcontext
        self._attacks_mixed = False
        if self._patches is not None:
            measured = self.computed_by_all(lambda: self._measured(mixed))
            strength, error = min(strength for strength, _ in measured), measured[0][1]
            self._attacks_mixed = strength >= LEAST_STRENGTH
            if self._attacks_mixed:
                self.attack_autocast = mixed
            self.print_to_log_file(
                f"PGD in mixed precision ({precision_of(mixed, self.device)}) finds {strength:.2%} of what it finds in "
                f"single precision (gradients are off by {error.relative:.2%} at most, {error.zeros:.2%} of voxels "
                f"lost); attacks run in {'mixed' if self._attacks_mixed else 'single'} precision."
            )
        if (before is nullcontext) == (self.attack_autocast is nullcontext):
            self.attack_autocast = before
        else:
            self._graphs = None
        self._keep_graphs()

    def _take_up_precision(self, attacks_mixed: bool | None, mixed_in: str) -> None:
        """Go on in the precision that a checkpoint's training attacked in, until the next measurement is due.

        A new measurement may come out otherwise. None, of an older checkpoint or one from where only single precision
        was of use, or a measurement of another type than the one that is faster here: measure at once.
        """
        mixed = self._faster_autocast()
        if mixed is nullcontext or attacks_mixed is None or mixed_in != precision_of(mixed, self.device):
            return
        self._attacks_mixed = bool(attacks_mixed)
        self.attack_autocast = mixed if attacks_mixed else nullcontext

    def _measured(self, mixed: Autocast) -> tuple[float, GradientError]:
        """Strength of an attack in mixed precision, and by how much its gradients are off."""
        assert self._patches is not None
        strength = self._strength(mixed)
        patches = self._patches
        return strength, gradient_error(self.bare_network, patches.images, patches.targets, self.sample_loss, mixed)

    def _strength(self, mixed: Autocast) -> float:
        """What PGD with the inner attack's steps finds at ε/3 in mixed precision, as a share of single precision's."""
        assert self._patches is not None
        images, targets, settings = self._patches.images, self._patches.targets, self.settings
        threat = self._robust_threat(self._patches)
        noise = random_in_ball(images, threat.norm, threat.radius(images), self.generator, threat.perturbable(images))
        start = threat.project(images + noise, images)
        half, steps = max(1, self.batch_size // 2), settings.steps
        with undisturbed(self.bare_network):
            oracle, exact = (
                Oracle(self.bare_network, targets, self.sample_loss, None, chunk=half, autocast=one)
                for one in (mixed, nullcontext)
            )
            return attack_strength(oracle, exact, threat, images, start, steps, settings.step_factor / steps)

    def _keep_graphs(self) -> None:
        """Attack passes as CUDA graphs, of the sizes that the method needs, once it is known that there is room.

        They hold on to memory, at most as much as the first epoch needed, which the training pass cannot use. No fewer
        steps tell how much that is: IMA's first ones may perturb nothing. A training that goes on has it from its
        checkpoint, if that is of the same GPU.
        """
        if self.device.type != "cuda" or self._graphs is not None or self._no_room:
            return
        if self._memory is None or self._memory.gpu != name_of_gpu(self.device):
            return
        needed = self._memory.needed
        # What this process has reserved is the training's, too.
        room = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        if room < needed:
            self._no_room = True
            self.print_to_log_file(
                f"Attack passes run without CUDA graphs, which is slower: with them the training may need "
                f"{needed / 2**30:.1f} GiB, and there are {room / 2**30:.1f} GiB for it."
            )
            return
        self._graphs = CudaGraphs(self.attack_chunk or self.batch_size, self.attack_sizes)

    def note_memory(self) -> None:
        """Note what the steps so far took of the GPU's memory; on a CPU do nothing."""
        if self.device.type != "cuda":
            return
        gpu, reserved = name_of_gpu(self.device), torch.cuda.max_memory_reserved(self.device)
        if self._memory is None or self._memory.gpu != gpu:
            self._memory = StepMemory(gpu, reserved, reserved)
        self._memory = self._memory.after(reserved)

    def attack_oracle(self, targets: Outputs, loss: LossFunction, criterion: DiceCriterion | None) -> Oracle:
        """What an inner attack asks the network, in the precision and in the passes that the epoch attacks with.

        Args:
            targets: of the batch, or whatever ``loss`` compares outputs with.
            loss: what is climbed, one value a sample.
            criterion: gives the Dice; None if nobody asks for it.
        """
        return Oracle(
            self.attacked_network,
            targets,
            loss,
            criterion,
            chunk=self.attack_chunk,
            autocast=self.attack_autocast,
            graphs=self._graphs,
            checked=True,
        )

    @property
    def attacked_network(self) -> nn.Module:
        """The network of attack passes: compiled as nnU-Net compiled it, where all passes have one size."""
        one_size = self._graphs is not None and self._graphs.refused is None and self.attack_sizes == 1
        return self.network if one_size and not self.is_ddp else self.bare_network

    @property
    def attack_chunk(self) -> int | None:
        """Samples that an attack pass takes at once; None for all.

        In single precision under a training in mixed precision half of them: they take twice the memory.
        """
        single = self.attack_autocast is nullcontext and training_autocast(self.device) is not nullcontext
        return max(1, self.batch_size // 2) if single else None

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log as nnU-Net does, then the robust Dice, and keep the best checkpoint by the paper's criterion.

        That is the geometric mean of the two Dice (final paper, B and C). NaN is logged where nothing was measured.
        """
        super().on_validation_epoch_end(val_outputs)
        if "robust_every" not in self.configured.origins:
            return
        robust = float("nan")
        due = self.settings.robust_every and (self.current_epoch + 1) % self.settings.robust_every == 0
        if self._robust_dice is not None and (due or self.current_epoch == self.num_epochs - 1):
            try:
                robust = self._robust_dice(self.bare_network, self.attack_autocast)
            except UserError as error:
                self.print_to_log_file(f"No robust Dice: {error}")
        self.logger.log("robust_dice", robust, self.current_epoch)
        if math.isnan(robust):
            return
        clean = float(self.logger.get_value("mean_fg_dice", step=-1))
        score = math.sqrt(clean * robust)
        if math.isnan(score):
            return
        self.print_to_log_file(f"Robust Dice {robust:.4f}, geometric mean with the pseudo Dice {score:.4f}")
        if self.best_robust is None or score > self.best_robust:
            self.best_robust = score
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_best_robust.pth"))

    # ---- data: which sample is a patch?

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders; the training one also says which tile of its case a patch shows."""
        train, validation = super().get_dataloaders()
        loader = _loader(train)
        if type(loader) is not nnUNetDataLoader:
            raise NotImplementedError(
                f"{type(self).__name__} needs nnU-Net's own training loader to know where a patch was taken from, "
                f"but found {type(loader).__name__}."
            )
        # Taking over the object that nnU-Net has set up, rather than building a second one, keeps whatever this or a
        # later version of nnU-Net passes to it. Workers that already run hold the old class, so they start again.
        loader.__class__ = self.loader_class
        if isinstance(train, NonDetMultiThreadedAugmenter):
            train.restart()
        return train, validation

    @staticmethod
    def _cases_of(augmenter: Any) -> frozenset[str]:
        # nnU-Net's splits may hold numpy's strings, which a checkpoint could not hold safely.
        return frozenset(map(str, _loader(augmenter)._data.identifiers))

    def samples_of(self, batch: Mapping[str, Any]) -> list[SampleId]:
        """Identity of each sample of a batch: its case and the number of its tile."""
        return [(str(case), int(tile)) for case, tile in zip(batch["keys"], batch["tiles"], strict=True)]

    def patch_threat(self, images: Tensor, epsilon: Tensor, background: Tensor | None = None) -> ThreatModel:
        """Threat model of patches (B, C, *spatial): radius (B,), range the patch's own in each channel.

        The one-hot channels that a cascade appends are no image and stay as they are. So does the background where
        the plans have ``use_mask_for_norm``: in a scan it is empty.

        Args:
            images: augmented patches, or others, whose background is then to be given.
            epsilon: radius of each.
            background: (B, 1, *spatial) of bool; None for augmented patches, which show theirs.
        """
        low, high = image_range(images)
        threat = ThreatModel(self.settings.norm, epsilon, low, high)
        threat = freeze_channels(threat, images, range(self.image_channels, images.shape[1]))
        masked = [channel for channel, mask in enumerate(self.configuration_manager.use_mask_for_norm) if mask]
        if not masked:
            return threat
        if background is None:
            # nnU-Net's MaskImageTransform sets it to 0 after all that changes intensities; next to nothing else is 0.
            background = (images[:, masked] == 0).all(1, keepdim=True)
        return freeze_voxels(threat, images, background)

    # ---- the step

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step: the method's loss, then nnU-Net's backward pass, clipping and update.

        Where the memory is not enough beside CUDA graphs, these go, and the step is taken once more; what a method
        keeps of a sample, as IMA its margin, may then move twice for this batch.
        """
        try:
            return self._step(batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            # Other ranks would wait for this one in the middle of a step.
            if not is_out_of_memory(error) or self._graphs is None or self.is_ddp:
                raise
        # Not in the handler: until it ends, the error holds on to all that the step had in memory.
        self._give_up_graphs()
        return self._step(batch)

    def _give_up_graphs(self) -> None:
        """Attack without CUDA graphs from now on, also when the training is continued."""
        self._graphs, self._no_room = None, True
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self._memory is not None:
            # More than there is: that is what a step with graphs would have needed.
            self._memory = self._memory.after(torch.cuda.get_device_properties(self.device).total_memory + 1)
        self.print_to_log_file(
            "The GPU's memory was not enough for a step beside CUDA graphs: attack passes run without them from now "
            "on, which is slower."
        )

    def _step(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch["data"].to(self.device, non_blocking=True)
        with _exit_with_sentence():
            _check_finite(images, batch["keys"])
        targets = self._on_device(batch["target"])
        self.optimizer.zero_grad(set_to_none=True)
        with _exit_with_sentence():
            step = self.adversarial_step(Batch(images, targets, self.samples_of(batch), batch.get("coordinates")))
        if self.grad_scaler is not None:
            torch.autograd.backward(self.grad_scaler.scale(step.loss))
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            torch.autograd.backward(step.loss)
            nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.optimizer.step()
        return {"loss": step.loss.detach().cpu().numpy(), "counts": [dict(step.counts)]}

    def _on_device(self, targets: Outputs) -> Outputs:
        if isinstance(targets, Tensor):
            return targets.to(self.device, non_blocking=True)
        return [target.to(self.device, non_blocking=True) for target in targets]

    def forward(self, images: Tensor) -> Outputs:
        """A training pass, in nnU-Net's precision: (B, C, *spatial) to logits, a list with deep supervision."""
        with training_autocast(self.device)():
            outputs: Outputs = self.network(images)
        return outputs

    def nnunet_loss(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """nnU-Net's own training loss (a scalar, ``batch_dice`` as planned)."""
        with training_autocast(self.device)():
            loss: Tensor = self.loss(outputs, targets)
        return loss

    @property
    def bare_network(self) -> nn.Module:
        """The network without its DDP and ``torch.compile`` wrappers, for attack passes.

        They need no gradient synchronisation, and their batch changes with every pass: compiled, each size and mode
        would be compiled anew until torch gives up.
        """
        network: nn.Module = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    # ---- the log

    def on_epoch_end(self) -> None:
        """As nnU-Net; ``progress.png`` is drawn once a minute at most, and after the last epoch."""
        logger = self.logger.local_logger
        if isinstance(logger, AdversarialLogger):
            logger.draw_at_once = self.current_epoch == self.num_epochs - 1
        super().on_epoch_end()

    @property
    def pictures_drawn(self) -> int:
        """How often ``progress.png`` was drawn so far."""
        logger = self.logger.local_logger
        return logger.drawn if isinstance(logger, AdversarialLogger) else 0

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log as nnU-Net does, then the method's own values, over all ranks."""
        self.note_memory()
        counts = _sums(self.from_all_ranks(_sums([c for output in train_outputs for c in output.pop("counts")])))
        if self._graphs is not None and self._graphs.refused is not None and not self._refusal_told:
            self._refusal_told = True
            self.print_to_log_file(f"Attack passes run without CUDA graphs, which is slower: {self._graphs.refused}")
        super().on_train_epoch_end(train_outputs)
        values = self.epoch_log(counts)
        for key, value in values.items():
            self.logger.log(key, value, self.current_epoch)
        if values:
            self.print_to_log_file(", ".join(f"{key} {value:.4g}" for key, value in values.items()))

    def from_all_ranks(self, value: T) -> list[T]:
        """What each rank holds, in their order; without DDP this one's alone."""
        if not self.is_ddp:
            return [value]
        if self._by_cpu is None:
            # nnU-Net's group sends by GPU, and would copy whatever is gathered into its memory first.
            self._by_cpu = dist.new_group(backend="gloo")
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value, group=self._by_cpu)
        return gathered

    def computed_by_all(self, compute: Callable[[], T]) -> list[T]:
        """What each rank computes, in their order. Where one fails all do, instead of waiting for it forever.

        Args:
            compute: asks nothing of the other ranks.

        Raises:
            Exception: this rank's own, if it failed here.
            UserError: another rank failed; its error is named.
        """
        failure: Exception | None = None
        mine: tuple[T | None, str | None]
        try:
            mine = compute(), None
        except Exception as error:
            if not self.is_ddp:
                raise
            failure, mine = error, (None, f"{type(error).__name__}: {_one_line(error)}")
        everyone = self.from_all_ranks(mine)
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(everyone):
            if reason is not None:
                raise UserError(f"Rank {rank} failed ({reason}), so all ranks end; see its own message.")
        return cast("list[T]", [value for value, _ in everyone])

    # ---- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, whole or not at all, with the method's settings and state inside ``init_args``."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        measured: dict[str, Any] = {"attacks_mixed": self._attacks_mixed}
        if self._attacks_mixed is not None:
            measured["attacks_mixed_in"] = precision_of(self._faster_autocast(), self.device)
        if self._memory is not None:
            measured["memory"] = self._memory.as_dict()
        self.my_init_kwargs[KEY] = {**self.described(), **measured, "state": self.method_state()}
        try:
            self._write(Path(filename), super().save_checkpoint)
        finally:
            del self.my_init_kwargs[KEY]

    def save_weights(self, file: Path) -> None:
        """Only what prediction and evaluation need, in nnU-Net's format; nothing can be continued from it."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        content = {
            "network_weights": self.bare_network.state_dict(),
            "init_args": {**self.my_init_kwargs, KEY: self.described()},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "current_epoch": self.current_epoch + 1,
        }
        self._write(file, lambda temporary: torch.save(content, temporary))

    def _write(self, file: Path, write: Callable[[str], None]) -> None:
        try:
            with atomic_path(file) as temporary:
                write(str(temporary))
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            raise SystemExit(
                f"The checkpoint {file} could not be written ({_one_line(error)}); an older one is kept: make room "
                f"or the folder writable, then continue with --c."
            ) from error

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """nnU-Net's, keeping the method's state for :meth:`on_train_start`.

        It is read into the CPU's memory, as TE's averages may be more than the GPU's; from there nnU-Net copies the
        rest to the GPU.
        """
        device = self.device
        try:
            if not self.was_initialized:
                self.initialize()
            self.device = torch.device("cpu")
            super().load_checkpoint(filename_or_checkpoint)
        except torch.OutOfMemoryError:
            raise
        except _UNREADABLE as error:
            raise SystemExit(
                f"The checkpoint {filename_or_checkpoint} cannot be used: it is damaged, or the plans describe another "
                f"network than it holds ({_one_line(error)}); restore the plans, or move it away to continue from an "
                f"older one."
            ) from error
        finally:
            self.device = device
        self._resumed_from = str(filename_or_checkpoint)
        saved = self.my_init_kwargs.pop(KEY, None)
        self._saved = saved if isinstance(saved, dict) and "state" in saved else None
        if self._saved is not None and self._saved.get("trainer") != type(self).__name__:
            self._saved = None
        if isinstance(self.logger.local_logger, AdversarialLogger):
            for panel in self.all_panels:
                for key in panel.curves:
                    self.logger.local_logger.my_fantastic_logging.setdefault(key, [])

    # ---- what a method is

    def start_method(self, samples: int) -> None:
        """Called once the settings are known, before the first step; ``samples`` is the number of training samples."""

    @abstractmethod
    def adversarial_step(self, batch: Batch) -> Step:
        """Loss of one batch."""
        raise NotImplementedError("each method has its own step")

    def epoch_log(self, counts: Mapping[str, float]) -> Mapping[str, float]:
        """Values to log for an epoch (every key of :attr:`panels`), from the sums of its steps' counts.

        Unless overridden: means over steps, and ``passes_per_sample`` from ``forward_passes``.
        """
        means = {**counts, "passes_per_sample": counts["forward_passes"] / counts["samples"] * counts["steps"]}
        return {key: means[key] / counts["steps"] for panel in self.panels for key in panel.curves}

    def method_state(self) -> dict[str, Any]:
        """State to keep in checkpoints: plain numbers, strings and tensors."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`method_state` gave."""


# What unpickling bytes that are no checkpoint, or only a part of one, may raise.
_UNREADABLE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError, pickle.UnpicklingError
)  # fmt: skip


def _read_overrides(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    plans_manager = PlansManager(dict(plans))
    if configuration not in plans_manager.available_configurations:
        raise UserError(
            f"The plans {plans.get('plans_name')} have no configuration {configuration!r}; "
            f"they have {', '.join(plans_manager.available_configurations)}."
        )
    table = plans_manager.get_configuration(configuration).configuration.get(KEY, {})
    return validate(table, f'"{KEY}" in configuration {configuration!r} of {plans.get("plans_name")}.json')


@contextmanager
def _exit_with_sentence() -> Iterator[None]:
    """nnUNetv2_train would print a traceback; a user's mistake ends with its one sentence and exit status 1."""
    try:
        yield
    except UserError as error:
        raise SystemExit(str(error)) from None


def _loader(augmenter: Any) -> Any:
    return augmenter.data_loader if isinstance(augmenter, SingleThreadedAugmenter) else augmenter.generator


def _shapes(dataset: Any) -> dict[str, tuple[int, ...]]:
    return {str(case): tuple(dataset.load_case(case)[0].shape[1:]) for case in dataset.identifiers}


def _check_finite(images: Tensor, cases: Sequence[str]) -> None:
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        broken = sorted({str(case) for case, good in zip(cases, finite.tolist(), strict=True) if not good})
        raise UserError(
            f"The preprocessed images of {', '.join(broken)} hold NaN or infinite intensities; repair the scans and "
            f"run nnUNetv2_plan_and_preprocess again."
        )


def _sums(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.sum([count[key] for count in counts])) for key in counts[0]} if counts else {}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
