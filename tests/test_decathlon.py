"""The Decathlon study: the paper's set-up, what is said to differ from it, its cost, its jobs, its table."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from finished_run import finish
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.crossval_split import generate_crossval_split
from results_of_runs import make_run
from torch import nn

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import decathlon_study
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.command_line import _parser, main
from nnunet_ima.evaluation.decathlon_study import STEPS, DecathlonStudy, Request, table
from nnunet_ima.evaluation.decathlon_study.cost import (
    Planned,
    attack_passes,
    count_slices,
    read_planned,
    training_cost,
)
from nnunet_ima.evaluation.decathlon_study.differences import ALWAYS, of_study, of_task
from nnunet_ima.evaluation.decathlon_study.dry_run import describe
from nnunet_ima.evaluation.decathlon_study.evaluations import NAMES, NOISE, PGD100, evaluations_of
from nnunet_ima.evaluation.decathlon_study.study import METHODS, TaskStudy
from nnunet_ima.evaluation.decathlon_study.tasks import TASKS, GivenTask, find_tasks
from nnunet_ima.evaluation.finished import asked_for
from nnunet_ima.evaluation.most_passes import most_passes
from nnunet_ima.evaluation.report.published import published_rows
from nnunet_ima.evaluation.steps import Steps
from nnunet_ima.evaluation.study import exclusive
from nnunet_ima.threat import ThreatModel

REPORT = Path(decathlon_study.__file__).parents[1] / "report"
FAST = "pgd:steps=2"


def a_task(raw: Path, name: str, cases: int, channels: int = 1, classes: int = 2, labels: bool = False) -> Path:
    """A task folder whose scans are empty files; the labels are real if asked for."""
    folder = raw / name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
        for number in range(cases):
            (folder / part / f"case_{number:03d}.nii.gz").touch()
    for number in range(cases) if labels else ():
        array = np.zeros((6, 8, 10), np.uint8)
        array[1 : 3 + number % 3, 2:5, 3:7] = 1 + number % classes
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / "labelsTr" / f"case_{number:03d}.nii.gz"))
    description = {
        "description": "made up",
        "modality": {str(number): "MRI" for number in range(channels)},
        "labels": {"0": "background", **{str(number + 1): f"part {number}" for number in range(classes)}},
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def given_task(number: int, cases: int) -> GivenTask:
    names = tuple(f"case_{i:03d}" for i in range(cases))
    return GivenTask(TASKS[number], Path(f"Task{number:02d}_{TASKS[number].name}"), names, "", 1, 2)


# ---- the paper's set-up


@pytest.mark.parametrize(("number", "training", "validation", "test"), [(2, 16, 1, 3), (4, 208, 17, 35), (5, 25, 2, 5)])
def test_with_the_decathlon_s_cases_the_split_has_the_paper_s_sizes(number, training, validation, test):
    task = given_task(number, TASKS[number].cases)
    split = task.split
    assert (len(split.training), len(split.validation), len(split.test)) == (training, validation, test)
    # It is nnU-Net's own fold 0, so that a training here learns from the cases that any nnU-Net training would.
    fold = generate_crossval_split(list(task.cases), seed=12345, n_splits=5)[0]
    assert list(split.training) == sorted(fold["train"])


@given(st.sampled_from(list(TASKS)), st.integers(5, 60))
def test_any_number_of_cases_is_shared_out_and_something_is_left_to_attack(number, cases):
    task = given_task(number, cases)
    split = task.split
    assert sorted([*split.training, *split.validation, *split.test]) == list(task.cases)
    assert len(split.test) >= max(1, len(split.validation))
    assert split.as_fold == {"train": list(split.training), "val": list(split.test)}


@pytest.mark.parametrize(
    ("number", "sound", "paper", "epsilon", "delta"),
    [(2, "5 15 25", "10 20 30", 20, 5), (4, "1 5 10 15", "5 15 25", 15, 2), (5, "10 20 40", "10 20 30", 40, 10)],
)
def test_levels_and_noise_are_the_paper_s(number, sound, paper, epsilon, delta):
    found = {one.name: one for one in evaluations_of(TASKS[number])}
    assert list(found) == list(NAMES)
    assert found["sound_l2"].levels == sound.split()
    assert found["paper_l2"].levels == paper.split()
    assert found["paper_linf"].levels == ["2/255", "4/255", "8/255"]
    assert found["paper_linf_noise"].levels == ["8/255", "16/255", "32/255"]
    assert [(one.protocol, one.norm) for one in found.values()] == [
        ("sound", "l2"), ("paper", "l2"), ("paper", "linf"), ("paper", "linf"),
    ]  # fmt: skip
    assert {attack.partition(":")[0] for attack in found["sound_l2"].attacks} == {"white-noise", "pgd", "autoattack"}
    assert (TASKS[number].epsilon, TASKS[number].delta_epsilon) == (epsilon, delta)


def test_results_of_another_attack_or_of_fewer_samples_have_another_folder():
    names = [
        {one.name for one in evaluations_of(TASKS[4], attack, samples)}
        for attack in ("autoattack:version=standard", "autoattack:version=fast", FAST)
        for samples in (None, 5)
    ]
    # White noise alone does not depend on the strong attack.
    assert len(set.union(*names)) == 3 * 2 * 3 + 2
    assert all(re.fullmatch(r"[\w.-]+", name) and "__" not in name for found in names for name in found)


# ---- differences


def plans_as(number: int, **changed: Any) -> Planned:
    paper = TASKS[number]
    like: dict[str, Any] = {
        "batch_size": paper.batch_size, "patch_size": paper.patch_size, "original_shape": paper.median_shape,
        "slice_shape": paper.median_shape[1:], "slice_axis": 0,
    }  # fmt: skip
    return Planned(**{**like, **changed})


def test_the_paper_s_own_data_and_plans_have_no_difference_of_their_own(tmp_path):
    a_task(tmp_path, "Task04_Hippocampus", 260)
    (task,) = find_tasks(tmp_path, [4])
    assert of_task(task, None, plans_as(4)) == []
    told = of_study({"num_epochs": 50, "num_iterations_per_epoch": 50}, [], None, "autoattack:version=standard", None)
    assert told[1:] == list(ALWAYS)


def test_each_difference_is_said(tmp_path):
    a_task(tmp_path, "Task05_ProstateT2_5cases", 5, classes=1)
    (task,) = find_tasks(tmp_path, [5])
    planned = plans_as(5, batch_size=12, patch_size=(384, 320), original_shape=(19, 384, 384))
    text = "\n".join(of_task(task, None, planned))
    for part in (
        "Task05_ProstateT2_5cases stands in for the Decathlon's Task05_Prostate", "'made up'",
        "5 cases, the paper had 32: 4 for training, 0 left aside, 1 attacked, instead of 25, 2 and 5.",
        "1 channel, the Decathlon's scans have 2.", "1 foreground class, the Decathlon's labels have 2.",
        "batches of 12 for these scans, the paper's had 32", "patches of 384 x 320, the paper's had 320 x 320",
        "19 x 384 x 384 voxels, the paper's had 20 x 320 x 319",
    ):  # fmt: skip
        assert part in text
    text = "\n".join(of_task(task, 8, planned))
    assert "batches of 8, the paper's 32" in text
    assert "batches of 12" not in text
    assert "has not planned yet" in "\n".join(of_task(task, None, None))
    settings = {"num_epochs": 2, "num_iterations_per_epoch": 3, "steps": 4}
    text = "\n".join(of_study(settings, ["steps"], 8, FAST, 10))
    for part in (
        "2 epochs of 3 iterations, the paper's trainings had 50 of 50", "8 features in its first stage",
        "setting steps is 4", "strong attack is pgd:steps=2, not AutoAttack", "At most 10 slices",
    ):  # fmt: skip
        assert part in text


# ---- cost


class Counting(nn.Module):
    """Counts samples forwards and backwards; never wrong."""

    def __init__(self, target: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.right, self.counts = nn.functional.one_hot(target[:, 0], classes).movedim(-1, 1).float() * 9, Counter()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.counts["forward"] += len(images)
        shifted = self.right + 0.01 * images * torch.arange(self.right.shape[1]).reshape(1, -1, 1, 1)
        if shifted.requires_grad:
            shifted.register_hook(lambda gradient: self.counts.update(backward=len(gradient)))
        return shifted


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "attack",
    ["white-noise:draws=7", "pgd:steps=5,restarts=2", "autoattack:version=fast", "square:n_queries=9", "fgsm",
     "apgd-t:steps=4", "fab:steps=3"],
)  # fmt: skip
def test_passes_of_an_attack_are_those_that_a_network_counts(attack, norm):
    target = torch.arange(25).reshape(1, 1, 5, 5) % 3
    network = Counting(target, 3)
    parse_attack(attack).make(ThreatModel(norm, 0.02))(network, torch.zeros(1, 1, 5, 5), target)
    assert most_passes(attack, 2) == network.counts["forward"] + network.counts["backward"]


def test_passes_of_autoattack_are_those_of_its_members():
    members = ["apgd"] * 5 + ["apgd:schedule=shrinking", "apgd-t", "fab", "square"]
    assert most_passes("autoattack:version=standard", 2) == 1 + sum(most_passes(name, 2) - 1 for name in members)


def test_attack_passes_add_up_over_samples_levels_and_attacks():
    for evaluation in evaluations_of(TASKS[4], FAST):
        total = 0
        for _ in range(3):
            total += 1 + (evaluation.protocol == "paper")
            for _ in evaluation.levels:
                for attack in evaluation.attacks:
                    total += {NOISE: 101, PGD100: 202, FAST: 6}[attack]
        assert attack_passes(evaluation, samples=3, classes=2) == total


@pytest.mark.parametrize("method", METHODS)
def test_passes_of_a_training_add_up_over_its_steps(method):
    settings = {"num_epochs": 3, "num_iterations_per_epoch": 4, "steps": 5, "bisections": 2}
    fewest = most = 0
    for _ in range(3):
        for _ in range(4):
            for _ in range(6):
                low, high = {"STD": (1, 1), "SAT": (6, 6), "TE": (6, 7), "TRADES": (7, 7), "IMA": (1, 10)}[method]
                fewest, most = fewest + low, most + high
    assert training_cost(method, settings, 6).passes == (fewest, most)


def test_without_settings_the_passes_are_those_of_the_documentation():
    paper = {"num_epochs": 50, "num_iterations_per_epoch": 50}
    found = {method: training_cost(method, paper, 366) for method in METHODS}
    assert {method: (cost.fewest, cost.most) for method, cost in found.items()} == {
        "STD": (1, 1), "SAT": (21, 21), "TE": (21, 22), "TRADES": (12, 12), "IMA": (1, 33),
    }  # fmt: skip
    assert found["STD"].passes == (915_000, 915_000)


def test_slices_with_foreground_are_counted_along_the_axis_of_the_thickest_slices(tmp_path):
    folder = a_task(tmp_path, "Task04_Tiny", 5)
    array = np.zeros((4, 6, 8), np.uint8)
    array[1, 2:5, 3:8] = 2
    image = SimpleITK.GetImageFromArray(array)
    for spacing, expected in (((1, 1, 3), 1), ((1, 4, 3), 3), ((5, 1, 3), 5), ((1, 1, 1), 1)):
        image.SetSpacing(spacing)  # x, y, z
        SimpleITK.WriteImage(image, str(folder / "labelsTr" / "case_000.nii.gz"))
        (task,) = find_tasks(tmp_path, [4])
        assert count_slices(task, ["case_000"]) == expected
        assert [count_slices(task, ["case_000"], axis) for axis in range(3)] == [1, 3, 5]


def test_plans_tell_batch_patch_shape_and_tiles_of_a_slice():
    plans = {
        "original_median_shape_after_transp": [115, 320.0, 320],
        "transpose_forward": [1, 0, 2],
        "configurations": {
            "2d": {"batch_size": 40, "patch_size": [320, 256], "median_image_size_in_voxels": [115.0, 320.0, 320.0]}
        },
    }
    planned = read_planned(plans)
    assert planned == Planned(40, (320, 256), (115, 320, 320), (320, 320), 1)
    assert planned.tiles_a_slice == 2
    plans["configurations"]["2d"]["median_image_size_in_voxels"] = [300.0, 250.0]
    assert read_planned(plans).tiles_a_slice == 1


# ---- looking without doing


@pytest.fixture
def raw(tmp_path) -> Path:
    """Two of the paper's tasks, five cases each."""
    a_task(tmp_path / "raw", "Task02_Heart_5cases", 5, classes=1, labels=True)
    a_task(tmp_path / "raw", "Task04_Hippocampus", 5, labels=True)
    return tmp_path / "raw"


@pytest.fixture
def command(raw, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command on both; status, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        fixed = ["decathlon", "--raw", str(raw), "-o", str(tmp_path / "out"), "-device", "cpu", "--attack", FAST]
        status = main([*fixed, *([] if "--tasks" in arguments else ["--tasks", "2", "4"]), *arguments])
        return status, *capsys.readouterr()

    return run


def test_a_dry_run_shows_every_step_with_its_command_and_cost_and_leaves_nothing(command, tmp_path):
    status, text, _ = command("--dry-run", "--methods", "STD", "IMA")
    assert status == 0
    assert not (tmp_path / "out").exists()
    counts = Counter(re.findall(r"\[to do\] (\w+)", text))
    assert counts == {"convert": 2, "plan": 2, "train": 4, "evaluate": 16}
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("      ")]
    assert [Path(found[0]).name for found in commands].count("nnUNetv2_train") == 4
    assert "2d_IMA" in text
    assert "-tr nnUNetTrainerIMA -p nnUNetPlansDecathlon" in text
    assert "nnUNet_raw=" in text
    assert "Task02_Heart_5cases stands in for" in text
    assert all(sentence in text for sentence in ALWAYS)
    # The total is the sum of the parts.
    (low, high, attacks) = re.findall(r"in all: ([\d,]+) to ([\d,]+) passes of training, at most ([\d,]+)", text)[0]
    parts = re.findall(r"passes a sample and step: .*?, in all ([\d,]+)(?: to ([\d,]+))?$", text, re.MULTILINE)

    def number(words: str) -> int:
        return int(words.replace(",", ""))

    assert number(low) == sum(number(part[0]) for part in parts)
    assert number(high) == sum(number(part[1] or part[0]) for part in parts)
    assert number(attacks) == sum(map(number, re.findall(r"slices, at most ([\d,]+) passes", text)))
    # 2 and 4 hold one attacked case each, whose slices with foreground are few.
    assert set(map(int, re.findall(r": (\d+) slices, at most", text))) <= {2, 3, 4}


def test_what_is_done_or_skipped_costs_nothing(command, tmp_path):
    everything = command("--dry-run", "--methods", "STD", "--tasks", "4")[1]
    logs = tmp_path / "out" / "Task04" / "logs_nnUNetTrainerSTD"
    logs.mkdir(parents=True)
    (tmp_path / "out" / "study.json").write_text(
        json.dumps({"features": None, "batch size": None, "epochs": 50, "iterations": 50, "settings": {}})
    )
    (logs / "train_STD.done").write_text("{}")
    text = command("--dry-run", "--methods", "STD", "--tasks", "4")[1]
    assert "[done] train STD" in text
    assert re.search(r"in all: 0 passes of training, at most [1-9]", text)
    assert "[to do] train STD" in everything
    text = command("--dry-run", "--methods", "STD", "--tasks", "4", "--skip", "evaluate", "plan")[1]
    assert "[skipped] plan" in text
    assert "[skipped] evaluate STD" in text
    assert "in all: 0 passes of training, at most 0 of attacks" in text


def test_jobs_are_commands_that_make_the_same_study_in_the_order_of_their_needs(command, raw, tmp_path):
    options = ["--features", "8", "--batch-size", "4", "--epochs", "3", "--iterations", "2", "--samples", "6",
               "--set", "steps=3", "boundary_search=origin", "--evaluations", "sound_l2", "--workers", "2",
               "--compile"]  # fmt: skip
    status, text, _ = command("--print-jobs", "--methods", "STD", "IMA", *options)
    assert status == 0
    assert not (tmp_path / "out").exists()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    parsed = [_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    # Preparation of two tasks, four trainings, four evaluations, one report.
    assert [tuple(job.only) for job in parsed] == [
        *[("convert", "plan")] * 2, *[("train",)] * 4, *[("evaluate",)] * 4, ("report",)
    ]  # fmt: skip
    assert Counter((job.tasks[0], job.methods[0]) for job in parsed if job.only == ["train"]) == {
        (2, "STD"): 1, (2, "IMA"): 1, (4, "STD"): 1, (4, "IMA"): 1,
    }  # fmt: skip
    assert (parsed[-1].tasks, parsed[-1].methods) == ([2, 4], ["STD", "IMA"])
    wanted = _parser().parse_args(["decathlon", "--raw", str(raw), "-o", str(tmp_path / "out"), "-device", "cpu",
                                   "--attack", FAST, *options])  # fmt: skip
    for job in parsed:
        for name in ("raw", "output", "device", "attack", "features", "batch_size", "epochs", "iterations", "samples",
                     "evaluations", "workers", "compile"):  # fmt: skip
            assert getattr(job, name) == getattr(wanted, name), name
        assert sorted(job.set) == ['boundary_search="origin"', "steps=3"]
    assert text.count("# ") == 4
    only = command("--print-jobs", "--only", "train", "--methods", "STD", "IMA", *options)[1]
    assert only.splitlines()[1:] == [line for line in lines if "--only train" in line]


def test_jobs_choose_their_own_device_unless_one_is_given(raw, tmp_path, capsys):
    """The node on which they are printed may have no GPU, or another kind."""
    how = ["decathlon", "--raw", str(raw), "-o", str(tmp_path / "out"), "--tasks", "4", "--print-jobs"]
    assert main(how) == 0
    assert "-device" not in capsys.readouterr().out
    assert main([*how, "-device", "cuda"]) == 0
    jobs = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert all("-device cuda" in line for line in jobs)
    assert a_study(raw, tmp_path / "out").tasks[0].pipeline.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_labels_that_cannot_be_read_end_a_dry_run_with_one_sentence(command, raw, tmp_path):
    for file in (raw / "Task04_Hippocampus" / "labelsTr").iterdir():
        file.write_bytes(file.read_bytes()[:30])
    status, _, error = command("--dry-run", "--tasks", "4")
    assert status == 2
    assert error.count("\n") == 1
    assert re.search(r"labelsTr/case_00\d\.nii\.gz cannot be read; restore the file", error)
    assert not (tmp_path / "out").exists()


# ---- what a user can get wrong


def test_wrong_input_ends_with_one_sentence(command, raw, tmp_path):
    def refused(*arguments: str) -> str:
        status, _, error = command(*arguments)
        assert status == 2
        assert error.startswith("nnunet_ima: ")
        assert error.count("\n") == 1
        return error

    assert "Task 3 is none of the paper's; choose among 2, 4, 5" in refused("--tasks", "3")
    assert "no folder of task 5, such as Task05_Prostate" in refused("--tasks", "5")
    assert "--set has the unknown setting 'stepz'" in refused("--set", "stepz=3")
    assert "There is no attack 'pgdd'" in refused("--attack", "pgdd")
    assert "step convert of Task02 is not done yet" in refused("--skip", "convert")
    a_task(raw, "Task04_Other", 5)
    assert "several folders of task 4 (Task04_Hippocampus and Task04_Other)" in refused()
    a_task(raw, "Task05_Prostate", 4)
    assert "has 4 cases; nnU-Net's 5 folds need at least 5" in refused("--tasks", "5")
    (raw / "Task05_Prostate" / "labelsTr" / "case_000.nii.gz").unlink()
    assert "case case_000 has a scan or a label but not both" in refused("--tasks", "5")
    (raw / "Task05_Prostate" / "dataset.json").unlink()
    assert "it has no dataset.json" in refused("--tasks", "5")


def test_a_prostate_with_one_channel_works_and_is_said(command, raw):
    a_task(raw, "Task05_ProstateT2_5cases", 5, labels=True)
    status, text, _ = command("--dry-run", "--tasks", "5", "--methods", "STD")
    assert status == 0
    assert "1 channel, the Decathlon's scans have 2." in text


def a_study(raw: Path, output: Path, **changed: Any) -> DecathlonStudy:
    like: dict[str, Any] = {"tasks": (2, 4), "attack": FAST, "epochs": 2}
    return DecathlonStudy(Request(raw, output, **{**like, **changed}))


def begun(raw: Path, output: Path) -> None:
    """As a study leaves it that was stopped at once."""
    study = a_study(raw, output)
    study._note_identity()
    for task in study.tasks:
        task.begin()


def test_a_folder_of_another_study_is_refused_and_the_same_one_goes_on(raw, tmp_path):
    begun(raw, tmp_path / "out")
    a_study(raw, tmp_path / "out", attack="fgsm", tasks=(4,), methods=("IMA",), samples=3, jobs=2)
    for changed, difference in (
        ({"epochs": 3}, "epochs: 2 there, 3 here"),
        ({"features": 8}, "features: None there, 8 here"),
        ({"settings": {"steps": 3}}, "settings steps: None there, 3 here"),
    ):
        with pytest.raises(UserError, match=difference):
            a_study(raw, tmp_path / "out", **changed)
    other = tmp_path / "other"
    other.mkdir()
    a_study(raw, other)
    (other / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else than a study"):
        a_study(raw, other)


def test_other_scans_of_the_same_task_are_refused(raw, tmp_path):
    begun(raw, tmp_path / "out")
    for part in ("imagesTr", "labelsTr"):
        (raw / "Task04_Hippocampus" / part / "case_005.nii.gz").touch()
    a_study(raw, tmp_path / "out", tasks=(2,))
    with pytest.raises(UserError, match="begun with other scans"):
        a_study(raw, tmp_path / "out")


@pytest.mark.parametrize("held", ["logs", "logs_nnUNetTrainerIMA"])
def test_two_studies_at_once_are_refused_before_either_does_anything(raw, tmp_path, held, monkeypatch):
    study = a_study(raw, tmp_path / "out", tasks=(4,))
    monkeypatch.setattr("nnunet_ima.evaluation.steps.Steps.run", lambda *_: pytest.fail("something was run"))
    with (
        exclusive(tmp_path / "out" / "Task04" / held, "it"),
        pytest.raises(UserError, match="Another study is at work on"),
    ):
        study.run()


def test_jobs_of_other_methods_may_run_beside(raw, tmp_path):
    study = a_study(raw, tmp_path / "out", tasks=(4,), methods=("STD",), steps=("train",))
    with (
        exclusive(tmp_path / "out" / "Task04" / "logs_nnUNetTrainerIMA", "it"),
        pytest.raises(UserError, match="step plan of Task04 is not done yet"),
    ):
        study.run()


def test_what_is_not_trained_cannot_be_evaluated(raw, tmp_path):
    begun(raw, tmp_path / "out")
    study = a_study(raw, tmp_path / "out", tasks=(4,), methods=("STD",), steps=("evaluate",))
    task = study.tasks[0]
    (task.pipeline.logs / "plan.done").write_text("{}")
    task.dataset.mkdir(parents=True)
    (task.dataset / "nnUNetPlansDecathlon.json").write_text("{}")
    with pytest.raises(UserError, match="STD of Task04 is not trained yet"):
        study.run()


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Tasks and steps; commands are replaced by as much of what they leave as the next one asks for."""
    found: list[str] = []

    def run(self: Steps, step: str, command: list[str], *_: Any) -> None:
        task = self.logs.parent
        found.append(f"{task.name} {step}")
        dataset = {"Task02": "Dataset002_Heart5cases", "Task04": "Dataset004_Hippocampus"}[task.name]
        if step == "plan":
            folder = task / "nnUNet_preprocessed" / dataset
            folder.mkdir()
            planned = {
                "batch_size": 9, "patch_size": [40, 56], "median_image_size_in_voxels": [36, 50, 35],
                "architecture": {"arch_kwargs": {"n_stages": 2}},
            }  # fmt: skip
            shape = {"original_median_shape_after_transp": [36, 50, 35], "transpose_forward": [0, 1, 2]}
            (folder / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"2d": planned}, **shape}))
        if command[0] == "nnUNetv2_train":
            fold = task / "nnUNet_results" / dataset / f"{command[5]}__nnUNetPlansDecathlon__{command[2]}" / "fold_0"
            fold.mkdir(parents=True)
            (fold / "checkpoint_final.pth").write_text(command[5])
        if command[1] == "evaluate":
            finish(task / step, command)

    monkeypatch.setattr(Steps, "run", run)
    return found


def test_each_step_is_run_unless_it_is_skipped(raw, tmp_path, ran):
    """With nnU-Net's commands replaced by notes of what would have been run."""
    steps_before_report = STEPS[:-1]

    def run(*steps: str, **more: Any) -> list[str]:
        ran.clear()
        a_study(raw, tmp_path / "out", tasks=(4,), steps=steps, methods=("STD", "IMA"), **more).run()
        return [step.removeprefix("Task04 ") for step in ran]

    assert run("convert") == ["convert"]
    assert run("convert", "plan") == ["plan"]
    assert run("train") == ["train_STD", "train_IMA"]
    found = run(*steps_before_report)
    assert [step for step in found if not step.startswith(tuple(NAMES))] == []
    assert len(found) == 8
    assert run(*steps_before_report) == []
    # Another attack is another evaluation, of the same trainings.
    assert len(run(*steps_before_report, attack="fgsm", evaluations=("sound_l2",))) == 2
    dataset = tmp_path / "out" / "Task04" / "nnUNet_preprocessed" / "Dataset004_Hippocampus"
    plans = json.loads((dataset / "nnUNetPlansDecathlon.json").read_text())["configurations"]
    # All methods are in the plans, so that jobs for one of them never write what another one reads.
    assert {name for name in plans if name != "2d"} == {f"2d_{name}" for name in METHODS}
    assert plans["2d_TE"]["nnunet_ima"]["epsilon"] == 15
    (fold,) = json.loads((dataset / "splits_final.json").read_text())
    assert fold == a_study(raw, tmp_path / "out").tasks[1].given.split.as_fold


def test_what_was_measured_stays_done_on_another_device_and_in_a_folder_that_was_moved(raw, tmp_path, ran):
    how: dict[str, Any] = {"tasks": (4,), "methods": ("STD", "IMA")}
    a_study(raw, tmp_path / "out", steps=STEPS[:-1], device="cpu", **how).run()
    assert len(ran) == 2 + 2 + 2 * 4

    def kept(out: Path) -> dict[str, bytes]:
        files = (file for name in NAMES for file in out.glob(f"Task04/{name}_*/*.json"))
        return {str(file.relative_to(out)): file.read_bytes() for file in files}

    before = kept(tmp_path / "out")
    assert len(before) == 2 * 2 * 4
    a_study(raw, tmp_path / "out", steps=STEPS[:-1], device="cuda", **how).run()
    (tmp_path / "out").rename(tmp_path / "moved")
    raw.rename(tmp_path / "scans")
    for steps in (("evaluate",), STEPS[:-1]):
        a_study(tmp_path / "scans", tmp_path / "moved", steps=steps, device="cpu", **how).run()
    assert len(ran) == 2 + 2 + 2 * 4
    assert kept(tmp_path / "moved") == before
    # A dry run knows it.
    text = describe(a_study(tmp_path / "scans", tmp_path / "moved", device="cuda", **how))
    assert Counter(re.findall(r"^  \[([a-z ]+)\] ", text, re.MULTILINE)) == {"done": 2 + 2 + 2 * 4}
    assert "in all: 0 passes of training, at most 0 of attacks" in text


def test_results_of_a_model_that_was_trained_anew_are_refused_and_a_dry_run_says_so(raw, tmp_path, ran):
    how: dict[str, Any] = {"tasks": (4,), "methods": ("STD", "IMA"), "evaluations": ("sound_l2",)}
    study = a_study(raw, tmp_path / "out", steps=STEPS[:-1], **how)
    study.run()
    (weights,) = study.tasks[0].pipeline.folders["nnUNet_results"].glob("*/*IMA__*/fold_0/checkpoint_final.pth")
    weights.write_text("others")
    ran.clear()
    results = study.tasks[0].output / "sound_l2_pgd-steps-2_IMA"
    before = {file: file.read_bytes() for file in results.iterdir()}
    with pytest.raises(UserError, match=r"1 of 2 jobs failed \(Task04 IMA: .* another evaluation \(model sha256"):
        a_study(raw, tmp_path / "out", steps=STEPS[:-1], **how).run()
    assert ran == []
    assert {file: file.read_bytes() for file in results.iterdir()} == before
    text = describe(a_study(raw, tmp_path / "out", steps=STEPS[:-1], **how))
    assert re.search(r"\[done\] evaluate STD", text)
    assert re.search(r"\[refused\] evaluate IMA, .*: .* another evaluation \(model sha256: .* with -o\.$", text, re.M)
    assert "at most 0 of attacks" in text
    text = describe(a_study(raw, tmp_path / "out", steps=("train",), **how))
    assert "[skipped] evaluate IMA" in text


def test_a_report_leaves_out_results_of_another_model_and_says_so(raw, tmp_path, monkeypatch):
    how: dict[str, Any] = {"methods": ("STD", "IMA"), "evaluations": ("paper_linf",), "attack": "apgd:steps=4"}
    study = a_study(raw, tmp_path / "out", tasks=(4,), steps=("report",), **how)
    (task,) = study.tasks
    (attacks,) = task.study.evaluations
    for method in task.methods:
        command = task.pipeline.evaluate_command(task.dataset, method, attacks)
        weights = task.pipeline.fold_folder(task.dataset, method) / "checkpoint_final.pth"
        weights.parent.mkdir(parents=True)
        weights.write_text(method.title)
        make_run(
            task.pipeline.results(method, attacks), protocol="paper", norm="linf", cases=2,
            attacked={"2/255": 0.8, "4/255": 0.7, "8/255": 0.6}, whole_cases=False,
            asked=asked_for(command),
        )  # fmt: skip
    study._note_identity()

    pages: list[list[str]] = []

    def write_report(runs: Any, output: Path, titles: list[str], note: str) -> Path:
        pages.append(titles)
        return output

    monkeypatch.setattr("nnunet_ima.evaluation.study.write_report", write_report)

    def tabled() -> set[str]:
        return {row["method"] for row in csv.DictReader((tmp_path / "out" / "decathlon.csv").read_text().splitlines())}

    study.run()
    assert tabled() == {"STD", "IMA"}
    weights.write_text("others")
    with pytest.raises(UserError, match=r"^1 of 2 models have results left out of the report \(Task04 IMA: .* sha256"):
        study.run()
    assert tabled() == {"STD"}
    assert pages == [["STD", "IMA"], ["STD"]]


def test_a_task_that_cannot_be_prepared_does_not_keep_the_others_from_their_work(raw, tmp_path, ran, monkeypatch):
    run = Steps.run

    def refuse(self: Steps, step: str, *arguments: Any) -> None:
        if f"{self.logs.parent.name} {step}" == "Task02 plan":
            raise UserError("The step plan failed: case_001 has another spacing.")
        run(self, step, *arguments)

    monkeypatch.setattr(Steps, "run", refuse)
    reported: list[str] = []
    monkeypatch.setattr(DecathlonStudy, "report", lambda _: reported.append("the report") or "the report")
    with pytest.raises(UserError) as error:
        a_study(raw, tmp_path / "out", methods=("STD",), evaluations=("sound_l2",)).run()
    assert "1 of 2 tasks could not be prepared (Task02: The step plan failed: case_001 has another spacing)" in str(
        error.value
    )
    assert "jobs failed" not in str(error.value)
    assert ran == [
        "Task02 convert",
        "Task04 convert",
        "Task04 plan",
        "Task04 train_STD",
        "Task04 sound_l2_pgd-steps-2_STD",
    ]
    assert reported == ["the report"]


def test_one_job_that_fails_does_not_keep_the_others_from_running(raw, tmp_path, monkeypatch):
    ran: list[str] = []

    def run(self: Any, step: str, *_: Any) -> None:
        ran.append(step)
        if step == "train_STD":
            raise UserError("The step train_STD failed: no memory.")

    monkeypatch.setattr("nnunet_ima.evaluation.steps.Steps.run", run)
    begun(raw, tmp_path / "out")
    study = a_study(raw, tmp_path / "out", tasks=(4,), methods=("STD", "IMA"), steps=("train",))
    task = study.tasks[0]
    (task.pipeline.logs / "plan.done").write_text("{}")
    task.dataset.mkdir(parents=True)
    (task.dataset / "nnUNetPlansDecathlon.json").write_text("{}")
    with pytest.raises(UserError, match=r"1 of 2 jobs failed \(Task04 STD: .* no memory\)"):
        study.run()
    assert sorted(ran) == ["train_IMA", "train_STD"]


# ---- the table


def test_a_description_that_is_html_is_shown_in_the_page_of_all_tasks(tmp_path, monkeypatch):
    folder = a_task(tmp_path / "raw", "Task04_HippocampusB", 5, labels=True)
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**about, "description": "<img src=x onerror=alert(1)>&"}))
    study = a_study(tmp_path / "raw", tmp_path / "out", tasks=(4,), methods=("STD",), evaluations=("sound_l2",))
    rows = table.rows_of(4, "STD", 15.0, summary_of(tmp_path / "run", dataset="<b>"))
    monkeypatch.setattr(TaskStudy, "rows", lambda _: rows)
    monkeypatch.setattr(TaskStudy, "pages", lambda *_: [])
    (tmp_path / "out").mkdir()
    study.report()
    text = (tmp_path / "out" / "decathlon.md").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)>&amp;" in text
    assert "### &lt;b>, protocol" in text
    assert not re.search("<[a-z]", text)


def theirs(file: str) -> list[dict[str, str]]:
    return list(csv.DictReader((REPORT / file).read_text(encoding="utf-8").splitlines()))


def test_the_mean_is_table_3_s_avg():
    compared = 0
    for row in theirs("table3.csv"):
        cells = [row["clean"], row["dice1"], row["dice2"], row["dice3"]]
        if row["avg"] and all(cells):
            levels = {str(number): float(cell) for number, cell in enumerate(cells[1:])}
            # Their own cells are rounded; some means are off by a few hundredths.
            assert table._mean(float(cells[0]), levels) == pytest.approx(float(row["avg"]), abs=0.06)
            compared += 1
    assert compared > 40
    assert table._mean(90.0, {"5": None}) is None


def summary_of(folder: Path, **how: Any) -> dict[str, Any]:
    return dict(json.loads((make_run(folder, **how) / "summary.json").read_text(encoding="utf-8")))


def test_figures_stand_beside_those_of_the_same_protocol_kind_of_attack_and_level(tmp_path):
    auto, noise, content = "autoattack:version=standard", NOISE, "autoattack:version=standard,mode=threshold"
    how = {"protocol": "paper", "clean": 0.9, "clamped": 0.85, "attacked": {"5": 0.7, "15": 0.6, "40": 0.5}}
    summary = summary_of(tmp_path / "paper", **how, further=dict.fromkeys((auto, noise, content), how["attacked"]))
    rows = {row.attack: row for row in table.rows_of(4, "IMA", 15.0, summary)}
    measured = {(one["attack"], one["level"]): 100 * one["tvdi"] for one in summary["results"]}
    row = rows[auto]
    assert dict(row.published) == {"clean": 85.90, "5": 78.01, "15": 70.49}
    assert "Table 3: AutoAttack" in row.source
    assert list(row.tvdi) == ["clean", "clamp only", "5", "15", "40", "mean"]
    assert row.tvdi["15"] == measured[auto, "15"]
    values = [row.tvdi[name] for name in ("clean", "5", "15", "40")]
    assert row.tvdi["mean"] == pytest.approx(sum(values) / 4)
    assert dict(rows[noise].published) == {"clean": 85.90, "5": 82.19, "15": 81.66}
    # Once a sample is wrong this one leaves it, so its figures are higher than those of an attacker like theirs.
    assert (rows[content].published, rows[content].source) == ({}, "")
    # Nobody published APGD with four steps.
    assert (rows["apgd:steps=4"].published, rows["apgd:steps=4"].source) == ({}, "")
    markdown = table.as_markdown(list(rows.values()))
    assert f"{row.tvdi['15']:.1f} (70.49)" in markdown
    assert "protocol `paper`, l2, `autoattack:version=standard`" in markdown
    lines = list(csv.DictReader(table.as_csv(list(rows.values())).splitlines()))
    (line,) = [line for line in lines if line["attack"] == auto and line["level"] == "15"]
    assert (float(line["tvdi"]), line["published"]) == (pytest.approx(row.tvdi["15"], abs=1e-4), "70.4900")
    assert {line["protocol"] for line in lines} == {"paper"}
    assert [line["published"] for line in lines if line["level"] == "40"] == [""] * 4


def test_a_model_that_has_not_learned_its_task_is_marked(tmp_path):
    """Zeros at every level would pass for fragility; so would a Dice that no attack lowers for robustness."""
    summaries = {
        "IMA": summary_of(tmp_path / "bad", clean=0.2, attacked={"5": 0.2}),
        "STD": summary_of(tmp_path / "good", clean=0.9, attacked={"5": 0.0}),
    }
    rows = [row for method, summary in summaries.items() for row in table.rows_of(4, method, 15.0, summary)]
    markdown = table.as_markdown(rows)
    assert "| IMA (not trained enough: none of 40 slices is correct without an attack) | " in markdown
    assert "| STD | " in markdown
    lines = csv.DictReader(table.as_csv(rows).splitlines())
    assert {(line["method"], line["learned"]) for line in lines} == {("IMA", "False"), ("STD", "True")}


def test_all_levels_published_give_a_published_mean(tmp_path):
    attacked = {"5": 0.7, "15": 0.6, "25": 0.5}
    summary = summary_of(tmp_path / "run", protocol="paper", attacked=attacked, further={"autoattack": attacked})
    row = table.rows_of(4, "TRADES", 15.0, summary)[-1]
    assert row.published["mean"] == pytest.approx(48.81, abs=0.01)


def test_sat_of_the_earlier_version_is_the_one_with_the_same_noise(tmp_path):
    attacked = {"5": 0.7, "10": 0.6}
    summary = summary_of(tmp_path / "run", attacked=attacked, further={PGD100: attacked})
    other, row = table.rows_of(4, "SAT", 15.0, summary)
    assert (other.attack, other.published) == ("apgd:steps=4", {})
    assert dict(row.published) == {"clean": 79.89, "5": 69.56, "10": 50.67, "mean": pytest.approx(200.12 / 3)}
    assert "100 steps" in row.source
    assert table.rows_of(4, "SAT", 20.0, summary)[-1].published == {}
    assert table.rows_of(4, "TE", 15.0, summary)[-1].published == {}


@pytest.mark.parametrize(
    ("settings", "published"), [({}, "SAT15"), ({"epsilon": 5}, "SAT5"), ({"epsilon": 5, "norm": "linf"}, None)]
)
def test_sat_stands_beside_the_published_one_of_the_noise_it_was_trained_with(
    raw, tmp_path, monkeypatch, settings, published
):
    attacked = {"5": 0.7, "10": 0.6}
    summary = summary_of(tmp_path / "run", attacked=attacked, further={PGD100: attacked})
    (task,) = a_study(raw, tmp_path / "out", tasks=(4,), methods=("SAT",), settings=settings).tasks
    monkeypatch.setattr(task, "runs", lambda: [(task.methods[0], task.study.evaluations[0], summary)])
    row = task.rows()[-1]
    known = {one.method: one.clean for one in published_rows("Hippocampus", "PGD", "l2")}
    assert row.published.get("clean") == (None if published is None else known[published])


def test_a_phantom_is_not_compared_with_the_paper(tmp_path):
    attacked = {"5": 0.7, "15": 0.6}
    summary = summary_of(tmp_path / "run", dataset="Dataset004_Phantom", attacked=attacked, further={PGD100: attacked})
    assert all(not row.published for row in table.rows_of(4, "IMA", 15.0, summary))
    assert published_rows("Phantom", "AutoAttack", "l2") == []


def test_levels_ascend_in_all_published_tables():
    for task in TASKS.values():
        for one in evaluations_of(task):
            values = [float(level.partition("/")[0]) for level in one.levels]
            assert values
            assert all(left < right for left, right in pairwise(values))
