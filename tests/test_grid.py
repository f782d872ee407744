"""``nnunet_ima grid``: every pair once, in parts or at once, the best by the geometric mean."""

from __future__ import annotations

import csv
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_project import PLANS, read, write
from PIL import Image

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.configure import PlannedDataset, find_planned
from nnunet_ima.evaluation.grid import Grid, Point, Score, draw, points_of
from nnunet_ima.evaluation.identity import sealed
from nnunet_ima.evaluation.steps import Steps
from nnunet_ima.evaluation.summary import SCHEMA

values = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def grid_of(points: list[Point], output: Path) -> Grid:
    planned = PlannedDataset(Path("Dataset901_Phantom"), Path("nnUNetPlans.json"), {"configurations": {}})
    return Grid(planned, "2d", 0, "nnUNetTrainerIMA", points, "l2", "5", "pgd:steps=2", None, "cpu", output)


@given(values, values)
def test_every_pair_is_there_once_and_no_step_is_above_its_epsilon(epsilons, deltas):
    expected = {(e, d) for e in epsilons for d in deltas if d <= e}
    if not expected:
        with pytest.raises(UserError):
            points_of(epsilons, deltas)
        return
    points = points_of(epsilons, deltas)
    assert {(p.epsilon, p.delta_epsilon) for p in points} == expected
    assert len(points) == len(expected)


@pytest.mark.parametrize("known", [True, False])
def test_the_table_says_when_the_weights_know_the_cases(tmp_path, known):
    points = [Point(5, 1), Point(5, 2)]
    table = grid_of(points, tmp_path).report([Score(points[0], 0.5, 0.5), Score(points[1], 0.5, 0.5, known)])
    assert ("learned from some of these very cases" in table) == known
    unknown = grid_of(points, tmp_path).report([Score(points[0], 0.5, 0.5, known, True)])
    assert ("is not known" in unknown) == (not known)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_values_must_be_above_zero_and_finite(bad):
    with pytest.raises(UserError):
        points_of([bad], [1.0])
    with pytest.raises(UserError):
        points_of([1.0], [bad])


scores = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.booleans()),
    min_size=1, max_size=6, unique_by=lambda score: score[:2],
)  # fmt: skip


@settings(max_examples=10)
@given(scores)
def test_the_table_marks_the_highest_geometric_mean_and_the_csv_holds_all(tmp_path_factory, found):
    output = tmp_path_factory.mktemp("grid")
    made = [Score(Point(e, d), clean, robust, learned=learned) for e, d, clean, robust, learned in found]
    grid = grid_of([score.point for score in made], output)
    table = grid.report(made)
    # One that has not learned its task is the best only where none has.
    anything = any(learned for *_, learned in found)
    best = max(math.sqrt(clean * robust) for _, _, clean, robust, learned in found if learned or not anything)
    assert table.count("| has not learned") + table.count(", has not") == sum(not learned for *_, learned in found)
    assert ("says nothing of robustness" in table) is not all(learned for *_, learned in found)
    (marked,) = [line for line in table.splitlines() if "**best**" in line]
    assert f" {100 * best:.1f} | **best**" in marked
    with (output / "grid.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(float(r["epsilon"]), float(r["delta_epsilon"])) for r in rows] == [(e, d) for e, d, *_ in found]
    assert [float(r["geometric_mean"]) for r in rows] == [score.geometric_mean for score in made]


def test_the_heat_map_has_a_field_for_each_job(tmp_path):
    draw([Score(Point(5, 1), 0.8, 0.5), Score(Point(10, 2), 0.7, 0.6)], "title", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 50


def test_jobs_that_are_not_finished_are_counted(tmp_path):
    points = [Point(5, 1), Point(5, 2)]
    assert "1 of 2 jobs are not finished" in grid_of(points, tmp_path).report([Score(points[0], 0.5, 0.5)])
    assert "No job is finished" in grid_of(points, tmp_path).report([])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epsilon", "1", "--delta-epsilon", "2"), "above every epsilon"),
        (("--epsilon", "0", "--delta-epsilon", "2"), "must be above 0"),
        (("--epsilon", "2", "--delta-epsilon", "1", "-part_id", "1"), "from 0 to 0"),
        (("--epsilon", "2", "--delta-epsilon", "1", "--level", "abc"), "no number"),
        (("--epsilon", "2", "--delta-epsilon", "1", "-c", "5d"), "no configuration '5d'"),
        (("--epsilon", "2", "--delta-epsilon", "1", "--attack", "apdg"), "no attack 'apdg'"),
        (("--epsilon", "2", "--delta-epsilon", "1", "-tr", "nnUNetTrainerSAT"), "does not read delta_epsilon"),
        (("--epsilon", "2", "--delta-epsilon", "1", "-tr", "nnUNetTrainerNone"), "no trainer"),
    ],
)
def test_what_cannot_be_done_ends_with_a_sentence(project, tmp_path, capsys, arguments, said):
    def plans() -> list[str]:
        # A look at what a training would use makes nnU-Net's splits, as the training would.
        names = sorted(file.name for file in project.preprocessed.glob("*.json"))
        return [name for name in names if name != "splits_final.json"]

    before = plans()
    known = ["grid", "-d", "901", "-c", "2d_tiny", "-p", PLANS, "-device", "cpu", "-o", str(tmp_path)]
    assert main([*known, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert plans() == before


CLEAN = {"tvdi": 0.8, "robust_share": 0.9, "n_samples": 20}
CRITERION = {"criterion": {"dice_threshold": 0.6}}


def test_a_job_of_which_no_sample_is_correct_is_known_to_have_learned_nothing(project, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    points = [Point(5, 1), Point(10, 1)]
    grid = grid_of(points, tmp_path)
    for point, clean in zip(points, (CLEAN, {"tvdi": 0.3, "robust_share": 0.0, "n_samples": 20}), strict=True):
        (tmp_path / point.name).mkdir()
        head = {"schema": SCHEMA, "command": shlex.join(grid._evaluation(point)), "started_from_unknown_weights": False}
        figures = {"clean": clean, **CRITERION, "results": [{"tvdi": 0.3}], "trained_on_these_cases": False}
        write(tmp_path / point.name / "summary.json", sealed({**head, **figures}))
    assert [score.learned for score in grid.collect()] == [True, False]


def test_results_of_another_attack_or_trainer_are_not_of_this_grid(project, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    points = [Point(5, 1), Point(10, 1)]
    grid = grid_of(points, tmp_path)
    for point, level in zip(points, ("5", "10"), strict=True):
        (tmp_path / point.name).mkdir()
        command = shlex.join(replace(grid, level=level)._evaluation(point))
        figures = {"clean": CLEAN, **CRITERION, "results": [{"tvdi": 0.5}], "trained_on_these_cases": True}
        figures["started_from_unknown_weights"] = False
        summary = sealed({"schema": SCHEMA, "command": command, **figures})
        write(tmp_path / point.name / "summary.json", summary)
    assert grid.collect() == [Score(points[0], 0.8, 0.5, trained_on_these_cases=True)]
    assert replace(grid, trainer="nnUNetTrainerIMA_50epochs").collect() == []


@pytest.mark.parametrize("what", ["as it was", "edited", "cut", "no table"])
def test_a_result_that_was_edited_or_damaged_is_made_again_and_not_believed(project, tmp_path, monkeypatch, what):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    point = Point(5, 1)
    grid = grid_of([point], tmp_path)
    file = tmp_path / point.name / "summary.json"
    file.parent.mkdir()
    figures = {"clean": CLEAN, **CRITERION, "results": [{"tvdi": 0.5}], "trained_on_these_cases": False}
    command = shlex.join(grid._evaluation(point))
    summary = sealed({"schema": SCHEMA, "command": command, **figures, "started_from_unknown_weights": False})
    write(file, {**summary, "results": [{"tvdi": 0.9}]} if what == "edited" else summary)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    if what == "no table":
        file.write_text("[]", encoding="utf-8")
    steps = Steps(tmp_path / "logs", {})
    ran: list[str] = []
    monkeypatch.setattr(steps, "run", lambda step, _: ran.append(step))
    grid._attack(steps, point)
    whole = what == "as it was"
    assert grid.collect() == ([Score(point, 0.8, 0.5)] if whole else [])
    assert ran == ([] if whole else ["evaluate_e5_d1"])


def test_the_grids_plans_follow_the_users(project, tmp_path):
    users = find_planned("901", PLANS)
    grid = replace(grid_of([Point(5, 1)], tmp_path), planned=users, configuration="2d_tiny")
    file = users.plans_file.with_name(f"{PLANS}Grid.json")
    try:
        write(file, grid._with_points().plans)
        entry = {"inherits_from": "2d_tiny"}
        later = replace(users, plans={**users.plans, "configurations": {**users.configurations, "2d_new": entry}})
        added = replace(grid, planned=later, configuration="2d_new", points=[Point(7, 1)])._with_points().plans
        assert {"2d_new", "2d_new_e7_d1", "2d_tiny_e5_d1"} <= added["configurations"].keys()
        changed = {**users.configurations["2d_tiny"], "batch_size": 77}
        other = replace(users, plans={**users.plans, "configurations": {**users.configurations, "2d_tiny": changed}})
        with pytest.raises(UserError, match="2d_tiny was another configuration"):
            replace(grid, planned=other)._with_points()
    finally:
        file.unlink()


@pytest.mark.slow
def test_two_parts_do_the_whole_grid_with_the_real_commands_and_only_once(project, tmp_path):
    known = ["nnunet_ima", "grid", "-d", project.number, "-c", "2d_tiny", "-p", PLANS, "-tr", "nnUNetTrainerIMA",
             "--epsilon", "3", "6", "--delta-epsilon", "1", "--level", "2", "--attack", "pgd:steps=2",
             "--max-samples", "6", "-device", "cpu", "-o", str(tmp_path), "-num_parts", "2"]  # fmt: skip
    users = project.plans()
    first = project.command(*known, "-part_id", "0").stdout
    assert "1 of 2 jobs are not finished" in first
    second = project.command(*known, "-part_id", "1").stdout
    assert "**best**" in second
    assert "not finished" not in second
    plans = read(project.preprocessed / f"{PLANS}Grid.json")
    assert plans["configurations"]["2d_tiny_e3_d1"]["nnunet_ima"]["epsilon"] == 3
    assert project.plans() == users
    logs = {file: file.stat().st_mtime_ns for file in (tmp_path / "logs").rglob("*.log")}
    project.command(*known, "-part_id", "1")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "logs").rglob("*.log")} == logs
