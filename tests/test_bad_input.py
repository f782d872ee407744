"""Whatever a user gets wrong ends ``nnunet_ima evaluate`` with one sentence, a status other than 0, and no files."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_project import Project, quiet, read, write

from nnunet_ima.evaluation.command_line import main

SHORT = ("--levels", "1", "--attacks", "pgd:steps=1", "--max-samples", "1", "--no-cases", "-device", "cpu")


@pytest.fixture(autouse=True)
def _as_few_threads(monkeypatch) -> None:
    monkeypatch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)


@pytest.fixture
def model(std_2d: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may spoil."""
    folder = tmp_path / "model"
    (folder / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        shutil.copyfile(std_2d / name, folder / name)
    return folder


@pytest.fixture
def data(project: Project, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the preprocessed 2D data that a test may spoil; nnU-Net finds this one."""
    folder = tmp_path / "preprocessed" / project.dataset
    shutil.copytree(project.preprocessed / "nnUNetPlans_2d", folder / "nnUNetPlans_2d")
    shutil.copytree(project.preprocessed / "gt_segmentations", folder / "gt_segmentations")
    splits = [{"train": project.names()[2:], "val": project.names()[:2]}]
    (folder / "splits_final.json").write_text(str(splits).replace("'", '"'), encoding="utf-8")
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder


@pytest.fixture
def refused(capsys, tmp_path: Path) -> Callable[..., str]:
    """Run the command; it must fail with one sentence, which is returned, and write no file."""

    def run(*arguments: str, output: Path | None = None, kept: Collection[str] = ()) -> str:
        output = output or tmp_path / "out"
        capsys.readouterr()
        status = main(["evaluate", "-o", str(output), *arguments])
        written = capsys.readouterr()
        assert status != 0
        assert written.out == ""
        *before, sentence = written.err.removesuffix("\n").split("\n")
        # A progress bar may stand before it, on lines of its own.
        assert all(re.search(r"\d+%\|", line) for line in before), written.err
        sentence = sentence.rpartition("\r")[2]
        assert sentence.startswith("nnunet_ima: ")
        assert sentence.endswith(".")
        assert "Traceback" not in written.err
        assert not output.is_dir() or {file.name for file in output.iterdir()} == set(kept)
        return sentence.removeprefix("nnunet_ima: ")

    return run


def model_arguments(folder: Path) -> list[str]:
    return ["-m", str(folder), *SHORT]


@pytest.mark.usefixtures("data")
def test_the_copies_are_good_before_they_are_spoilt(model, tmp_path):
    with quiet():
        assert main(["evaluate", "-o", str(tmp_path / "out"), *model_arguments(model)]) == 0
    assert (tmp_path / "out" / "summary.json").is_file()


# ---- environment and names


NAMED = ("-d", "901", "-c", "2d_tiny", "-p", "nnUNetPlansTiny", "-tr", "nnUNetTrainerSTD")


@pytest.mark.parametrize("variable", ["nnUNet_results", "nnUNet_preprocessed"])
@pytest.mark.parametrize("value", [None, "", "/no/such/folder"])
def test_an_environment_variable_that_is_missing_is_named(refused, std_2d, monkeypatch, variable, value):
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    sentence = refused(*NAMED, *SHORT)
    assert variable in sentence
    assert value != "/no/such/folder" or value in sentence


def test_raw_data_is_not_needed(std_2d, monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw")
    with quiet():
        assert main(["evaluate", "-o", str(tmp_path / "out"), *NAMED, *SHORT]) == 0


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("-d", "77", "77"),
        ("-d", "Dataset077_Heart", "Dataset077_Heart"),
        ("-d", "Phantom", "Phantom"),
        ("-d", "", "no dataset"),
        ("-d", "../../etc", "../../etc"),
        ("-d", "²", "²"),
        ("-c", "3d_lowres", "3d_lowres"),
        ("-tr", "nnUNetTrainerTE", "nnUNetTrainerTE"),
        ("-p", "nnUNetResEncUNetMPlans", "nnUNetResEncUNetMPlans"),
        ("-f", "3", "fold 3"),
        ("-f", "-1", "-1"),
        ("-f", "first", "first"),
        ("-f", "²", "²"),
        ("-f", "all", "fold all"),
        ("-chk", "checkpoint_latest.pth", "checkpoint_latest.pth"),
        ("-chk", ".", "checkpoints are"),
        ("-device", "tpu", "tpu"),
        ("-device", "", "usable"),
        ("--attacks", "fab9", "fab9"),
        ("--attacks", "pgd:step=3", "step"),
        ("--attacks", "pgd:steps=0", "steps"),
        ("--attacks", "pgd:steps=-2", "steps"),
        ("--attacks", "pgd:steps=1.5", "steps"),
        ("--attacks", "pgd:steps", "steps"),
        ("--attacks", "pgd:steps=9999999999", "steps"),
        ("--attacks", "pgd:step_size=nan", "step_size"),
        ("--attacks", "bpgd:boundary_search=middle", "boundary_search"),
        ("--attacks", "pgd:seed=3", "seed"),
        ("--attacks", "apgd:loss=best", "dice-ce, ce, margin"),
        ("--attacks", "apgd:schedule=best", "constant, shrinking"),
        ("--attacks", "fab:loss=ce", "loss"),
        ("--attacks", "apgd:steps=5,steps=7", "steps twice"),
        ("--attacks", "spsa:samples=5", "even number"),
        ("--attacks", "autoattack:version=best", "standard, fast, strong"),
        ("--attacks", "autoattack:members=pgd", "members"),
        ("--attacks", "pgd:mode=best", "dice, threshold"),
        ("--levels", "2/0", "2/0"),
        ("--levels", "abc", "abc"),
        ("--levels", "nan", "nan"),
        ("--levels", "inf", "inf"),
        ("--levels", "0", "0"),
        ("--levels", "1/2/3", "1/2/3"),
        ("--levels", "1e999", "1e999"),
        ("--levels", "", "level"),
    ],
)
def test_a_wrong_argument_is_named(refused, std_2d, option, value, named):
    assert named in refused(*NAMED, *SHORT, option, value)


@pytest.mark.parametrize("level", ["-1", "-1/255"])
def test_a_negative_level_is_refused(refused, std_2d, level, capsys, tmp_path):
    """-1 is a number to argparse, so it is our sentence; -1/255 looks like an option."""
    if level == "-1":
        assert "above 0" in refused(*NAMED, *SHORT, "--levels", level)
        return
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "-o", str(tmp_path / "out"), *NAMED, *SHORT, "--levels", level])
    assert left.value.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("level", ["5", "256/255"])
def test_an_linf_level_above_the_whole_range_is_refused(refused, std_2d, level):
    assert level in refused(*NAMED, *SHORT, "--norm", "linf", "--levels", level)


@pytest.mark.parametrize(
    "wrong",
    [("--protocol", "table3"), ("--norm", "l1"), ("--max-samples", "0"), ("--batch-size", "x"), ("--seed", "a")],
)
def test_argparse_prints_its_usage_and_one_line(std_2d, wrong, capsys):
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *NAMED, *SHORT, *wrong])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nnunet_ima evaluate: error: argument")


def test_a_model_must_be_named(refused, project):
    assert "-m MODEL_FOLDER" in refused(*SHORT)
    assert "/no/model" in refused("-m", "/no/model", *SHORT)


# ---- the model folder


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe\x00", b"{}", b'{"labels": {}}', b"null"])
def test_a_corrupted_json_file_is_named(refused, model, name, content):
    (model / name).write_bytes(content)
    assert name in refused(*model_arguments(model))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_json_file_is_named(refused, model, name):
    (model / name).unlink()
    assert name in refused(*model_arguments(model))


def paths(table: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(table, dict):
        for key, value in table.items():
            yield (*prefix, key)
            yield from paths(value, (*prefix, key))


def without(table: dict[str, Any], path: tuple[str, ...], value: Any = None) -> dict[str, Any]:
    """A copy of ``table`` in which one entry is missing, or is ``value``."""
    changed = copy.deepcopy(table)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    "value", ["nonsense", *(pytest.param(value, marks=pytest.mark.slow) for value in (None, 7, {}))]
)
@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_whatever_entry_is_missing_or_wrong_there_is_no_traceback(model, name, value, capsys, tmp_path, monkeypatch):
    """Either the entry does not matter, or one sentence says what does not fit."""
    for slow in ("draw_worst", "draw_dice_against_level"):
        monkeypatch.setattr(f"nnunet_ima.evaluation.merge.{slow}", lambda *_: None)
    good = read(model / name)
    relevant = [
        path for path in paths(good) if path[:1] != ("configurations",) or len(path) < 2 or path[1] in ("2d", "2d_tiny")
    ]
    for path in relevant:
        write(model / name, without(good, path, value))
        output = tmp_path / "out"
        arguments = [a for a in model_arguments(model) if a != "--no-cases"]
        status = main(["evaluate", "-o", str(output), *arguments])
        error = capsys.readouterr().err
        assert status == 0 or error.splitlines()[-1].rpartition("\r")[2].startswith("nnunet_ima: "), path
        if status != 0:
            assert not output.is_dir() or list(output.iterdir()) == [], path
        shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.5, 0.98, 0.9999])
def test_a_truncated_checkpoint_is_named(refused, model, kept):
    file = model / "fold_0" / "checkpoint_final.pth"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    assert str(file) in refused(*model_arguments(model))


@pytest.mark.parametrize("content", [b"not a checkpoint", b"{}", b"\x80\x02N.", b"\x80\x02}q\x00.", b"cos\nnothing\n."])
def test_a_file_that_is_no_checkpoint_is_named(refused, model, content):
    file = model / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(content)
    assert str(file) in refused(*model_arguments(model))


@pytest.mark.parametrize("content", [{}, [], {"network_weights": {}}, 5])
def test_a_torch_file_of_something_else_is_named(refused, model, content):
    file = model / "fold_0" / "checkpoint_final.pth"
    torch.save(content, file)
    assert str(file) in refused(*model_arguments(model))


@pytest.mark.parametrize(
    "change",
    [
        {"trainer_name": "nnUNetTrainerOfSomebody"},
        {"trainer_name": "nnUNetDataLoader"},
        {"trainer_name": "np"},
        {"trainer_name": ""},
        {"trainer_name": 5},
        {"network_weights": {}},
        {"network_weights": None},
        {"init_args": {}},
        {"init_args": 5},
        {"init_args": {"configuration": "4d"}},
        {"inference_allowed_mirroring_axes": "axes"},
    ],
)
def test_a_checkpoint_with_a_wrong_entry_ends_with_a_sentence(refused, model, change):
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, **change}, file)
    refused(*model_arguments(model))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("place", ["inside", "whole", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(refused, model, tmp_path, place):
    file, trace = model / "fold_0" / "checkpoint_final.pth", tmp_path / "it_ran"
    checkpoint = torch.load(file, weights_only=False)
    if place == "inside":
        checkpoint["init_args"]["extra"] = Bomb(trace)
        torch.save(checkpoint, file)
    elif place == "whole":
        torch.save(Bomb(trace), file)
    else:
        file.write_bytes(pickle.dumps(Bomb(trace)))
    sentence = refused(*model_arguments(model))
    assert str(file) in sentence
    assert not trace.exists()
    if place != "pickle":
        assert "run code" in sentence
    # The bomb is real.
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


@pytest.mark.parametrize("name", ["subprocess.Popen", "os.system", "builtins.eval", "builtins.print"])
@pytest.mark.parametrize("place", ["network_class_name", "nonlin", "norm_op", "dropout_op", "conv_op"])
def test_plans_that_name_foreign_code_are_refused(refused, model, name, place):
    plans = read(model / "plans.json")
    architecture = plans["configurations"]["2d_tiny"]["architecture"]
    if place == "network_class_name":
        architecture[place] = name
    else:
        architecture["arch_kwargs"][place] = name
        architecture["arch_kwargs"][f"{place}_kwargs"] = {"args": ["touch", "it_ran"]}
    write(model / "plans.json", plans)
    sentence = refused(*model_arguments(model))
    assert name in sentence
    assert "refused" in sentence


def test_a_network_that_does_not_fit_is_said_not_to(refused, model):
    plans = read(model / "plans.json")
    plans["configurations"]["2d_tiny"]["architecture"]["arch_kwargs"]["features_per_stage"] = [5, 6, 7]
    write(model / "plans.json", plans)
    assert "does not fit" in refused(*model_arguments(model))


# ---- the data


def spoil(data: Path, name: str, image: Callable[[Any], Any] | None = None, labels: Any = None) -> None:
    """Store a changed version of a preprocessed case, in nnU-Net's own format."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    folder = str(data / "nnUNetPlans_2d")
    kind = infer_dataset_class(folder)
    old_image, old_labels, _, properties = kind(folder, [name]).load_case(name)
    new_image, new_labels = np.array(old_image[:]), np.array(old_labels[:])
    new_image = new_image if image is None else image(new_image)
    new_labels = new_labels if labels is None else labels(new_labels)
    for file in (data / "nnUNetPlans_2d").glob(f"{name}*"):
        file.unlink()
    kind.save_case(new_image, new_labels, properties, str(data / "nnUNetPlans_2d" / name))


def with_value(value: float) -> Callable[[Any], Any]:
    def put(volume: Any) -> Any:
        volume[0, 3, 4, 5] = value
        return volume

    return put


@pytest.fixture
def names(project: Project) -> list[str]:
    return project.names()[:2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_case_with_nan_is_named(refused, model, data, names, value):
    for name in names:
        spoil(data, name, image=with_value(value))
    sentence = refused(*model_arguments(model))
    assert "NaN" in sentence
    assert any(name in sentence for name in names)


def test_a_constant_case_is_named(refused, model, data, names):
    for name in names:
        spoil(data, name, image=np.zeros_like)
    assert "same intensity" in refused(*model_arguments(model))


def test_a_label_that_dataset_json_lacks_is_named(refused, model, data, names):
    for name in names:
        spoil(data, name, labels=with_value(9))
    sentence = refused(*model_arguments(model))
    assert "9" in sentence
    assert "dataset.json" in sentence


def test_cases_without_any_foreground_are_said_to_be(refused, model, data, names):
    for name in names:
        spoil(data, name, labels=np.zeros_like)
    assert "foreground" in refused(*model_arguments(model))


def test_a_case_that_cannot_be_read_is_named(refused, model, data, names):
    for file in (data / "nnUNetPlans_2d").iterdir():
        if any(file.name.startswith(name) for name in names) and file.suffix != ".pkl":
            file.write_bytes(file.read_bytes()[:100])
    assert any(name in refused(*model_arguments(model)) for name in names)


def test_properties_that_cannot_be_read_are_named(refused, model, data, names):
    for name in names:
        (data / "nnUNetPlans_2d" / f"{name}.pkl").write_bytes(b"nothing")
    assert any(name in refused(*model_arguments(model)) for name in names)


def test_a_missing_preprocessed_case_is_named(refused, model, data, names):
    for file in (data / "nnUNetPlans_2d").glob(f"{names[1]}*"):
        file.unlink()
    assert names[1] in refused(*model_arguments(model))


def test_missing_preprocessed_data_is_named(refused, model, data):
    shutil.rmtree(data / "nnUNetPlans_2d")
    assert "nnUNetv2_plan_and_preprocess" in refused(*model_arguments(model))


def test_missing_splits_are_named(refused, model, data):
    (data / "splits_final.json").unlink()
    assert "splits_final.json" in refused(*model_arguments(model))


@pytest.mark.parametrize("content", ["", "{", "{}", "[5]", "null", '[{"val": 5}]', '[{"train": []}]', "[]", '"a"', "5"])
def test_corrupted_splits_are_named(refused, model, data, content):
    (data / "splits_final.json").write_text(content, encoding="utf-8")
    assert "splits_final.json" in refused(*model_arguments(model))


def test_a_fold_without_validation_cases_is_refused(refused, model, data):
    (data / "splits_final.json").write_text('[{"train": [], "val": []}]', encoding="utf-8")
    assert "fold 0" in refused(*model_arguments(model))


@pytest.mark.parametrize("spoilt", ["missing", "cut off"])
def test_a_reference_segmentation_that_is_no_use_is_named(refused, model, data, names, spoilt):
    for name in names:
        file = data / "gt_segmentations" / f"{name}.nii.gz"
        file.unlink()
        if spoilt == "cut off":
            file.write_bytes(b"nothing")
    arguments = [a for a in model_arguments(model) if a != "--no-cases"]
    arguments[arguments.index("--max-samples") + 1] = "1000"
    assert any(name in refused(*arguments, kept={"run.json", "records"}) for name in names)


# ---- the output folder


def test_an_output_path_that_is_a_file_is_refused_and_kept(refused, model, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    assert str(file) in refused(*model_arguments(model), output=file)
    assert str(file) in refused(*model_arguments(model), output=file / "below")
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_read_only_folder_is_refused(refused, model, tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # as root: let the system call fail instead

        def denied(self: Path, *_: object, **__: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "write_bytes", denied)
    assert str(folder) in refused(*model_arguments(model), output=folder)


def test_a_full_disk_at_the_start_is_said_to_be_full_and_left_empty(refused, model, tmp_path, monkeypatch):
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "full" in refused(*model_arguments(model))


@pytest.mark.parametrize("victim", ["savefig", "write_text"])
def test_a_disk_that_gets_full_leaves_no_half_written_file(model, tmp_path, monkeypatch, capsys, victim):
    from matplotlib.figure import Figure

    output = tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        # What was written so far is there, under its temporary name.
        (temporary,) = [argument for argument in _ if isinstance(argument, Path)]
        with temporary.open("wb") as stream:
            stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    monkeypatch.setattr(*((Figure, "savefig", full) if victim == "savefig" else (Path, "write_text", full)))
    assert main(["evaluate", "-o", str(output), *model_arguments(model)]) == 2
    assert "full" in capsys.readouterr().err.splitlines()[-1]
    # What could be written is whole.
    files = {file.name: file.read_bytes() for file in output.rglob("*") if file.is_file()} if output.exists() else {}
    assert b"half" not in files.values()
    tables = {"samples.csv", "cases.csv", "table.md", "summary.json"}
    assert tables & files.keys() == (tables if victim == "savefig" else set())


def test_an_older_report_is_not_mixed_with_half_of_a_newer_one(model, tmp_path, monkeypatch, capsys):
    """A summary.json stands for a complete set: it must not outlive the tables it was made with."""
    output = tmp_path / "out"
    with quiet():
        assert main(["evaluate", "-o", str(output), *model_arguments(model)]) == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    original = Path.write_text

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        if "cases.csv" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["evaluate", "--merge", "-o", str(output)]) == 2
    after = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert output / "summary.json" not in after or after == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a tmpfs")
def test_a_really_full_disk(refused, model, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (mount / "other").write_bytes(b"\0" * 8192)
        sentence = refused(*model_arguments(model), output=mount / "out")
        assert "full" in sentence
    except OSError:
        pytest.skip("the small disk could not be filled")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# ---- other commands


def test_demo_refuses_a_folder_that_is_no_task(capsys, tmp_path):
    assert main(["demo", "--data", str(tmp_path), "-o", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err.startswith("nnunet_ima: ")


def test_a_trainer_that_cannot_be_looked_up_says_why(model, data, refused, monkeypatch):
    """torchvision for another torch: nnU-Net's own trainers then do not import, and none is found."""

    def broken(_: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("nnunet_ima.evaluation.environment.recursive_find_trainer_class_by_name", broken)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainer_2epochs"}, model / "fold_0" / "checkpoint_final.pth")
    sentence = refused("-m", str(model), *SHORT)
    assert "could not look up the trainer nnUNetTrainer_2epochs (operator torchvision::nms does not exist)" in sentence
    assert "There is no trainer" not in sentence


def test_an_unknown_trainer_setting_does_not_hinder_the_evaluation(project, model, tmp_path):
    """A model trained by a later version may hold settings that this one does not know."""
    plans = read(model / "plans.json")
    plans["configurations"]["2d_tiny"]["nnunet_ima"]["from_the_future"] = 1
    write(model / "plans.json", plans)
    with quiet():
        assert main(["evaluate", "-o", str(tmp_path / "out"), *model_arguments(model)]) == 0


def test_a_network_that_gives_no_numbers_leaves_nothing_behind(refused, model):
    """It fails at the first sample, when the run has begun already."""
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"] = {
        key: value * float("nan") if value.is_floating_point() else value
        for key, value in checkpoint["network_weights"].items()
    }
    torch.save(checkpoint, file)
    assert "NaN" in refused(*model_arguments(model))
