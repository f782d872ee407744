"""``nnunet_ima export``: an ordinary nnU-Net model that predicts the same, without anything of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_project import PLANS, command_environment, make_trainer, quiet, read, write

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.evaluation import export
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.description import describe_run
from nnunet_ima.evaluation.export import PROVENANCE, STOCK
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.evaluation.protocols import Protocol
from nnunet_ima.evaluation.run import Evaluation
from nnunet_ima.settings import KEY
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD


@pytest.fixture(params=["2d", "3d"])
def hardened(request: pytest.FixtureRequest) -> Path:
    """A hardened model's folder."""
    return Path(request.getfixturevalue(f"ima_{request.param}").output_folder).parent


def run(*arguments: str) -> int:
    with quiet():
        return main(["export", *arguments])


def test_the_exported_model_is_nnunets_own_in_every_file(hardened, tmp_path):
    assert run("-m", str(hardened), "-o", str(tmp_path)) == 0
    (exported,) = tmp_path.iterdir()
    assert exported.name == hardened.name.replace("nnUNetTrainerIMA", STOCK)
    checkpoint = torch.load(exported / "fold_0" / "checkpoint_final.pth", weights_only=False)
    ours = torch.load(hardened / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == STOCK
    assert KEY not in checkpoint["init_args"]
    assert checkpoint.keys() == ours.keys()
    for name, value in ours["network_weights"].items():
        assert torch.equal(checkpoint["network_weights"][name], value)
    assert "margin_mean" in ours["logging"]
    assert "margin_mean" not in checkpoint["logging"]
    assert "nnunet_ima" not in (exported / "plans.json").read_text(encoding="utf-8")
    provenance = read(exported / PROVENANCE)
    assert provenance["from"] == hardened.name
    assert provenance["folds"][0]["training"]["settings"]["epsilon"] == 6.0


def test_it_predicts_where_there_is_nothing_but_nnunet(hardened, project, tmp_path):
    """In a process that cannot import this package, stock commands' own function predicts the same segmentation."""
    results = tmp_path / "results" / project.dataset
    assert run("-m", str(hardened), "-o", str(results), "--plans-name", "nnUNetPlansHardened") == 0
    (exported,) = results.iterdir()
    images = tmp_path / "images"
    images.mkdir()
    case = project.names()[0]
    raw = project.root / "nnUNet_raw" / project.dataset
    shutil.copy(raw / "imagesTr" / f"{case}_0000.nii.gz", images)
    script = (
        "import sys; sys.modules['nnunet_ima'] = None; sys.argv = ['nnUNetv2_predict', *sys.argv[1:]];"
        "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    )
    environment = command_environment(project)
    environment |= {"nnUNet_results": str(tmp_path / "results")}
    del environment["nnUNet_extTrainer"]
    configuration = exported.name.rpartition("__")[2]
    arguments = ["-i", str(images), "-o", str(tmp_path / "stock"), "-d", project.number, "-c", configuration]
    arguments += ["-p", "nnUNetPlansHardened", "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = ["-i", str(images), "-o", str(tmp_path / "ours"), "-d", project.number, "-c", configuration, "-p", PLANS]
    ours += ["-tr", "nnUNetTrainerIMA", "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    project.command("nnUNetv2_predict", *ours)
    written = [(tmp_path / kind / f"{case}.nii.gz").read_bytes() for kind in ("stock", "ours")]
    assert written[0] == written[1]


def test_it_can_be_sent_and_installed_with_nnunets_own_commands(ima_2d, project, tmp_path):
    hardened = tmp_path / Path(ima_2d.output_folder).parent.name
    shutil.copytree(Path(ima_2d.output_folder).parent, hardened)
    # nnU-Net's command asks for the scores of the validation, which this model did not go through.
    (hardened / "fold_0" / "validation").mkdir(exist_ok=True)
    (hardened / "fold_0" / "validation" / "summary.json").write_text("{}", encoding="utf-8")
    results = tmp_path / "results" / project.dataset
    assert run("-m", str(hardened), "-o", str(results), "--plans-name", "nnUNetPlansHardened") == 0
    environment = {"nnUNet_results": str(tmp_path / "results"), "nnUNet_extTrainer": ""}
    archive = str(tmp_path / "model.zip")
    project.command(
        "nnUNetv2_export_model_to_zip", "-d", project.number, "-o", archive, "-c", "2d_tiny", "-f", "0",
        "-p", "nnUNetPlansHardened", environment=environment,
    )  # fmt: skip
    fresh = {**environment, "nnUNet_results": str(tmp_path / "fresh")}
    (tmp_path / "fresh").mkdir()
    project.command("nnUNetv2_install_pretrained_model_from_zip", archive, environment=fresh)
    installed = next((tmp_path / "fresh").rglob("checkpoint_final.pth"))
    assert installed.read_bytes() == next(results.rglob("checkpoint_final.pth")).read_bytes()


def test_nothing_is_left_where_predictions_differ(hardened, tmp_path, monkeypatch, capsys):
    plain = export.stock_checkpoint

    def broken(checkpoint, name):
        changed = plain(checkpoint, name)
        weights = {key: value * 1.01 for key, value in changed["network_weights"].items()}
        return {**changed, "network_weights": weights}

    monkeypatch.setattr(export, "stock_checkpoint", broken)
    assert run("-m", str(hardened), "-o", str(tmp_path)) == 2
    assert "does not predict" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_is_not_overwritten(hardened, tmp_path, capsys):
    there = tmp_path / hardened.name.replace("nnUNetTrainerIMA", STOCK)
    there.mkdir()
    assert run("-m", str(hardened), "-o", str(tmp_path)) == 2
    assert "exists already" in capsys.readouterr().err
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("name", ["nothing", "a__b__c"])
def test_what_is_no_trained_model_is_refused(tmp_path, name, capsys):
    (tmp_path / name).mkdir()
    assert run("-m", str(tmp_path / name), "-o", str(tmp_path / "out")) == 2
    assert "holds no checkpoint_final.pth" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(hardened, tmp_path, capsys):
    copy = tmp_path / hardened.name
    shutil.copytree(hardened, copy)
    file = copy / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:2000])
    assert run("-m", str(copy), "-o", str(tmp_path / "out")) == 2
    assert "damaged" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_provenance_is_valid_json_with_both_checksums(hardened, tmp_path):
    assert run("-m", str(hardened), "-o", str(tmp_path)) == 0
    (exported,) = tmp_path.iterdir()
    (fold,) = json.loads((exported / PROVENANCE).read_text(encoding="utf-8"))["folds"]
    assert set(fold["sha256"]) == {"hardened", "exported"}
    assert fold["sha256"]["hardened"] != fold["sha256"]["exported"]


def head_of(folder: Path, *cases: str) -> dict[str, Any]:
    """What the summary of an evaluation of these cases begins with."""
    cpu = torch.device("cpu")
    model = load_model(folder, 0, "checkpoint_final.pth", cpu)
    protocol, criterion = Protocol("sound", "l2"), DiceCriterion(labels=model.labels)
    evaluation = Evaluation(model, protocol, [], [], None, 1, 0, cpu, criterion)
    return describe_run(evaluation, cases, "")


def known_of(folder: Path) -> tuple[bool, bool, bool]:
    """Whether two cases were learned from, and whether it started from weights that nobody knows."""
    found = [head_of(folder, case)["trained_on_these_cases"] for case in ("foreign", "own")]
    return found[0], found[1], head_of(folder)["started_from_unknown_weights"]


def exported_of(folder: Path, target: Path, *more: str) -> Path:
    assert run("-m", str(folder), "-o", str(target), *more) == 0
    (exported,) = target.iterdir()
    return exported


@pytest.fixture
def noting(ima_2d, tmp_path) -> Callable[..., Path]:
    """A hardened model whose checkpoint notes what it is given."""

    def make(**noted: Any) -> Path:
        folder = tmp_path / "noting" / Path(ima_2d.output_folder).parent.name
        shutil.copytree(Path(ima_2d.output_folder).parent, folder)
        file = folder / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        checkpoint["init_args"][KEY] |= noted
        torch.save(checkpoint, file)
        return folder

    return make


@pytest.mark.parametrize("unknown", [False, True])
def test_an_exported_model_is_known_for_the_cases_it_learned_from_before(noting, tmp_path, unknown):
    """As one of fold 1 does that started from fold 0's weights."""
    hardened = noting(training_cases=["own", "foreign"], started_from_unknown=unknown)
    assert known_of(hardened) == (True, True, unknown)
    exported = exported_of(hardened, tmp_path / "once")
    assert known_of(exported) == (True, True, unknown)
    again = exported_of(exported, tmp_path / "twice", "--plans-name", "nnUNetPlansAgain")
    assert known_of(again) == (True, True, unknown)
    own = noting_less(exported, "foreign")
    assert known_of(own) == (False, True, unknown)


def noting_less(exported: Path, case: str) -> Path:
    provenance = read(exported / PROVENANCE)
    provenance["folds"][0]["training"]["training_cases"].remove(case)
    write(exported / PROVENANCE, provenance)
    return exported


def test_an_export_of_before_counts_as_of_unknown_weights_only_where_no_cases_are_noted(noting, tmp_path):
    """Whether a training started from other weights was not noted then; what was is believed, and no more is said."""
    exported = exported_of(noting(training_cases=["own"], started_from_unknown=True), tmp_path / "out")
    provenance = read(exported / PROVENANCE)
    training = provenance["folds"][0]["training"]
    del training["started_from_unknown"]
    write(exported / PROVENANCE, provenance)
    assert known_of(exported) == (False, True, False)
    assert head_of(exported)["exported_from"]["started_from_unknown"] is None
    del training["training_cases"]
    write(exported / PROVENANCE, provenance)
    assert known_of(exported) == (False, False, True)
    # A stock model is taken at its word, exported or not.
    provenance["folds"][0]["training"] = {}
    write(exported / PROVENANCE, provenance)
    assert known_of(exported) == (False, False, False)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("export", [False, True])
def test_a_training_that_starts_from_a_model_knows_all_that_it_learned_from(
    project, results, noting, tmp_path, monkeypatch, unknown, export
):
    """Also if it was exported, and says nothing itself; and whether nobody knows what it learned from."""
    folder = noting(training_cases=["foreign"], started_from_unknown=unknown)
    folder = exported_of(folder, tmp_path / "out") if export else folder
    # As people give it from there.
    monkeypatch.chdir(folder / "fold_0")
    trainer = make_trainer(project, nnUNetTrainerSTD, start_from="checkpoint_final.pth")
    with quiet():
        trainer.on_train_start()
    noted = trainer.described()
    assert noted["started_from_unknown"] is unknown
    own = trainer._cases_of(trainer.dataloader_train)
    assert set(noted["training_cases"]) == {"foreign", *own}


def test_a_stock_model_stays_what_it_is(stock_2d, tmp_path):
    exported = exported_of(stock_2d, tmp_path, "--plans-name", "nnUNetPlansAgain")
    assert known_of(exported) == known_of(stock_2d) == (False, False, False)


def test_an_evaluation_of_an_exported_model_knows_what_it_was(ima_2d, tmp_path):
    assert run("-m", str(Path(ima_2d.output_folder).parent), "-o", str(tmp_path)) == 0
    (exported,) = tmp_path.iterdir()

    def told(folder: Path) -> dict[str, Any] | None:
        head = head_of(folder)
        assert head["normalisation"] == {
            "channels": 1, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]
        }  # fmt: skip
        assert head["protocol"]["unit"] == "z-scores, L2 norm over the patch"
        return head.get("exported_from")

    found = told(exported)
    assert found is not None
    assert found["trainer"] == ima_2d.__class__.__name__
    assert found["training"]["epsilon"] == 6.0
    assert told(Path(ima_2d.output_folder).parent) is None
    # Of weights that were put there since, the note says nothing.
    file = exported / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), "current_epoch": 99}, file)
    assert told(exported) is None


@pytest.mark.parametrize("name", ["a/b", "a__b", "", "."])
def test_a_name_that_would_break_nnunets_folders_is_refused(ima_2d, tmp_path, capsys, name):
    model = str(Path(ima_2d.output_folder).parent)
    assert run("-m", model, "-o", str(tmp_path), "--plans-name", name or " ") == 2
    assert "is not possible" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
