"""The study's program: what it carries from machine to machine is what was there."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paper_scale
from study_state import HALF, LARGEST, RECORDS, ROUNDED_MARK, pack, round_before_evaluations, unpack

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline
from nnunet_ima.evaluation.study import Study

FOLD = Path("nnUNet_results/Dataset004_Hippocampus/nnUNetTrainerIMA__plans__2d/fold_0")


def a_training(work: Path, name: str = "checkpoint_latest.pth", features: int = 8) -> dict[str, object]:
    """As nnU-Net leaves one: its decoder holds the encoder's weights once more."""
    weight = torch.randn(features, features)
    checkpoint = {
        "network_weights": {"encoder.w": weight, "decoder.encoder.w": weight},
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.randn(features, features)}}, "param_groups": []},
        "grad_scaler_state": {"scale": 65536.0},
        "init_args": {"nnunet_ima": {"state": {"margins": {"case": torch.rand(5) * 15}, "visits": torch.arange(5)}}},
        "averages": torch.rand(4).half(),
        "current_epoch": 7,
        "trainer_name": "nnUNetTrainerIMA",
    }  # fmt: skip
    (work / FOLD).mkdir(parents=True)
    torch.save(checkpoint, work / FOLD / name)
    for file in ("plans.json", "dataset.json"):
        (work / FOLD.parent / file).write_text(f'{{"{file}": 1}}')
    (work / "logs_IMA").mkdir()
    (work / "logs_IMA" / "train_IMA.done").write_text("{}")
    (work / "logs_IMA" / "running.pid").write_text("1")
    (work / "sound_l2_IMA" / "records").mkdir(parents=True)
    (work / "sound_l2_IMA" / "records" / "journal.jsonl").write_text("a line\n")
    (work / "nnUNet_preprocessed").mkdir()
    (work / "nnUNet_preprocessed" / "large").write_bytes(b"0" * 100)
    return checkpoint


def test_a_study_goes_on_elsewhere_from_what_was_carried(tmp_path):
    checkpoint = a_training(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "state")
    assert sum(file.stat().st_size for file in (tmp_path / "state").iterdir()) < 20_000
    unpack(tmp_path / "state", tmp_path / "there")
    found = torch.load(tmp_path / "there" / FOLD / "checkpoint_latest.pth", weights_only=True)
    assert found.keys() == checkpoint.keys()
    weights = found["network_weights"]
    assert weights["encoder.w"].dtype == torch.float32
    torch.testing.assert_close(weights["encoder.w"], checkpoint["network_weights"]["encoder.w"], rtol=5e-4, atol=1e-7)
    assert torch.equal(weights["encoder.w"], weights["decoder.encoder.w"])
    state, was = (one["init_args"]["nnunet_ima"]["state"] for one in (found, checkpoint))
    torch.testing.assert_close(state["margins"]["case"], was["margins"]["case"], rtol=5e-4, atol=1e-7)
    assert torch.equal(state["visits"], was["visits"])
    # What was in half precision before is so again.
    assert torch.equal(found["averages"], checkpoint["averages"])
    assert found["averages"].dtype == torch.float16
    assert found["current_epoch"] == 7
    assert (tmp_path / "there" / "sound_l2_IMA" / "records" / "journal.jsonl").read_text() == "a line\n"
    assert (tmp_path / "there" / "logs_IMA" / "train_IMA.done").is_file()
    assert (tmp_path / "there" / FOLD.parent / "plans.json").read_text() == '{"plans.json": 1}'
    # A process of another machine is none here; data are made anew.
    assert not (tmp_path / "there" / "logs_IMA" / "running.pid").exists()
    assert not (tmp_path / "there" / "nnUNet_preprocessed").exists()


def test_what_is_there_already_is_kept(tmp_path):
    a_training(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "state")
    newer = tmp_path / "there" / FOLD / "checkpoint_final.pth"
    newer.parent.mkdir(parents=True)
    newer.write_text("newer")
    (tmp_path / "there" / "sound_l2_IMA" / "records").mkdir(parents=True)
    (tmp_path / "there" / "sound_l2_IMA" / "records" / "journal.jsonl").write_text("two lines\n")
    unpack(tmp_path / "state", tmp_path / "there")
    assert newer.read_text() == "newer"
    assert not newer.with_name("checkpoint_latest.pth").exists()
    assert (tmp_path / "there" / "sound_l2_IMA" / "records" / "journal.jsonl").read_text() == "two lines\n"


@pytest.mark.parametrize("name", ["../elsewhere.txt", "/elsewhere.txt", "a/../../elsewhere.txt"])
def test_a_state_writes_nothing_outside_the_work(tmp_path, name):
    (tmp_path / "state").mkdir()
    (tmp_path / "content").write_text("no")
    with tarfile.open(tmp_path / "state" / RECORDS, "w:gz") as tar:
        member = tar.gettarinfo(tmp_path / "content")
        member.name = name
        with (tmp_path / "content").open("rb") as content:
            tar.addfile(member, content)
    with pytest.raises(UserError, match="wants to put something outside"):
        unpack(tmp_path / "state", tmp_path / "work")
    assert not list(tmp_path.rglob("elsewhere*"))


def test_a_link_in_a_state_is_not_followed(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "there").symlink_to("/")
    with tarfile.open(tmp_path / "state" / RECORDS, "w:gz") as tar:
        tar.add(tmp_path / "there", "there")
    unpack(tmp_path / "state", tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_finished_training_is_carried_as_finished(tmp_path):
    a_training(tmp_path / "here")
    final = tmp_path / "here" / FOLD / "checkpoint_final.pth"
    torch.save({"current_epoch": 50}, final)
    pack(tmp_path / "here", tmp_path / "state")
    unpack(tmp_path / "state", tmp_path / "there")
    assert torch.load(tmp_path / "there" / FOLD / "checkpoint_final.pth", weights_only=True)["current_epoch"] == 50
    assert not (tmp_path / "there" / FOLD / "checkpoint_latest.pth").exists()


def weights_of(work: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(work / FOLD / "checkpoint_final.pth", weights_only=True)["network_weights"])


def a_study(work: Path, state: Path | None) -> tuple[Study, Method]:
    """As the program makes it, with one method and one evaluation."""
    command = ["--data", "none", "-o", str(work), "--methods", "IMA", "--linf", "--paper-levels", "--scale", "glance"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paper_scale.py", *command, *(["--state", str(state)] if state else [])])
        options = paper_scale._options()
    scale = paper_scale.SCALES["glance"]
    ((method, _),) = paper_scale.methods(options, scale)
    return paper_scale.make_study(options, scale), method


@pytest.fixture
def evaluated(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The weights that evaluations of the study see; trainings end at once, where :data:`FOLD` is."""
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(self: Pipeline, dataset: Path, method: Method, attacks: Attacks) -> Path:
        if not (self.results(method, attacks) / "summary.json").is_file():
            seen.append(weights_of(self.output))
            for name in ("run.json", "summary.json"):
                self.results(method, attacks).mkdir(exist_ok=True)
                (self.results(method, attacks) / name).write_text("{}")
        return self.results(method, attacks)

    monkeypatch.setattr(Pipeline, "train", lambda *_: None)
    monkeypatch.setattr(Pipeline, "fold_folder", lambda self, *_: self.output / FOLD)
    monkeypatch.setattr(Pipeline, "evaluate", evaluate)
    return seen


def test_ima_in_single_precision_is_ima_but_for_that(tmp_path, monkeypatch):
    command = ["paper_scale.py", "--data", "none", "--methods", "IMA", "IMA-single", "--scale", "small"]
    monkeypatch.setattr(sys, "argv", command)
    made = [method for method, _ in paper_scale.methods(paper_scale._options(), paper_scale.SMALL)]
    assert [method.trainer for method in made] == ["nnUNetTrainerIMA"] * 2 * 3
    one, other = made[:2]
    assert {**one.settings, "attack_precision": "single"} == other.settings
    pipeline = Pipeline(tmp_path, "plans", paper_scale.SMALL.network, "cpu")
    assert len({pipeline.key(method) for method in made}) == len(made)


@pytest.mark.parametrize("scale", list(paper_scale.SCALES))
def test_a_spell_of_one_epoch_is_not_lost(monkeypatch, scale):
    """A checkpoint every five epochs was never reached in spells that are shorter than five epochs."""
    command = ["paper_scale.py", "--data", "none", "--methods", *paper_scale.METHODS, paper_scale.SINGLE]
    monkeypatch.setattr(sys, "argv", [*command, "--scale", scale])
    for method, _ in paper_scale.methods(paper_scale._options(), paper_scale.SCALES[scale]):
        assert method.settings["save_every"] == 1


def run(study: Study) -> None:
    ((_, job),) = study.jobs(study.output / "nnUNet_preprocessed" / "Dataset004_Hippocampus")
    job()


def test_evaluations_before_and_after_a_state_are_of_the_same_weights(tmp_path, evaluated):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    trained = a_training(here, "checkpoint_final.pth")
    run(a_study(here, state)[0])
    pack(here, state)
    unpack(state, there)
    study, _ = a_study(there, state)
    study.evaluations.append(Attacks("another", ["1"], ["white-noise"]))
    run(study)
    first, second = evaluated
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Rounded they are, and so little that nothing else can have happened to them.
    was = trained["network_weights"]["encoder.w"]
    assert not torch.equal(first["encoder.w"], was)
    torch.testing.assert_close(first["encoder.w"], was, rtol=5e-4, atol=1e-7)
    # A run that ended but was not noted as done is known by the checkpoint's digest.
    files = [work / FOLD / "checkpoint_final.pth" for work in (here, there)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.load(files[0], weights_only=True)[ROUNDED_MARK] == HALF


def test_rounding_once_more_changes_nothing(tmp_path):
    a_training(tmp_path, "checkpoint_final.pth")
    round_before_evaluations(tmp_path / FOLD, [])
    once = (tmp_path / FOLD / "checkpoint_final.pth").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    round_before_evaluations(tmp_path / FOLD, [tmp_path / "run"])
    assert (tmp_path / FOLD / "checkpoint_final.pth").read_bytes() == once


def test_without_a_state_weights_stay_as_they_were_trained(tmp_path, evaluated):
    trained = a_training(tmp_path, "checkpoint_final.pth")
    run(a_study(tmp_path, None)[0])
    assert torch.equal(evaluated[0]["encoder.w"], trained["network_weights"]["encoder.w"])


def test_a_model_that_was_evaluated_unrounded_is_not_carried_on_as_rounded(tmp_path, evaluated):
    """Neither one that was here before there was a state, nor one of an older state."""
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, "checkpoint_final.pth")
    run(a_study(here, None)[0])
    pack(here, state)
    unpack(state, there)
    for work in (here, there):
        before = (work / FOLD / "checkpoint_final.pth").read_bytes()
        with pytest.raises(UserError, match="hold results of weights in single precision"):
            run(a_study(work, state)[0])
        assert (work / FOLD / "checkpoint_final.pth").read_bytes() == before


def test_a_state_that_is_too_large_is_refused_with_its_size(tmp_path):
    a_training(tmp_path / "here", features=int((LARGEST / 2) ** 0.5) + 10)
    with pytest.raises(UserError, match=r"MiB, more than the 16 MiB"):
        pack(tmp_path / "here", tmp_path / "state")


@pytest.mark.slow
def test_a_study_with_a_state_is_taken_up_although_its_task_is_converted_anew(tmp_path, monkeypatch):
    """nnU-Net refuses to convert a task of which there are results: they must come after the conversion."""
    task = make_phantom_task(tmp_path / "Task04_Hippocampus", 5, progress=False)
    state, work = tmp_path / "state", tmp_path / "work"
    a_training(tmp_path / "elsewhere")
    # There it had been converted, which says nothing of this machine.
    (tmp_path / "elsewhere" / "logs").mkdir()
    (tmp_path / "elsewhere" / "logs" / "convert.done").write_text('{"command": []}')
    pack(tmp_path / "elsewhere", state)
    before = (state / f"{FOLD.parent.name}_{FOLD.name}.pth").stat().st_mtime_ns
    found: list[int] = []

    def jobs(self: Study, dataset: Path) -> list[object]:
        found.append(torch.load(work / FOLD / "checkpoint_latest.pth", weights_only=True)["current_epoch"])
        assert (dataset / "nnUNetPlans_glance.json").is_file()
        return []

    monkeypatch.setattr(Study, "jobs", jobs)
    command = ["paper_scale.py", "--data", str(task), "-o", str(work), "--scale", "glance", "--methods", "IMA"]
    monkeypatch.setattr(sys, "argv", [*command, "--state", str(state), "--results", str(tmp_path / "results")])
    paper_scale.main()
    assert found == [7]
    assert (work / "nnUNet_raw" / "Dataset004_Hippocampus" / "dataset.json").is_file()
    assert (work / "sound_l2_IMA" / "records" / "journal.jsonl").is_file()
    assert (state / f"{FOLD.parent.name}_{FOLD.name}.pth").stat().st_mtime_ns > before
    # Once more, on the machine where it is.
    paper_scale.main()
    assert found == [7, 7]


def test_a_state_that_was_not_taken_up_is_not_overwritten(tmp_path, monkeypatch):
    a_training(tmp_path / "elsewhere")
    pack(tmp_path / "elsewhere", tmp_path / "state")
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    command = ["paper_scale.py", "--data", str(tmp_path / "nothing"), "-o", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*command, "--state", str(tmp_path / "state"), "--scale", "glance"])
    with pytest.raises(UserError, match="is no task folder"):
        paper_scale.main()
    assert {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()} == before
