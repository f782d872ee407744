"""Load a trained nnU-Net model, of any trainer, without running code that a checkpoint brings along."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pydoc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ima.checkpoints import noted_settings, noted_training_cases, safe_load, started_from_unknown
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import find_trainer, nnunet_folder
from nnunet_ima.evaluation.normalisation import intensities_of
from nnunet_ima.files import read_json, sha256_of
from nnunet_ima.labels import Labels

Fold = int | str


@dataclass(frozen=True)
class TrainedModel:
    """A network and what nnU-Net needs to use it.

    Attributes:
        folder: the model folder, ``TRAINER__PLANS__CONFIGURATION``.
        fold: a number or ``all``.
        checkpoint: the file the weights come from.
        sha256: of that file.
        trainer: name of the trainer that wrote it.
        network: in evaluation mode, deep supervision off; (B, C, *patch) to logits (B, K, *patch).
        mirroring_axes: over which nnU-Net mirrors at inference, None for no mirroring.
        training_cases: that the weights are known to have learned from; empty if the checkpoint does not tell.
        started_from_unknown: whether it started with nnU-Net's ``-pretrained_weights``, whose cases nobody noted.
        margins: of an IMA training, quantiles of the margins after each epoch by name; else empty.
        training: settings that one of our trainers noted; else empty.
    """

    folder: Path
    fold: Fold
    checkpoint: Path
    sha256: str
    trainer: str
    network: nn.Module
    plans: PlansManager
    configuration_name: str
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]
    mirroring_axes: tuple[int, ...] | None
    training_cases: frozenset[str] = frozenset()
    started_from_unknown: bool = False
    margins: dict[str, list[float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def label_manager(self) -> LabelManager:
        """nnU-Net's reading of the labels."""
        return self.plans.get_label_manager(self.dataset_json)

    @property
    def labels(self) -> Labels:
        """Ours."""
        manager = self.label_manager
        return Labels(manager.has_regions, manager.ignore_label)

    @property
    def foreground(self) -> list[int | tuple[int, ...]]:
        """Foreground classes or regions, in the order of the network's foreground outputs."""
        manager = self.label_manager
        return list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)

    @property
    def channels(self) -> int:
        """Image channels, without the one-hot channels of a cascade."""
        return len(self.dataset_json.get("modality") or self.dataset_json["channel_names"])

    def describe(self) -> dict[str, Any]:
        """For reports."""
        return {
            "dataset": self.plans.dataset_name,
            "trainer": self.trainer,
            "plans": self.plans.plans_name,
            "configuration": self.configuration_name,
            "fold": self.fold,
            "checkpoint": self.checkpoint.name,
            "sha256": self.sha256,
        }


def find_model_folder(dataset: str, configuration: str, trainer: str, plans: str) -> Path:
    """The folder in which nnU-Net keeps a trained model.

    Raises:
        UserError: the dataset is unknown, or was not trained in that way.
    """
    results = nnunet_folder("nnUNet_results")
    try:
        name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError):
        raise UserError(f"There is no dataset {dataset!r}; give its number or full name, as nnU-Net does.") from None
    if not (results / name).is_dir():
        raise UserError(f"No model was trained on {name}: {results} holds no folder of that name.")
    folder: Path = results / name / f"{trainer}__{plans}__{configuration}"
    if not folder.is_dir():
        trained = ", ".join(sorted(entry.name for entry in (results / name).iterdir() if "__" in entry.name)) or "none"
        raise UserError(
            f"{name} has no model of trainer {trainer}, plans {plans} and configuration {configuration}; "
            f"trained are: {trained}."
        )
    return folder


def load_model(folder: Path, fold: Fold, checkpoint_name: str, device: torch.device) -> TrainedModel:
    """Load the network of one fold.

    Raises:
        UserError: the folder is no model folder, the fold or checkpoint is missing, damaged, or asks for unknown code.
    """
    if not folder.is_dir():
        raise UserError(f"The model folder {folder} does not exist; give the folder TRAINER__PLANS__CONFIGURATION.")
    plans_json, dataset_json = (read_json(folder / name) for name in ("plans.json", "dataset.json"))
    file = _checkpoint_file(folder, fold, checkpoint_name)
    checkpoint = safe_load(file)
    with _sentences_for(file):
        plans = PlansManager(plans_json)
        configuration_name = str(checkpoint["init_args"]["configuration"])
        configuration = plans.get_configuration(configuration_name)
        trainer = str(checkpoint["trainer_name"])
        network = _build_network(trainer, plans, configuration, dataset_json)
        network.load_state_dict(checkpoint["network_weights"])
        axes = checkpoint.get("inference_allowed_mirroring_axes")
        mirroring_axes = None if axes is None else tuple(int(axis) for axis in axes)
        _check_fields(plans, configuration, dataset_json)
        _try_shapes(network, determine_num_input_channels(plans, configuration, dataset_json), configuration.patch_size)
    return TrainedModel(
        folder=folder,
        fold=fold,
        checkpoint=file,
        sha256=sha256_of(file),
        trainer=trainer,
        network=network.to(device).eval(),
        plans=plans,
        configuration_name=configuration_name,
        configuration=configuration,
        dataset_json=dataset_json,
        mirroring_axes=mirroring_axes,
        training_cases=noted_training_cases(checkpoint) or frozenset(),
        started_from_unknown=started_from_unknown(checkpoint),
        margins=_logged_margins(checkpoint),
        training=noted_settings(checkpoint),
    )


def _logged_margins(checkpoint: Mapping[str, Any]) -> dict[str, list[float]]:
    """What our trainer wrote into nnU-Net's log; a report can do without."""
    logging = checkpoint.get("logging")
    if not isinstance(logging, Mapping):
        return {}
    curves = {name: logging.get(name) for name in ("margin_10", "margin_50", "margin_90")}
    numbers = {
        name: [float(value) for value in curve if isinstance(value, (int, float))]
        for name, curve in curves.items()
        if isinstance(curve, list)
    }
    return {name: curve for name, curve in numbers.items() if curve}


def _checkpoint_file(folder: Path, fold: Fold, checkpoint_name: str) -> Path:
    if not (folder / f"fold_{fold}").is_dir():
        trained = ", ".join(sorted(entry.name[5:] for entry in folder.glob("fold_*"))) or "none"
        raise UserError(f"{folder.name} has no fold {fold}; trained folds are: {trained}.")
    file = folder / f"fold_{fold}" / checkpoint_name
    if not file.is_file():
        there = ", ".join(sorted(entry.name for entry in file.parent.glob("*.pth"))) or "none"
        raise UserError(f"Fold {fold} of {folder.name} has no {checkpoint_name}; its checkpoints are: {there}.")
    return file


def _build_network(
    trainer: str, plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping[str, Any]
) -> nn.Module:
    trainer_class = find_trainer(trainer)
    _refuse_foreign_code(configuration)
    channels = determine_num_input_channels(plans, configuration, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    build = trainer_class.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        network: nn.Module = build(plans, configuration, channels, heads, enable_deep_supervision=False)
    else:  # the signature of trainers written for nnU-Net before 2.7, which it still supports
        network = build(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            heads,
            enable_deep_supervision=False,
        )
    return network


def _check_fields(plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping[str, Any]) -> None:
    """Look now at what is needed later, where a field that is missing or of the wrong kind would be a traceback."""
    patch_size = list(configuration.patch_size)
    if len(patch_size) not in (2, 3) or not all(isinstance(size, int) and size > 0 for size in patch_size):
        raise ValueError(f"patch_size is {patch_size}")
    batch_size = configuration.batch_size
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}")
    masks = configuration.use_mask_for_norm
    if not isinstance(masks, list) or not all(isinstance(mask, bool) for mask in masks):
        raise TypeError(f"use_mask_for_norm is {masks!r}")
    schemes = configuration.normalization_schemes
    if not isinstance(schemes, list) or not all(isinstance(scheme, str) for scheme in schemes):
        raise TypeError(f"normalization_schemes is {schemes!r}")
    if len(schemes) != len(masks):
        raise ValueError(f"normalization_schemes has {len(schemes)} entries and use_mask_for_norm {len(masks)}")
    intensities_of(plans, schemes)
    names = {
        "dataset_name": plans.dataset_name,
        "plans_name": plans.plans_name,
        "data_identifier": configuration.data_identifier,
        "file_ending": dataset_json["file_ending"],
    }
    wrong = [name for name, value in names.items() if not isinstance(value, str)]
    if wrong:
        raise TypeError(f"{wrong[0]} is {names[wrong[0]]!r}")
    if not dataset_json.get("modality", dataset_json.get("channel_names")):
        raise ValueError("channel_names is empty or missing")


def _try_shapes(network: nn.Module, channels: int, patch_size: Sequence[int]) -> None:
    """Run a patch through a copy of the network that has shapes but no numbers, which costs nothing."""
    # Not every operation of a network of somebody's own knows how to run without numbers.
    with torch.no_grad(), contextlib.suppress(NotImplementedError):
        copy.deepcopy(network).to("meta").eval()(torch.empty((1, channels, *patch_size), device="meta"))


def _refuse_foreign_code(configuration: ConfigurationManager) -> None:
    """plans.json names the classes the network is built from, and nnU-Net calls whatever is named there."""
    arguments = configuration.network_arch_init_kwargs
    names = [configuration.network_arch_class_name]
    names += [arguments[key] for key in configuration.network_arch_init_kwargs_req_import if arguments[key]]
    for name in names:
        found = pydoc.locate(str(name))
        if found is not None and not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise UserError(f"plans.json asks to build the network from {name}, which is no torch module; refused.")


@contextmanager
def _sentences_for(file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (LookupError, RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        where = file.parents[1]
        raise UserError(
            f"The network of {file} does not fit the plans.json and dataset.json in {where} ({reason})."
        ) from error
