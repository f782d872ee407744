"""``nnunet_ima configure``: what is in force for a training, where each value comes from, and a new configuration."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import find_trainer, nnunet_folder
from nnunet_ima.files import read_json, write_text
from nnunet_ima.settings import KEY, Configured, explain, validate


@dataclass(frozen=True)
class PlannedDataset:
    """A preprocessed dataset and one of its plans files."""

    folder: Path
    plans_file: Path
    plans: dict[str, Any]

    @property
    def configurations(self) -> dict[str, Any]:
        """The entries of the plans file."""
        return dict(self.plans["configurations"])


def find_planned(dataset: str, plans_name: str) -> PlannedDataset:
    """The preprocessed dataset.

    Raises:
        UserError: there is none, or it has no such plans.
    """
    preprocessed = nnunet_folder("nnUNet_preprocessed")
    try:
        name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError):
        raise UserError(f"There is no dataset {dataset!r}; give its number or full name, as nnU-Net does.") from None
    file = preprocessed / name / f"{plans_name}.json"
    if not file.is_file():
        raise UserError(f"{name} has no plans {plans_name}; run nnUNetv2_plan_and_preprocess first, or give -p.")
    plans = read_json(file)
    if not isinstance(plans.get("configurations"), dict):
        raise UserError(f"{file} is no plans file of nnU-Net: it has no configurations; give another with -p.")
    return PlannedDataset(preprocessed / name, file, plans)


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """``epsilon=15 norm=linf`` as a table, not validated yet.

    Raises:
        UserError: no ``name=value``.
    """
    table: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"{text!r} is no setting; write name=value, such as epsilon=15.")
        try:
            table[name] = json.loads(value)
        except (ValueError, RecursionError):
            table[name] = value
    return table


def add_configuration(
    planned: PlannedDataset,
    parent: str,
    name: str,
    settings: Mapping[str, Any],
    features: int | None = None,
    batch_size: int | None = None,
) -> PlannedDataset:
    """The plans with a configuration more, which inherits from ``parent`` and holds ``settings`` on top of its own.

    Nothing is written yet.

    Args:
        features: of the network's first stage, for a smaller network: they double with each stage, up to what the
            parent has there.
        batch_size: of the training.

    Raises:
        UserError: the parent is missing, a setting is not allowed, or the name is no name or another configuration's.
    """
    check_name(name)
    entry = {
        "inherits_from": parent,
        **_smaller(planned, parent, features, batch_size),
        KEY: validate({**settings_of(planned, parent), **settings}, "--set"),
    }
    there = planned.configurations.get(name)
    if there is not None and there != entry:
        raise UserError(
            f"{planned.plans_file.name} already has a configuration {name!r}, which is another one; choose another "
            f"name with --name."
        )
    plans = {**planned.plans, "configurations": {**planned.configurations, name: entry}}
    return PlannedDataset(planned.folder, planned.plans_file, plans)


def _smaller(planned: PlannedDataset, parent: str, features: int | None, batch_size: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if features is None:
        return entry
    try:
        resolved = PlansManager(planned.plans).get_configuration(parent).configuration
        architecture = copy.deepcopy(resolved["architecture"])
        arguments = architecture["arch_kwargs"]
        planned_features = [int(number) for number in arguments["features_per_stage"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{planned.plans_file} does not say how many features the stages of {parent!r} have, so --features cannot "
            f"be used with it."
        ) from error
    arguments["features_per_stage"] = [min(features * 2**i, most) for i, most in enumerate(planned_features)]
    return {**entry, "architecture": architecture}


def write_plans(planned: PlannedDataset) -> None:
    """Write the plans file."""
    write_text(planned.plans_file, json.dumps(planned.plans, indent=4))


def check_name(name: str) -> None:
    """Refuse names of configurations and plans that would break nnU-Net's folders.

    Raises:
        UserError: it holds something else than letters, digits, dots, dashes and single underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or "__" in name or name.startswith("."):
        raise UserError(f"The name {name!r} is not possible; use letters, digits, dots, dashes and single underscores.")


def settings_of(planned: PlannedDataset, configuration: str) -> dict[str, Any]:
    """The settings of a configuration, its own or the nearest it inherits.

    Raises:
        UserError: it is missing, inherits from itself, or its settings are not allowed.
    """
    seen: list[str] = []
    while True:
        if configuration in seen:
            raise UserError(f"In {planned.plans_file} the configuration {configuration!r} inherits from itself.")
        entry = planned.configurations.get(configuration)
        if not isinstance(entry, dict):
            known = ", ".join(planned.configurations)
            raise UserError(f"{planned.plans_file} has no configuration {configuration!r}; it has {known}.")
        if KEY in entry:
            return validate(entry[KEY], f'"{KEY}" in configuration {configuration!r} of {planned.plans_file.name}')
        if "inherits_from" not in entry:
            return {}
        seen.append(configuration)
        configuration = entry["inherits_from"]


def in_force(
    planned: PlannedDataset, configuration: str, trainer: str, fold: int | str
) -> tuple[Configured, list[str]]:
    """What a training would use, and the explanation of what is computed.

    Raises:
        UserError: the trainer or configuration is unknown, or the data is not preprocessed.
    """
    settings_of(planned, configuration)
    found = find_trainer(trainer)
    # Asked for by what it can do: this package knows nothing of the trainers'.
    if not hasattr(found, "preview"):
        raise UserError(f"{trainer} is none of our trainers, so it has no settings of ours; use nnUNetTrainerIMA.")
    dataset_json = read_json(planned.folder / "dataset.json")
    plans = {**planned.plans, "continue_training": False}
    with _results_elsewhere(), contextlib.redirect_stdout(io.StringIO()):
        try:
            planned_training = found(plans, configuration, fold, dataset_json, torch.device("cpu"))
            configured, plan, samples = planned_training.preview()
        except SystemExit as error:
            raise UserError(str(error)) from None
        except (OSError, RuntimeError, AssertionError, ValueError, LookupError):
            # nnU-Net has no words of its own for data that is missing, incomplete, or too little to be split.
            raise UserError(
                f"{planned.folder.name} is not completely preprocessed for {configuration}, or has fewer than five "
                f"cases; run nnUNetv2_plan_and_preprocess first."
            ) from None
    return configured, explain(configured, plan, samples)


@contextlib.contextmanager
def _results_elsewhere() -> Iterator[None]:
    """A trainer makes its output folder as soon as it exists; a look at its settings should leave none.

    Only nnU-Net's splits_final.json is made if it is missing, as the training would make it.
    """
    before = os.environ.get("nnUNet_results")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["nnUNet_results"]
            else:
                os.environ["nnUNet_results"] = before
