"""``nnunet_ima export``: a hardened model as a model folder of stock nnU-Net, which needs no package of ours."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor
from tqdm import tqdm

from nnunet_ima.checkpoints import safe_load, started_from_unknown
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.configure import check_name
from nnunet_ima.evaluation.environment import our_trainers_too, versions
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.files import read_json, sha256_of, write_text
from nnunet_ima.provenance import PROVENANCE, exported_from
from nnunet_ima.settings import KEY

STOCK = "nnUNetTrainer"

# Beside the checkpoint, what nnUNetv2_export_model_to_zip and people look for.
COPIED = ("progress.png", "debug.json", "network_architecture.pdf", "validation/summary.json")
BESIDE_FOLDS = ("dataset.json", "dataset_fingerprint.json")


def export_model(
    model: Path, destination: Path, checkpoint_name: str, device: torch.device, plans_name: str | None = None
) -> Path:
    """Write ``model`` as stock nnU-Net would have written it; verify that it predicts the same, bit for bit.

    Args:
        model: a model folder, ``TRAINER__PLANS__CONFIGURATION``.
        destination: the folder of the dataset that the new model folder goes into.
        checkpoint_name: of each fold.
        device: for the verification.
        plans_name: of the new model; None for the same, which a stock model beside the hardened one may have, too.

    Returns:
        The new model folder.

    Raises:
        UserError: the model is none, the destination exists, or the predictions differ; nothing is left behind then.
    """
    folds = sorted(file.parent for file in model.glob(f"fold_*/{checkpoint_name}"))
    if not folds:
        raise UserError(f"{model} holds no {checkpoint_name} in any fold; train it first, or name another with -chk.")
    trainer, old_name, configuration = _parts_of(model)
    name = plans_name or old_name
    check_name(name)
    target = destination / f"{STOCK}__{name}__{configuration}"
    if target.exists():
        raise UserError(
            f"{target} exists already; give the exported model another name with --plans-name, or another folder with "
            f"-o."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for beside in BESIDE_FOLDS:
            if (model / beside).is_file():
                _copy(model / beside, unfinished / beside)
        plans = stock_plans(read_json(model / "plans.json"), name)
        write_text(unfinished / "plans.json", json.dumps(plans, indent=4))
        checked = []
        for fold in tqdm(folds, desc="folds", unit="fold", dynamic_ncols=True):
            # Reads safely, and refuses what does not fit, before anything is made of it.
            load_model(model, _fold_name(fold), checkpoint_name, torch.device("cpu"))
            _write_fold(fold, unfinished / fold.name, checkpoint_name, name)
            _verify(model, unfinished, fold, checkpoint_name, device)
            checked.append(_provenance_of(fold / checkpoint_name, unfinished / fold.name / checkpoint_name))
        provenance = {"from": model.name, "trainer": trainer, "folds": checked, "versions": versions()}
        write_text(unfinished / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def stock_plans(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """A plans file of the given name, without our settings."""
    plain = {**copy.deepcopy(plans), "plans_name": name}
    for configuration in plain.get("configurations", {}).values():
        configuration.pop(KEY, None)
    return plain


def stock_checkpoint(checkpoint: dict[str, Any], plans_name: str) -> dict[str, Any]:
    """A checkpoint as ``nnUNetTrainer`` would have written it: its name, and no state of ours."""
    arguments = {name: value for name, value in checkpoint["init_args"].items() if name != KEY}
    if isinstance(arguments.get("plans"), dict):
        arguments["plans"] = stock_plans(arguments["plans"], plans_name)
    logging = {name: value for name, value in checkpoint.get("logging", {}).items() if name in _stock_logs()}
    return {**checkpoint, "init_args": arguments, "trainer_name": STOCK, "logging": logging}


def _stock_logs() -> set[str]:
    return set(LocalLogger().my_fantastic_logging)


def _parts_of(model: Path) -> tuple[str, str, str]:
    parts = model.resolve().name.split("__")
    if len(parts) != 3:
        raise UserError(f"{model} is no model folder of nnU-Net: its name is not TRAINER__PLANS__CONFIGURATION.")
    return parts[0], parts[1], parts[2]


def _fold_name(fold: Path) -> int | str:
    name = fold.name.removeprefix("fold_")
    return int(name) if name.isdecimal() else name


def _write_fold(fold: Path, target: Path, checkpoint_name: str, plans_name: str) -> None:
    target.mkdir(parents=True)
    try:
        torch.save(stock_checkpoint(safe_load(fold / checkpoint_name), plans_name), target / checkpoint_name)
    except RuntimeError as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        raise UserError(f"{target / checkpoint_name} could not be written; make room on the disk.") from error
    for name in COPIED:
        if (fold / name).is_file():
            _copy(fold / name, target / name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _verify(model: Path, exported: Path, fold: Path, checkpoint_name: str, device: torch.device) -> None:
    """Both folders predict the same for a random image a little larger than a patch, through nnU-Net's own predictor.

    Raises:
        UserError: they do not.
    """
    with our_trainers_too():
        ours, theirs = (_logits(folder, fold, checkpoint_name, device) for folder in (model, exported))
    if not torch.equal(ours, theirs):
        difference = float((ours.float() - theirs.float()).abs().max())
        raise UserError(
            f"The exported {fold.name} does not predict what {model.name} does (logits differ by {difference:g}), so "
            f"nothing was exported; its trainer builds another network than {STOCK}."
        )


def _logits(folder: Path, fold: Path, checkpoint_name: str, device: torch.device) -> Tensor:
    on_gpu = device.type == "cuda"
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=on_gpu, allow_tqdm=False)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor.initialize_from_trained_model_folder(str(folder), (_fold_name(fold),), checkpoint_name)
        configuration = predictor.configuration_manager
        assert configuration is not None
        assert predictor.plans_manager is not None
        patch = list(configuration.patch_size)
        shape = [size + size // 4 for size in ([2, *patch] if len(patch) == 2 else patch)]
        channels = determine_num_input_channels(predictor.plans_manager, configuration, predictor.dataset_json)
        image = torch.randn((channels, *shape), generator=torch.Generator().manual_seed(0))
        torch.backends.cudnn.benchmark, before = False, torch.backends.cudnn.benchmark
        try:
            logits: Tensor = predictor.predict_logits_from_preprocessed_data(image)
        finally:
            torch.backends.cudnn.benchmark = before
    return logits.cpu()


def _provenance_of(source: Path, exported: Path) -> dict[str, Any]:
    checkpoint, sha256 = safe_load(source), sha256_of(source)
    ours = checkpoint["init_args"].get(KEY, {})
    described = {key: ours[key] for key in ("nnunet_ima", "settings", "origins", "training_cases") if key in ours}
    described["started_from_unknown"] = started_from_unknown(checkpoint)
    # One that was exported before says nothing itself.
    before = exported_from(source.parents[1], _fold_name(source.parent), sha256)
    return {
        "fold": source.parent.name,
        "checkpoint": source.name,
        "sha256": {"hardened": sha256, "exported": sha256_of(exported)},
        "training": described if before is None else before.training,
    }
