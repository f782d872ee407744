"""The Decathlon study from end to end, on two phantoms: killed, continued, reported."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from nnunet_project import program

from nnunet_ima.evaluation.phantom import make_phantom_task

pytestmark = pytest.mark.slow

EPOCHS = 3
METHODS = ("STD", "IMA")


PAGE = Path(__file__).parents[1] / "docs" / "decathlon.md"


def the_command(root: Path, *more: str) -> list[str]:
    return [
        program("nnunet_ima"), "decathlon", "--raw", str(root / "raw"), "-o", str(root / "out"), "--tasks", "2", "4",
        "--methods", *METHODS, "--epochs", str(EPOCHS), "--iterations", "2", "--features", "4", "--batch-size", "4",
        "--set", "steps=2", "initial_lr=0.1", "save_every=1", "num_val_iterations_per_epoch=1",
        "--attack", "pgd:steps=2", "--samples", "2", "--evaluations", "sound_l2", "paper_linf_noise",
        "-device", "cpu", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def kill_in_training(root: Path, method: str) -> None:
    """Start the study, and kill it once a training of the first task has written a checkpoint.

    Nothing tells the training so. As long as it is there, nobody else goes on with it; then it is killed, too.
    """
    checkpoint = f"out/Task02/nnUNet_results/*/nnUNetTrainer{method}__*/fold_0/checkpoint_latest.pth"
    log = root / "first.log"
    with log.open("w") as stream:
        study = subprocess.Popen(the_command(root), stdout=stream, stderr=subprocess.STDOUT, env=environment())
    while not list(root.glob(checkpoint)):
        assert study.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    training = int((root / "out" / "Task02" / f"logs_nnUNetTrainer{method}" / "running.pid").read_text())
    # Stopped, so that it is still there when it is looked for.
    os.killpg(training, signal.SIGSTOP)
    try:
        study.kill()
        study.wait()
        only = the_command(root, "--tasks", "2", "--methods", method, "--only", "train")
        refused = subprocess.run(only, capture_output=True, text=True, env=environment())
        assert refused.returncode == 2
        assert f"Process {training} is still at work in this folder" in refused.stderr
        assert f"stop it (kill -- -{training})" in refused.stderr
    finally:
        os.killpg(training, signal.SIGKILL)


def test_a_study_of_two_tasks_is_killed_goes_on_and_reports(tmp_path):
    for number in (2, 4):
        make_phantom_task(tmp_path / "raw" / f"Task0{number}_Phantom", 5, seed=number, progress=False, enhancement=1.0)
    out = tmp_path / "out"
    ima = out / "Task02" / "logs_nnUNetTrainerIMA" / "train_IMA"
    kill_in_training(tmp_path, "IMA")
    assert not ima.with_suffix(".done").exists()
    early = sorted(out.glob("Task0*/logs*/*.done"))
    # Two preparations, one training, its two evaluations.
    assert len(early) == 2 * 2 + 1 + 2
    before = {file: file.read_bytes() for file in early}

    done = subprocess.run(the_command(tmp_path), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file: file.read_bytes() for file in early} == before
    # The training that was killed was continued, not begun again.
    assert "--c" in json.loads(ima.with_suffix(".done").read_text())["command"]

    for number in (2, 4):
        task = out / f"Task0{number}"
        (fold,) = json.loads(next(task.glob("nnUNet_preprocessed/*/splits_final.json")).read_text())
        assert sorted([*fold["train"], *fold["val"]]) == [f"phantom_{case:03d}" for case in range(5)]
        for method in METHODS:
            checkpoint = next(task.glob(f"nnUNet_results/*/nnUNetTrainer{method}__*/fold_0/checkpoint_final.pth"))
            content = torch.load(checkpoint, map_location="cpu", weights_only=False)
            assert content["current_epoch"] == EPOCHS
            # Within what --dry-run says of it: K = 2 steps and 10 bisections.
            assert all(1 <= passes <= 2 + 10 + 3 for passes in content["logging"].get("passes_per_sample", []))
        page = (task / "report" / "report.html").read_text(encoding="utf-8")
        assert "stands in for the Decathlon" in page
        assert "No training clamps to [0, 1]" in page
        assert (task / "report_white_noise" / "report.html").is_file()
        summary = json.loads((task / "sound_l2_pgd-steps-2_2samples_IMA" / "summary.json").read_text())
        assert summary["clean"]["n_samples"] == 2

    rows = list(csv.DictReader((out / "decathlon.csv").read_text().splitlines()))
    assert {(row["task"], row["method"]) for row in rows} == {(task, method) for task in "24" for method in METHODS}
    levels = {(row["task"], row["level"]) for row in rows if row["protocol"] == "sound"}
    named = {"clean", "mean"}
    assert levels == {("2", one) for one in {*named, "5", "15", "25"}} | {
        ("4", one) for one in {*named, "1", "5", "10", "15"}
    }  # fmt: skip
    assert {row["published"] for row in rows} == {""}
    text = (out / "decathlon.md").read_text()
    assert f"{EPOCHS} epochs of 2 iterations, the paper's trainings had 50 of 50." in text

    # Nothing is left to do, and a dry run knows it.
    shown = subprocess.run(the_command(tmp_path, "--dry-run"), capture_output=True, text=True, env=environment())
    assert "[to do]" not in shown.stdout
    assert "in all: 0 passes of training, at most 0 of attacks" in shown.stdout
    assert "nnU-Net plans patches of" in shown.stdout


# What SLURM does with an array, for the first of its jobs; of nnunet_ima only what it was asked for.
SLURM = """
sbatch() {
    echo "sbatch $*" >> submitted
    for last; do :; done
    (
        SLURM_ARRAY_TASK_ID=1
        nnunet_ima() { echo "$*" >> ran; }
        eval "$last"
    )
    echo $(wc -l < submitted)
}
"""


def test_the_loop_for_slurm_submits_each_stage_after_the_one_before(tmp_path):
    for number in (2, 4, 5):
        make_phantom_task(tmp_path / "raw" / f"Task0{number}_Phantom", 5, seed=number, progress=False)
    (loop,) = [block for block in PAGE.read_text().split("```") if "sbatch" in block and block.startswith("text")]
    script = loop.removeprefix("text\n").replace("/data/Decathlon", str(tmp_path / "raw")).replace("cuda", "cpu")
    script = script.replace("/scratch/study", str(tmp_path / "study"))
    path = os.pathsep.join([str(Path(program("nnunet_ima")).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", SLURM + script], cwd=tmp_path, env={**environment(), "PATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    submitted = (tmp_path / "submitted").read_text().splitlines()
    arrays = [re.findall(r"--array=1-\s*(\d+)", line)[0] for line in submitted]
    assert arrays == ["3", "15", "15", "1"]
    waits = [re.findall(r"--dependency=afterany:(\d+)", line) for line in submitted]
    assert waits == [[], ["1"], ["2"], ["3"]]
    ran = [line.split(" --tasks ")[1] for line in (tmp_path / "ran").read_text().splitlines()]
    assert ran == [
        "2 --only convert plan", "2 --methods STD --only train", "2 --methods STD --only evaluate",
        "2 4 5 --methods STD SAT TE TRADES IMA --only report",
    ]  # fmt: skip
