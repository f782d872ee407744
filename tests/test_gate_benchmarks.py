"""What benchmarks/gate_workflow.py and gate_seeds.py run and read; the measurements themselves take too long here."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from results_of_runs import make_run

from nnunet_ima.evaluation.command_line import _parser, main

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gate_seeds
import gate_workflow

(JOB,) = yaml.safe_load(gate_workflow.WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()


def test_all_steps_are_run_as_they_stand_but_for_the_installation(tmp_path):
    here, kept = tmp_path / "robustness" / "baseline.json", tmp_path / "run_1" / "robustness" / "baseline.json"
    shown = {step["name"]: step["run"] for step in JOB["steps"] if "run" in step}
    for first in (True, False):
        found = dict(gate_workflow.blocks(JOB, here, kept, first))
        assert list(found) == [*list(shown)[:-2], "Baseline", *list(shown)[-2:]]
        assert list(found)[-2:] == ["Judge", "Show"]
        different = {name for name in shown if found[name] != shown[name]}
        assert different == {"Install"}
        assert found["Install"] == shown["Install"].replace('pip install "$NNUNET_IMA"\n', "")
        assert ("--write-baseline robustness/baseline.json" in found["Baseline"]) == first
        assert (str(kept) in found["Baseline"]) == (not first)


def shown_address() -> str:
    """What the workflow's comments say of repositories that are no copy of this project."""
    comments = gate_workflow.WORKFLOW.read_text(encoding="utf-8")
    (found,) = re.findall(r'# .*"(nnunet_ima @ git\+<address>@<commit>)"', comments)
    return found


@pytest.mark.parametrize("where", [".", "nnunet_ima @ git+file:///some where@0123456", "third_party/nnunet_ima"])
def test_the_package_is_installed_from_where_the_variable_says(tmp_path, where):
    (install,) = (step["run"] for step in JOB["steps"] if step.get("name") == "Install")
    for name, content in {"pip": f'printf "%s\\n" "$@" > {tmp_path}/said', "nnunet_ima": "echo trainers"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    folders = {name: str(tmp_path / name[7:]) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_ENV": str(tmp_path / "env"), **folders}
    subprocess.run(["bash", "-e", "-c", install], env={**environment, "NNUNET_IMA": where}, check=True)
    assert (tmp_path / "said").read_text().splitlines() == ["install", where]
    assert (tmp_path / "env").read_text() == "nnUNet_extTrainer=trainers\n"
    assert JOB["env"]["NNUNET_IMA"] == "."


def test_the_address_shown_is_one_that_pip_reads():
    found = Requirement(shown_address().replace("<address>", "https://host.example/x.git").replace("<commit>", "0a1b"))
    assert (found.name, found.url) == ("nnunet_ima", "git+https://host.example/x.git@0a1b")


@pytest.mark.slow
def test_pip_installs_the_package_from_such_an_address(tmp_path):
    """From a clone of this repository, as it was committed; what it needs is installed already."""
    root = Path(__file__).parents[1]
    if subprocess.run(["git", "-C", str(root), "rev-parse"], capture_output=True).returncode:
        pytest.skip("these sources are no git repository")
    subprocess.run(["git", "clone", "--quiet", "--bare", str(root), str(tmp_path / "clone")], check=True)
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    address = shown_address().replace("<address>", f"file://{tmp_path}/clone").replace("<commit>", head.stdout.strip())
    into = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *into, address], check=True)
    assert (tmp_path / "site" / "nnunet_ima" / "evaluation" / "gate.py").is_file()
    assert (tmp_path / "site" / "nnunet_ima" / "trainers" / "nnUNetTrainerIMA.py").is_file()


def test_the_stock_model_is_attacked_and_judged_as_the_hardened_one_is():
    attack, judge = (step["run"] for step in JOB["steps"] if step.get("name") in ("Attack", "Judge"))
    attack, judge = map(gate_workflow.of_stock_model, (attack, judge))
    assert "-c 2d_std -tr nnUNetTrainerSTD" in attack
    assert "ima " not in (attack + judge).replace("nnunet_ima ", "")
    assert "-o run_stock" in attack
    assert "report run_stock -o report_stock" in attack
    assert "gate run_stock --baseline robustness/baseline.json" in judge
    assert "-o gate_stock" in judge


def test_a_step_hands_variables_on_and_is_run_once(tmp_path):
    gate_workflow.once(tmp_path, "One", 'echo "colour=blue" >> "$GITHUB_ENV"', {})
    environment = {"place": "${{ github.workspace }}/x"}
    for _ in range(2):
        done = gate_workflow.once(tmp_path, "Two", 'echo "$colour $place" >> found', environment)
    assert (tmp_path / "found").read_text() == f"blue {tmp_path}/x\n"
    assert done["status"] == 0
    # Of another workflow: what follows was made of what this one left.
    with pytest.raises(SystemExit, match="another workflow"):
        gate_workflow.once(tmp_path, "Two", "echo again >> found", environment)


@pytest.mark.parametrize("status", [1, 2])
def test_only_a_gate_may_end_with_a_status(tmp_path, status):
    assert gate_workflow.once(tmp_path, "Judge", f"exit {status}", {})["status"] == status
    with pytest.raises(SystemExit, match=f"ended with {status}"):
        gate_workflow.once(tmp_path, "Train", f"false || exit {status}\ntrue", {})
    with pytest.raises(SystemExit):
        gate_workflow.once(tmp_path, "Judge the stock model", "exit 3", {})


def test_the_cpu_time_is_that_of_the_step(tmp_path):
    """A step that waits has none; one that works for a second, in a process of its own, has that."""
    work = f"{sys.executable} -c 'import time\nwhile time.process_time() < 1: pass'"
    assert gate_workflow.once(tmp_path, "Wait", "sleep 0.1", {})["cpu"] < 0.9
    assert gate_workflow.once(tmp_path, "Work", work, {})["cpu"] >= 0.9


def test_seeds_are_run_on_what_a_run_of_the_workflow_left(tmp_path, monkeypatch):
    """Its models as its own step attacked them, with seeds and a folder of their own; its folder stays as it is."""
    run, said = tmp_path / "run_1", []
    (run / "steps").mkdir(parents=True)
    (attack,) = (step["run"] for step in JOB["steps"] if step.get("name") == "Attack")
    (run / "steps" / "Attack.json").write_text(
        json.dumps({"run": attack.replace("--max-samples 60", "--max-samples 7")})
    )
    models = gate_seeds.of_workflow(run, None)
    assert models.environment["nnUNet_results"] == f"{run}/nnunet/results"
    monkeypatch.setattr(gate_seeds, "nnunet_ima", lambda *arguments: said.append(arguments) or (0, ""))
    options = argparse.Namespace(output=tmp_path / "seeds", device="cpu")
    folders = {gate_seeds.evaluated(models, name, 3, 0, options) for name in gate_seeds.MODELS}
    assert all(folder.is_relative_to(tmp_path / "seeds") for folder in folders)
    read = [_parser().parse_args(arguments) for arguments in said]
    assert {options.output for options in read} == folders
    assert [(options.trainer, options.configuration) for options in read] == [
        ("nnUNetTrainerIMA", "2d_ima"), ("nnUNetTrainerSTD", "2d_std"),
    ]  # fmt: skip
    for options in read:
        assert (options.seed, options.samples_seed, options.max_samples, options.no_cases) == (3, 0, 7, True)
        assert (tuple(options.attacks), options.levels) == (gate_seeds.ATTACKS, [gate_seeds.LEVEL])
    more = _parser().parse_args(["evaluate", *gate_seeds.of_workflow(run, 90).evaluate["unchanged"]])
    assert more.max_samples == 90
    assert [file.name for file in run.rglob("*")] == ["steps", "Attack.json"]
    with pytest.raises(SystemExit, match="no finished run"):
        gate_seeds.of_workflow(tmp_path, None)


def test_what_the_gate_said_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_seeds, "DROPS", ("1", "50"))
    good = make_run(tmp_path / "good", clean=0.9, attacked={"2": 0.8}, seed=0)
    baseline = tmp_path / "baseline.json"
    assert main(["gate", str(good), "--write-baseline", str(baseline)]) == 0
    same = gate_seeds.judged(good, baseline)
    assert same["exit_status"] == {"1": 0, "50": 0}
    assert same["change"] == {"clean": [0, 0, 0], "apgd:steps=4@l2:2": [0, 0, 0]}
    fragile = make_run(tmp_path / "fragile", clean=0.9, attacked={"2": 0.4}, seed=3)
    found = gate_seeds.judged(fragile, baseline)
    assert found["exit_status"] == {"1": 1, "50": 0}
    change, low, high = found["change"]["apgd:steps=4@l2:2"]
    assert low < change < high < -1
    before, now = (one["tvdi"]["apgd:steps=4@l2:2"] for one in (same, found))
    assert change == pytest.approx(now[0] - before[0], abs=0.1)
    assert now[1] < now[0] < now[2]
    others = gate_seeds.judged(make_run(tmp_path / "others", clean=0.9, attacked={"2": 0.8}, cases=12), baseline)
    assert len(others["change"]["clean"]) == 3
    assert others["cases"] == 12
