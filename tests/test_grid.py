"""``nnunet_ima grid``: every pair once, in parts or at once, the best by the geometric mean."""

from __future__ import annotations

import csv
import hashlib
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_project import PLANS, read, write
from PIL import Image
from results_of_runs import make_run

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.configure import PlannedDataset, find_planned
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.grid import Grid, Point, Score, draw, points_of
from nnunet_ima.evaluation.steps import Steps

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
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans()),
    min_size=1, max_size=6, unique_by=lambda score: score[:2],
)  # fmt: skip


@settings(max_examples=10)
@given(scores)
def test_the_table_marks_the_highest_geometric_mean_and_the_csv_holds_all(tmp_path_factory, found):
    output = tmp_path_factory.mktemp("grid")
    made = [Score(Point(e, d), clean, robust, learned=fit, trusted=true) for e, d, clean, robust, fit, true in found]
    grid = grid_of([score.point for score in made], output)
    table = grid.report(made)
    # One that has not learned its task, or that a check failed of, is the best only where all are so.
    *_, best = max((fit, true, math.sqrt(clean * robust)) for _, _, clean, robust, fit, true in found)
    rows = [line.rpartition(" | ")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    assert ["has not learned" not in row for row in rows] == [score.learned for score in made]
    assert ["not to be trusted" not in row for row in rows] == [score.trusted for score in made]
    assert ("says nothing of robustness" in table) is not all(score.learned for score in made)
    assert ("a check of the attack failed" in table) is not all(score.trusted for score in made)
    (marked,) = [line for line in table.splitlines() if "**best**" in line]
    assert f" {100 * best:.1f} | **best**" in marked
    with (output / "grid.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(float(r["epsilon"]), float(r["delta_epsilon"])) for r in rows] == [(e, d) for e, d, *_ in found]
    assert [float(r["geometric_mean"]) for r in rows] == [score.geometric_mean for score in made]
    assert [(r["learned"], r["trusted"]) for r in rows] == [(str(s.learned), str(s.trusted)) for s in made]


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


@pytest.fixture
def results(project, tmp_path, monkeypatch) -> Path:
    """An empty folder of trained models."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def train(grid: Grid, point: Point, weights: bytes = b"weights") -> Path:
    file = grid._model(point) / f"fold_{grid.fold}" / "checkpoint_final.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(weights)
    return file


def measure(grid: Grid, point: Point, *, by: Grid | None = None, clean: float = 0.9, attacked: float = 0.5,
            knows: bool = False, program: str = "") -> Path:  # fmt: skip
    """As this grid, or another one, would have left it in this one's folder."""
    weights = train(grid, point).read_bytes()
    command = shlex.join((by or grid)._evaluation(point))
    now = {**versions(), **({"nnunet_ima's sources": program} if program else {})}
    return make_run(
        grid.output / point.name, clean=clean, attacked={"5": attacked}, trained_on=knows, cases=2, tiles=2,
        files={"sha256": hashlib.sha256(weights).hexdigest()}, about={"command": command, "versions": now},
    )  # fmt: skip


def asked_of(grid: Grid, point: Point, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that the grid takes to attack a job."""
    steps = Steps(grid.output / "logs", {})
    ran: list[str] = []
    monkeypatch.setattr(steps, "run", lambda step, _: ran.append(step))
    grid._attack(steps, point)
    return ran


def test_a_job_of_which_no_sample_is_correct_is_known_to_have_learned_nothing(results, tmp_path):
    points = [Point(5, 1), Point(10, 1)]
    grid = grid_of(points, tmp_path)
    measure(grid, points[0])
    measure(grid, points[1], clean=0.3, attacked=0.2)
    assert [score.learned for score in grid.collect()] == [True, False]


def test_a_job_of_which_a_check_failed_is_known_not_to_be_trusted(results, tmp_path):
    points = [Point(5, 1), Point(10, 1)]
    grid = grid_of(points, tmp_path)
    measure(grid, points[0])
    measure(grid, points[1], attacked=0.95)
    assert [score.trusted for score in grid.collect()] == [True, False]


def test_results_of_another_attack_or_trainer_are_not_of_this_grid(results, tmp_path, monkeypatch):
    points = [Point(5, 1), Point(10, 1)]
    grid = grid_of(points, tmp_path)
    figures = read(measure(grid, points[0], knows=True) / "summary.json")
    others = measure(grid, points[1], by=replace(grid, level="10"))
    (found,) = grid.collect()
    assert (found.clean, found.robust) == (figures["clean"]["tvdi"], figures["results"][0]["tvdi"])
    assert found.point == points[0]
    assert found.trained_on_these_cases
    assert replace(grid, trainer="nnUNetTrainerIMA_50epochs").collect() == []
    # That they are in the way is for evaluate to say: they are nobody's to remove.
    assert asked_of(grid, points[1], monkeypatch) == ["evaluate_e10_d1"]
    assert (others / "summary.json").is_file()


@pytest.mark.parametrize("what", ["as it was", "trained anew", "another program", "no model"])
def test_results_of_weights_or_a_program_that_are_no_more_are_made_again(results, tmp_path, monkeypatch, what):
    point = Point(5, 1)
    grid = grid_of([point], tmp_path)
    folder = measure(grid, point, program="0123456789abcdef" if what == "another program" else "")
    if what == "trained anew":
        train(grid, point, b"other weights")
    if what == "no model":
        train(grid, point).unlink()
    fits = what == "as it was"
    assert len(grid.collect()) == fits
    assert asked_of(grid, point, monkeypatch) == ([] if fits else ["evaluate_e5_d1"])
    # Else evaluate would refuse to write there.
    assert folder.exists() is fits


@pytest.mark.parametrize("what", ["as it was", "edited", "cut", "no table"])
def test_a_result_that_was_edited_or_damaged_is_made_again_and_not_believed(results, tmp_path, monkeypatch, what):
    point = Point(5, 1)
    grid = grid_of([point], tmp_path)
    file = measure(grid, point) / "summary.json"
    if what == "edited":
        write(file, {**read(file), "results": [{"tvdi": 0.9}]})
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    if what == "no table":
        file.write_text("[]", encoding="utf-8")
    whole = what == "as it was"
    assert len(grid.collect()) == whole
    assert asked_of(grid, point, monkeypatch) == ([] if whole else ["evaluate_e5_d1"])
    # Its records are whole: evaluate goes on from there.
    assert (file.parent / "records").is_dir()


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
