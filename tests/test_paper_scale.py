"""The study's program: what it carries from machine to machine is what was there."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import paper_scale
import study_machines
import study_parts
import study_results
import study_state
from study_machines import machines
from study_parts import LARGEST_PART, MANIFEST
from study_state import HALF, RECORDS, ROUNDED_MARK, pack, round_before_evaluations, unpack

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline
from nnunet_ima.evaluation.records import Records
from nnunet_ima.evaluation.report.published import published_levels
from nnunet_ima.evaluation.study import Study
from nnunet_ima.settings import validate

MODELS = Path("nnUNet_results/Dataset004_Hippocampus")
FOLD = MODELS / "nnUNetTrainerIMA__nnUNetPlans_glance__2d_glance_IMA" / "fold_0"
LOGS, RESULTS = Path("logs_nnUNetTrainerIMA"), Path("sound_l2_IMA")
FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"


def a_training(
    work: Path, name: str = LATEST, features: int = 8, epochs: int = 7, trainer: str = "IMA"
) -> dict[str, Any]:
    """As nnU-Net and the study leave one: its decoder holds the encoder's weights once more."""
    weight = torch.randn(features, features)
    checkpoint = {
        "network_weights": {"encoder.w": weight, "decoder.encoder.w": weight},
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.randn(features, features)}}, "param_groups": [{"lr": 0.1}],
        },
        "grad_scaler_state": {"scale": 65536.0},
        "init_args": {"nnunet_ima": {"state": {
            "margins": {"case": torch.rand(5) * 15}, "visits": torch.arange(5),
            "averages": {"case": {"sums": torch.rand(3, 4).half(), "weights": torch.rand(4).half()}},
        }}},
        "current_epoch": epochs,
        "trainer_name": f"nnUNetTrainer{trainer}",
    }  # fmt: skip
    fold = work / str(FOLD).replace("IMA", trainer)
    fold.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, fold / name)
    for file in ("plans.json", "dataset.json"):
        (fold.parent / file).write_text(f'{{"{file}": 1}}')
    logs = work / str(LOGS).replace("IMA", trainer)
    logs.mkdir(exist_ok=True)
    (logs / f"train_{trainer}.log").write_text(f"{epochs} epochs")
    if name == FINAL:
        (logs / f"train_{trainer}.done").write_text("{}")
    (logs / "running.pid").write_text("1")
    (work / "nnUNet_preprocessed").mkdir(exist_ok=True)
    (work / "nnUNet_preprocessed" / "large").write_bytes(b"0" * 100)
    return checkpoint


def an_evaluation(work: Path, lines: int, finished: bool = False, **of: str) -> None:
    """Its records so far, and what says that it is finished."""
    (work / RESULTS / "records").mkdir(parents=True, exist_ok=True)
    (work / RESULTS / "run.json").write_text(json.dumps({"identity": {"version of": {**versions(), **of}}}))
    (work / RESULTS / "records" / "journal.jsonl").write_text("a line\n" * lines)
    (work / LOGS / f"{RESULTS}.log").write_text(f"{lines} lines")
    if finished:
        (work / RESULTS / "summary.json").write_text("{}")
        (work / LOGS / f"{RESULTS}.done").write_text("{}")


def lines_of(work: Path) -> int:
    journal = work / RESULTS / "records" / "journal.jsonl"
    return journal.read_text().count("\n") if journal.is_file() else 0


def stored_in(state: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in state.iterdir()}


def loaded(work: Path, name: str = LATEST, fold: Path = FOLD) -> dict[str, Any]:
    return dict(torch.load(work / fold / name, weights_only=True))


def test_a_study_goes_on_elsewhere_from_what_was_carried(tmp_path):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    checkpoint = a_training(here)
    (here / "logs").mkdir()
    (here / "logs" / "convert.done").write_text("{}")
    pack(here, state)
    assert sum(file.stat().st_size for file in state.iterdir()) < 20_000
    unpack(state, there)
    found = loaded(there)
    assert found.keys() == checkpoint.keys()
    weights = found["network_weights"]
    assert weights["encoder.w"].dtype == torch.float32
    torch.testing.assert_close(weights["encoder.w"], checkpoint["network_weights"]["encoder.w"], rtol=5e-4, atol=1e-7)
    assert torch.equal(weights["encoder.w"], weights["decoder.encoder.w"])
    assert found["optimizer_state"]["state"].keys() == {0}
    ours, was = (one["init_args"]["nnunet_ima"]["state"] for one in (found, checkpoint))
    assert torch.equal(ours["margins"]["case"], was["margins"]["case"])
    assert torch.equal(ours["visits"], was["visits"])
    for kind in ("sums", "weights"):
        one, other = (state["averages"]["case"][kind] for state in (ours, was))
        assert one.dtype == torch.float16
        assert one.shape == other.shape
        assert float((one.float() - other.float()).abs().max()) <= study_state.FINEST / 2 + 2**-12
    assert found["current_epoch"] == 7
    assert (there / LOGS / "train_IMA.log").read_text() == "7 epochs"
    assert (there / "logs" / "convert.done").is_file()
    assert (there / FOLD.parent / "plans.json").read_text() == '{"plans.json": 1}'
    # A process of another machine is none here; data are made anew.
    assert not (there / LOGS / "running.pid").exists()
    assert not (there / "nnUNet_preprocessed").exists()


def test_the_validation_cases_are_carried(tmp_path):
    """nnU-Net makes the file when a training begins: on a new machine where all have ended there was none."""
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    splits = Path("nnUNet_preprocessed/Dataset004_Hippocampus/splits_final.json")
    a_training(here)
    (here / splits).parent.mkdir()
    (here / splits).write_text('[{"train": ["a"], "val": ["b"]}]')
    pack(here, state)
    unpack(state, there)
    assert (there / splits).read_text() == (here / splits).read_text()
    unpack(state, there)
    (there / splits).write_text('[{"train": ["b"], "val": ["a"]}]')
    shutil.rmtree(there / MODELS)
    with pytest.raises(UserError, match="other validation cases"):
        unpack(state, there)
    assert not (there / MODELS).exists()


# ---- the files


def test_a_model_of_any_size_is_carried_in_small_files(tmp_path, monkeypatch):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    assert LARGEST_PART < 16 * 2**20
    monkeypatch.setattr(study_parts, "LARGEST_PART", 2**16)
    # Two of half precision: weights and momenta.
    checkpoint = a_training(here, features=300)
    a_training(here, trainer="SAT")
    pack(here, state)
    sizes = [file.stat().st_size for file in state.iterdir()]
    assert max(sizes) == 2**16 < 2 * 300**2 < sum(sizes)
    # One stream: no more files than it takes, and the manifest.
    assert len(sizes) == 2 + sum(sizes) // 2**16
    unpack(state, there)
    weights = loaded(there)["network_weights"]["encoder.w"]
    torch.testing.assert_close(weights, checkpoint["network_weights"]["encoder.w"], rtol=5e-4, atol=1e-7)
    assert (there / str(FOLD).replace("IMA", "SAT") / LATEST).is_file()


def test_a_state_that_was_half_written_is_the_one_before(tmp_path, monkeypatch):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, epochs=3)
    pack(here, state)
    before = stored_in(state)
    a_training(here, epochs=4)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_parts, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(here, state)
    assert before.items() < stored_in(state).items()
    unpack(state, there)
    assert loaded(there)["current_epoch"] == 3
    # Nothing of what came before is left once the next one is whole.
    pack(here, state)
    named = {part["file"] for part in study_parts.read_manifest(state)["parts"]}
    assert stored_in(state).keys() == {MANIFEST, *named}
    unpack(state, there)
    assert loaded(there)["current_epoch"] == 4


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_a_state_that_is_not_whole_is_refused_before_anything_is_written(tmp_path, damage):
    a_training(tmp_path / "here")
    pack(tmp_path / "here", tmp_path / "state")
    (part,) = (tmp_path / "state").glob("*.part")
    content = part.read_bytes()
    part.write_bytes(content[:-1] if damage == "cut off" else content[:-1] + b"?")
    if damage == "missing":
        part.unlink()
    with pytest.raises(UserError, match=r"copy the whole state again"):
        unpack(tmp_path / "state", tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_a_model_that_cannot_be_read_does_not_take_the_others_with_it(tmp_path):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, epochs=3)
    a_training(here, epochs=3, trainer="SAT")
    pack(here, state)
    (here / FOLD / LATEST).write_bytes(b"damaged")
    a_training(here, epochs=4, trainer="SAT")
    (here / "logs").mkdir()
    (here / "logs" / "plan.log").write_text("planned")
    with pytest.raises(UserError, match=r"IMA.*cannot be read"):
        pack(here, state)
    unpack(state, there)
    assert loaded(there, fold=Path(str(FOLD).replace("IMA", "SAT")))["current_epoch"] == 4
    assert (there / "logs" / "plan.log").is_file()
    # Of the damaged one what was carried before.
    assert loaded(there)["current_epoch"] == 3


def test_a_damaged_state_does_not_keep_what_can_be_read_from_being_carried(tmp_path):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, epochs=3)
    a_training(here, epochs=3, trainer="SAT")
    pack(here, state)
    for part in state.glob("*.part"):
        part.write_bytes(b"damaged")
    (here / FOLD / LATEST).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"IMA.*cannot be read"):
        pack(here, state)
    unpack(state, there)
    assert loaded(there, fold=Path(str(FOLD).replace("IMA", "SAT")))["current_epoch"] == 3
    assert not (there / FOLD / LATEST).exists()


def test_a_state_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "records.tar.gz").write_bytes(b"")
    for call in (lambda: unpack(tmp_path / "state", tmp_path), lambda: pack(tmp_path, tmp_path / "state")):
        with pytest.raises(UserError, match="older version"):
            call()


def test_a_training_that_ends_while_it_is_packed_is_packed_as_it_ended(tmp_path, monkeypatch):
    """A note that it has ended, with a checkpoint of before, would be believed elsewhere."""
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, LATEST, epochs=3)
    tar, ends = study_state._tar, iter([True])

    def tar_while_it_ends(*arguments: Any) -> bytes:
        if next(ends, False):
            a_training(here, FINAL, epochs=7)
        return tar(*arguments)

    monkeypatch.setattr(study_state, "_tar", tar_while_it_ends)
    pack(here, state)
    unpack(state, there)
    assert (there / LOGS / "train_IMA.done").is_file()
    assert loaded(there, FINAL)["current_epoch"] == 7


def test_what_is_being_written_is_not_carried_and_a_journal_that_grows_is(tmp_path, monkeypatch):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, FINAL)
    round_before_evaluations(here / FOLD, [])
    an_evaluation(here, 2)
    (here / RESULTS / ".summary.json.123.tmp").write_text("half")
    journal = here / RESULTS / "records" / "journal.jsonl"
    information = tarfile.TarFile.gettarinfo

    def grows(self: tarfile.TarFile, name: Any, *more: Any) -> tarfile.TarInfo:
        if Path(name) == journal:
            with journal.open("a") as stream:
                stream.write("a line\n")
        return information(self, name, *more)

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", grows)
    pack(here, state)
    unpack(state, there)
    assert lines_of(there) in (2, 3)
    assert not list(there.rglob("*.tmp"))


def test_a_study_is_carried_all_along_and_not_only_at_its_end(tmp_path):
    """A machine that is taken back ends nothing in order."""
    here, state = tmp_path / "here", tmp_path / "state"
    a_training(here, epochs=3)

    def epochs_carried() -> int | None:
        with contextlib.suppress(UserError, FileNotFoundError):
            shutil.rmtree(tmp_path / "there", ignore_errors=True)
            unpack(state, tmp_path / "there")
            return int(loaded(tmp_path / "there")["current_epoch"])
        return None

    with paper_scale.packed_meanwhile(here, state, 0.05):
        for epochs in (3, 4):
            # A damaged checkpoint does not end it.
            (here / FOLD / LATEST).write_bytes(b"damaged")
            time.sleep(0.3)
            a_training(here, epochs=epochs)
            end = time.monotonic() + 60
            while epochs_carried() != epochs:
                assert time.monotonic() < end
                time.sleep(0.05)
    with paper_scale.packed_meanwhile(here, None):
        assert stored_in(state)


def a_state_of(state: Path, archive: Path) -> None:
    state.mkdir()
    study_parts.store(state, {RECORDS: archive.read_bytes()})


@pytest.mark.parametrize("name", ["../elsewhere.txt", "/elsewhere.txt", "a/../../elsewhere.txt"])
def test_a_state_writes_nothing_outside_the_work(tmp_path, name):
    (tmp_path / "content").write_text("no")
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        member = tar.gettarinfo(tmp_path / "content")
        member.name = name
        with (tmp_path / "content").open("rb") as content:
            tar.addfile(member, content)
    a_state_of(tmp_path / "state", tmp_path / "archive")
    with pytest.raises(UserError, match="wants to put something outside"):
        unpack(tmp_path / "state", tmp_path / "work")
    assert not list(tmp_path.rglob("elsewhere*"))


def test_a_link_in_a_state_is_not_followed(tmp_path):
    (tmp_path / "there").symlink_to("/")
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        tar.add(tmp_path / "there", "there")
    a_state_of(tmp_path / "state", tmp_path / "archive")
    unpack(tmp_path / "state", tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


# ---- what is further goes before


def test_the_later_stage_of_a_training_stays_with_the_notes_that_belong_to_it(tmp_path):
    """Of two machines that worked on one study, whichever packed last."""
    stages = [(LATEST, 3), (LATEST, 7), (FINAL, 22)]
    for place, (name, epochs) in enumerate(stages):
        work = tmp_path / f"work_{epochs}"
        a_training(work, name, epochs=epochs)
        pack(work, tmp_path / f"state_{epochs}")
        assert place == 0 or epochs > stages[place - 1][1]
    for name, epochs in stages:
        for _, others in stages:
            work = tmp_path / f"there_{epochs}_{others}"
            a_training(work, name, epochs=epochs)
            if epochs == others:
                continue
            unpack(tmp_path / f"state_{others}", work)
            expected = max(epochs, others)
            file = study_state._newest(work / FOLD)
            assert file is not None
            assert torch.load(file, weights_only=True)["current_epoch"] == expected
            assert (work / LOGS / "train_IMA.log").read_text() == f"{expected} epochs"
            assert (work / LOGS / "train_IMA.done").exists() == (expected == 22)
            assert (work / FOLD / LATEST).exists() == (expected != 22)


def test_of_two_trainings_that_have_ended_none_is_chosen_silently(tmp_path):
    for name in ("here", "there"):
        a_training(tmp_path / name, FINAL)
    pack(tmp_path / "here", tmp_path / "state")
    before = (tmp_path / "there" / FOLD / FINAL).read_bytes()
    with pytest.raises(UserError, match=r"two trainings of .*IMA that have both ended"):
        unpack(tmp_path / "state", tmp_path / "there")
    assert (tmp_path / "there" / FOLD / FINAL).read_bytes() == before
    # The same one, before and after it was rounded, is no other one.
    unpack(tmp_path / "state", tmp_path / "here")
    round_before_evaluations(tmp_path / "here" / FOLD, [])
    unpack(tmp_path / "state", tmp_path / "here")
    assert loaded(tmp_path / "here", FINAL)[ROUNDED_MARK] == HALF


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [((5, False), None, 5), ((5, False), (3, False), 5), ((3, False), (5, False), 5), ((5, True), (5, False), 5),
     ((4, True), (5, False), 4), ((5, False), (4, True), 4), ((5, True), (4, True), 4)],
)  # fmt: skip
def test_of_an_evaluation_what_is_further_stays_with_the_notes_that_belong_to_it(tmp_path, here, there, expected):
    works = tmp_path / "here", tmp_path / "there"
    a_training(works[0], FINAL)
    round_before_evaluations(works[0] / FOLD, [])
    pack(works[0], tmp_path / "trained")
    unpack(tmp_path / "trained", works[1])
    for work, found in zip(works, (here, there), strict=True):
        if found is not None:
            an_evaluation(work, *found)
    pack(works[0], tmp_path / "state")
    unpack(tmp_path / "state", works[1])
    assert lines_of(works[1]) == expected
    assert (works[1] / LOGS / f"{RESULTS}.log").read_text() == f"{expected} lines"
    finished = any(found is not None and found[1] for found in (here, there))
    assert (works[1] / RESULTS / "summary.json").exists() == finished
    assert (works[1] / LOGS / f"{RESULTS}.done").exists() == finished


def test_an_evaluation_that_is_not_finished_goes_on_elsewhere_if_it_is_of_what_is_carried(tmp_path):
    here, state = tmp_path / "here", tmp_path / "state"
    a_training(here, FINAL)
    an_evaluation(here, 5)
    pack(here, state)
    unpack(state, tmp_path / "there")
    # Of weights that will be rounded: it would be continued with other ones.
    assert not lines_of(tmp_path / "there")
    shutil.rmtree(here / RESULTS)
    round_before_evaluations(here / FOLD, [])
    an_evaluation(here, 5)
    pack(here, state)
    unpack(state, tmp_path / "elsewhere")
    assert lines_of(tmp_path / "elsewhere") == 5
    assert (tmp_path / "elsewhere" / FOLD / FINAL).read_bytes() == (here / FOLD / FINAL).read_bytes()


def test_an_evaluation_of_other_versions_begins_anew_and_says_so(tmp_path, capsys):
    """An evaluation refuses to go on with it, on a machine where nobody can remove it."""
    a_training(tmp_path / "here", FINAL)
    round_before_evaluations(tmp_path / "here" / FOLD, [])
    an_evaluation(tmp_path / "here", 5, torch="1.0")
    pack(tmp_path / "here", tmp_path / "state")
    unpack(tmp_path / "state", tmp_path / "there")
    assert not lines_of(tmp_path / "there")
    assert "sound_l2_IMA was begun with other versions" in capsys.readouterr().out


def test_a_finished_training_is_carried_without_what_only_training_needs(tmp_path):
    """At the paper's scale TE's averages are 104 MB."""
    checkpoint = a_training(tmp_path / "here", FINAL)
    pack(tmp_path / "here", tmp_path / "state")
    unpack(tmp_path / "state", tmp_path / "there")
    assert not (tmp_path / "there" / FOLD / LATEST).exists()
    round_before_evaluations(tmp_path / "here" / FOLD, [])
    for work in ("here", "there"):
        found = loaded(tmp_path / work, FINAL)
        # nnU-Net loads these before it validates, and an evaluation tells margins.
        assert found["optimizer_state"] == {"state": {}, "param_groups": [{"lr": 0.1}]}
        ours, was = (one["init_args"]["nnunet_ima"]["state"] for one in (found, checkpoint))
        assert ours["averages"] == {}
        assert torch.equal(ours["margins"]["case"], was["margins"]["case"])


# ---- what is evaluated


def weights_of(work: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(work / FOLD / FINAL, weights_only=True)["network_weights"])


def options_of(*command: str) -> argparse.Namespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paper_scale.py", "--data", "none", *command])
        return paper_scale._options()


def a_study(work: Path, state: Path | None) -> tuple[Study, Method]:
    """As the program makes it, with one method and one evaluation."""
    command = ["-o", str(work), "--methods", "IMA", "--linf", "--paper-levels", "--scale", "glance"]
    options = options_of(*command, *(["--state", str(state)] if state else []))
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


def test_ima_in_single_precision_is_ima_but_for_that(tmp_path):
    options = options_of("--methods", "IMA", "IMA-single", "--scale", "small")
    made = [method for method, _ in paper_scale.methods(options, paper_scale.SMALL)]
    assert [method.trainer for method in made] == ["nnUNetTrainerIMA"] * 2 * 3
    one, other = made[:2]
    assert {**one.settings, "attack_precision": "single"} == other.settings
    pipeline = Pipeline(tmp_path, "plans", paper_scale.SMALL.network, "cpu")
    assert len({pipeline.key(method) for method in made}) == len(made)
    # By this name its parts of before go on.
    assert pipeline.key(other) == "IMA_single"


@pytest.mark.parametrize("scale", list(paper_scale.SCALES))
def test_ima_as_it_is_printed_can_be_asked_for_at_any_scale(scale):
    names = {"IMA": {}, "IMA-no-noise": {"random_start": False}, "IMA-origin": {"boundary_search": "origin"}}
    options = options_of("--methods", *names, "--scale", scale, "--repetitions", "1")
    made = [method for method, _ in paper_scale.methods(options, paper_scale.SCALES[scale])]
    for method, differs in zip(made, names.values(), strict=True):
        assert method.settings == {**made[0].settings, **differs}
        assert set(validate(method.settings, "here")) == set(method.settings)
    assert [method.variant for method in made] == ["", "_no_noise", "_origin"]


def test_what_the_small_scale_sets_otherwise_can_be_asked_for_as_published(tmp_path):
    names = ("SAT", "SAT-eps15", "TE", "TE-weight300")
    options = options_of("--methods", *names, "--scale", "small", "--repetitions", "1")
    made = {method.title: method for method, _ in paper_scale.methods(options, paper_scale.SMALL)}
    assert list(made) == list(names)
    for name, differs in (("SAT-eps15", {"epsilon": 15.0}), ("TE-weight300", {"te_weight": 300.0})):
        usual = made[name.partition("-")[0]]
        assert made[name].trainer == usual.trainer
        assert made[name].settings == {**usual.settings, **differs}
        assert made[name].settings != usual.settings
    pipeline = Pipeline(tmp_path, "plans", paper_scale.SMALL.network, "cpu")
    assert len({pipeline.key(method) for method in made.values()}) == len(made)


@pytest.mark.parametrize("scale", [name for name in paper_scale.SCALES if name != "small"])
def test_a_variant_that_a_scale_has_anyhow_is_refused(scale, capsys):
    with pytest.raises(SystemExit) as ended:
        options_of("--methods", "SAT", "SAT-eps15", "--scale", scale)
    assert ended.value.code == 2
    assert f"--methods SAT-eps15: at the scale {scale} that is SAT as it is; leave it out." in capsys.readouterr().err


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))
def test_parts_of_a_studys_repetitions_are_the_study(repetitions, first, second):
    """Each part in a work folder of its own: no model twice, none missing, and each by the same name as in one go."""

    def of(begin: int, end: int) -> list[tuple[Method, int]]:
        options = options_of("--scale", "small", "--from-repetition", str(begin), "--repetitions", str(end))
        return list(paper_scale.methods(options, paper_scale.SMALL)) if end else []

    cuts = sorted({0, min(first, repetitions), min(second, repetitions), repetitions})
    parts = [of(begin + 1, end) for begin, end in pairwise(cuts)]
    assert [made for part in parts for made in part] == of(1, repetitions)


def test_a_part_of_a_study_is_not_put_where_whole_ones_are():
    assert paper_scale.is_the_study(options_of("--scale", "small"), paper_scale.SMALL)
    part = options_of("--scale", "small", "--from-repetition", "2")
    assert not paper_scale.is_the_study(part, paper_scale.SMALL)


@given(
    st.lists(
        st.sampled_from([
            ("--methods", "IMA", "STD"), ("--levels", "5"), ("--linf",), ("--paper-levels", "5", "15"),
            ("--paper-linf", "2/255"), ("--attack", "pgd:steps=3"), ("--standard", "10"), ("--samples", "7"),
            ("--other-samples", "5"), ("--repetitions", "2"), ("--from-repetition", "2"), ("--jobs", "2"),
            ("--workers", "3"), ("--compile",), ("-device", "cuda"), ("--state", "STATE"),
        ]),
        unique_by=lambda option: option[0],
    ),
    st.sampled_from(list(paper_scale.SCALES)[:2]),
)  # fmt: skip
def test_the_command_that_results_name_asks_for_what_was_asked(chosen, scale):
    """All that decides a figure, or how long it took."""
    asked = ["--scale", scale, "--repetitions", "3", *(word for option in chosen for word in option)]
    options = options_of(*asked)
    _, program, *shown = shlex.split(paper_scale._command(options))
    assert program == "benchmarks/paper_scale.py"
    again = paper_scale._options(shown)
    assert {**vars(again), "data": None} == {**vars(options), "data": None}


def test_results_name_the_task_wherever_its_folder_lies(tmp_path, monkeypatch):
    (tmp_path / "Task04_Hippocampus").mkdir()
    monkeypatch.chdir(tmp_path / "Task04_Hippocampus")
    assert "--data Task04_Hippocampus --scale" in paper_scale._command(paper_scale._options(["--data", "."]))


def test_what_was_trained_with_other_settings_is_no_result_of_this_study(tmp_path):
    """It is refused, but results of what else there is are written."""
    study, method = a_study(tmp_path, None)
    pipeline = study.pipeline(method)
    assert not pipeline.has_other_settings(method)
    pipeline.logs.mkdir(exist_ok=True)
    dataset = tmp_path / "Dataset004_Hippocampus"
    fold = pipeline.fold_folder(dataset, method)
    fold.mkdir(parents=True)
    times = {"epoch_start_timestamps": [0.0], "epoch_end_timestamps": [4.0]}
    torch.save({"logging": times, "init_args": {}}, fold / FINAL)
    for settings, other in ((method.settings, False), ({**method.settings, "steps": 99}, True)):
        noted = pipeline.logs / f"train_{pipeline.key(method)}.settings.json"
        noted.write_text(json.dumps(dict(settings), sort_keys=True))
        (row,) = study_results.collect(study, dataset, [(method, 0)])
        assert (row["training"] is None) == other
        assert pipeline.has_other_settings(method) == other


@pytest.mark.parametrize(
    "option", ["--repetitions", "--samples", "--other-samples", "--jobs", "--workers", "--minutes"]
)
def test_a_number_that_would_mean_something_else_is_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        options_of("--scale", "small", option, "0")
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_a_method_that_is_named_twice_is_trained_once():
    options = options_of("--methods", "STD", "IMA", "STD", "--scale", "glance")
    assert [method.title for method, _ in paper_scale.methods(options, paper_scale.GLANCE)] == ["STD", "IMA"]


@pytest.mark.parametrize("arguments", [("0",), ("4",), ("3", "--repetitions", "2")])
def test_a_part_without_any_repetition_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        options_of("--scale", "small", "--from-repetition", *arguments)
    assert ended.value.code == 2
    assert "--from-repetition" in capsys.readouterr().err


@pytest.mark.parametrize("scale", list(paper_scale.SCALES))
def test_a_spell_of_one_epoch_is_not_lost(scale):
    """A checkpoint every five epochs was never reached in spells that are shorter than five epochs."""
    options = options_of("--methods", *paper_scale.METHODS, *paper_scale.SCALES[scale].variants, "--scale", scale)
    for method, _ in paper_scale.methods(options, paper_scale.SCALES[scale]):
        assert method.settings["save_every"] == 1


def test_the_papers_linf_levels_are_asked_for_at_its_own_scale():
    found = {
        scale: {
            one.name: one for one in paper_scale.evaluations(options_of("--scale", scale), paper_scale.SCALES[scale])
        }
        for scale in paper_scale.SCALES
    }
    assert [scale for scale, named in found.items() if "paper_linf" in named] == ["paper"]
    asked = found["paper"]["paper_linf"]
    assert (asked.protocol, asked.norm) == ("paper", "linf")
    for attack in ("AutoAttack", "WhiteNoise"):
        assert set(asked.levels) >= set(published_levels("Hippocampus", attack, "linf"))
    assert "--paper-linf 2/255" in paper_scale._command(options_of("--scale", "small", "--paper-linf", "2/255"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["-device", "cuda"], 15), (["-device", "cuda", "--jobs", "2"], 7), (["-device", "cuda", "--jobs", "16"], 1),
     (["-device", "cuda", "--workers", "3"], 3), ([], 1), (["--jobs", "2"], 1)],
)  # fmt: skip
def test_a_gpu_is_fed_by_all_cores_unless_told_otherwise(monkeypatch, arguments, expected):
    """nnU-Net's batch at the paper's scale is 366 patches, which one process augments in seconds."""
    monkeypatch.setattr(paper_scale, "available_cores", lambda: 16)
    options = options_of(*arguments)
    assert options.workers == expected
    assert f"--workers {expected}" in paper_scale._command(options)


def test_what_failed_by_itself_is_told_though_the_time_was_up_later(tmp_path):
    study, _ = a_study(tmp_path, None)

    def fail(error: Exception) -> None:
        raise error

    def be_stopped() -> None:
        study.stop()
        raise UserError("The step train_SAT failed: it was ended")

    jobs = [
        ("IMA", lambda: fail(UserError("The step train_IMA failed: no memory"))),
        ("SAT", be_stopped),
        ("TE", lambda: fail(UserError("the time is up"))),
        ("STD", lambda: fail(ValueError("a bug"))),
    ]
    assert paper_scale.failures(jobs, 1, study) == ["IMA: The step train_IMA failed: no memory", "STD: a bug"]


@pytest.mark.parametrize(
    ("asked", "rows", "failed", "expected"),
    [
        (("--scale", "small"), "complete", False, {"work", "committed"}),
        (("--scale", "small"), "complete", True, {"work"}),
        (("--scale", "small"), "partial", False, {"work"}),
        (("--scale", "small", "--samples", "20"), "complete", False, {"work"}),
        (("--scale", "small", "--other-samples", "20"), "complete", False, {"work"}),
        (("--scale", "small", "--attack", "pgd:steps=1"), "complete", False, {"work"}),
        (("--scale", "small", "--levels", "5"), "complete", False, {"work"}),
        (("--scale", "small", "--levels", "5", "10", "15", "20"), "complete", False, {"work", "committed"}),
        (("--scale", "small", "--linf"), "complete", False, {"work"}),
        (("--scale", "small", "--standard", "5"), "complete", False, {"work", "committed"}),
        (("--scale", "paper"), "complete", False, {"work", "committed"}),
        (("--scale", "paper", "--standard", "5"), "complete", False, {"work"}),
        (("--scale", "paper", "--samples", "5000"), "complete", False, {"work"}),
        (("--scale", "small", "--methods", "STD", "IMA"), "complete", False, {"work"}),
        (("--scale", "small", "--repetitions", "1"), "complete", False, {"work"}),
        (("--scale", "glance"), "complete", False, {"work"}),
        (("--scale", "small", "--results", "given"), "partial", False, {"work", "given"}),
    ],
)
def test_what_is_not_the_whole_study_does_not_replace_its_results(tmp_path, monkeypatch, asked, rows, failed, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper_scale, "RESULTS", tmp_path / "committed")
    done = {"training": {"epochs": 2}, "evaluations": {"sound_l2": {"a": 1}, "paper_l2": {"a": 1}}}
    begun = {"training": {"epochs": 2}, "evaluations": {"sound_l2": {"a": 1}, "paper_l2": None}}
    found = {"complete": [done, done], "partial": [done, begun]}[rows]
    monkeypatch.setattr(paper_scale, "collect", lambda *_: found)
    monkeypatch.setattr(paper_scale, "table", lambda _: "a table")
    options = options_of("-o", "work", *asked)
    Path("work/nnUNet_preprocessed/Dataset004_Hippocampus").mkdir(parents=True)
    scale = paper_scale.SCALES[options.scale]
    paper_scale.write(paper_scale.make_study(options, scale), options, scale, complete_if_there=not failed)
    places = {Path("work/results"), Path("committed"), Path("given")}
    written = {place for place in places if (place / f"paper_scale_{options.scale}.json").is_file()}
    assert {place.parts[0] for place in written} == expected


def test_a_training_and_an_evaluation_tell_all_machines_that_they_were_made_on(tmp_path, monkeypatch):
    here = {"device": ""}
    monkeypatch.setattr(study_machines, "this_machine", lambda *_: dict(here))
    study, method = a_study(tmp_path, None)
    (attacks,), pipeline = study.evaluations, study.pipeline(method)
    pipeline.logs.mkdir(exist_ok=True)
    dataset = pipeline.folders["nnUNet_preprocessed"] / "Dataset004_Hippocampus"

    def train_on(device: str, name: str) -> list[str]:
        here["device"] = device
        monkeypatch.setattr(Pipeline, "train", lambda *_: a_training(tmp_path, name))
        pipeline.train(dataset, method)
        return [one["device"] for one in machines(pipeline.logs, "train_IMA")]

    assert train_on("first", LATEST) == ["first"]
    assert train_on("second", LATEST) == ["first", "second"]
    assert train_on("first", FINAL) == ["first", "second"]
    # It is not trained any more.
    assert train_on("third", FINAL) == ["first", "second"]

    def evaluate_on(device: str, lines: int, finished: bool = False, **of: str) -> list[str]:
        here["device"] = device

        def evaluate(*_: object) -> Path:
            an_evaluation(tmp_path, lines, finished, **of)
            return tmp_path / RESULTS

        monkeypatch.setattr(Pipeline, "evaluate", evaluate)
        pipeline.evaluate(dataset, method, attacks)
        return [one["device"] for one in machines(pipeline.logs, str(RESULTS))]

    assert evaluate_on("first", 1) == ["first"]
    assert evaluate_on("second", 2) == ["first", "second"]
    # One of other versions was begun anew.
    assert evaluate_on("second", 2, torch="another") == ["second"]
    assert evaluate_on("third", 3, finished=True, torch="another") == ["second", "third"]
    assert evaluate_on("fourth", 3, finished=True, torch="another") == ["second", "third"]
    # Nobody noted where it was begun.
    (pipeline.logs / f"{RESULTS}.machines.json").unlink()
    (tmp_path / RESULTS / "summary.json").unlink()
    assert evaluate_on("fourth", 4, torch="another") == []


@pytest.mark.parametrize("finished", [False, True])
def test_what_was_begun_on_scans_of_other_last_digits_begins_anew_but_nothing_finished_goes(
    tmp_path, monkeypatch, capsys, finished
):
    study, method = a_study(tmp_path, None)
    (attacks,), pipeline = study.evaluations, study.pipeline(method)
    pipeline.logs.mkdir(exist_ok=True)
    records = Records(tmp_path / "part", [], "of a run")
    with records.writing():
        records.plan({"a": [0]}, [], {"a": 1})
        with pytest.raises(UserError) as refusal:
            records.plan({"a": [0]}, [], {"a": 2})
    an_evaluation(tmp_path, 3, finished)

    def evaluate(*_: object) -> Path:
        if lines_of(tmp_path):
            raise UserError(f"The step {RESULTS} failed: nnunet_ima: {refusal.value} (all of it in a log).")
        an_evaluation(tmp_path, 5)
        return tmp_path / RESULTS

    monkeypatch.setattr(Pipeline, "evaluate", evaluate)
    if finished:
        with pytest.raises(UserError, match="has changed since"):
            pipeline.evaluate(tmp_path, method, attacks)
        assert lines_of(tmp_path) == 3
    else:
        pipeline.evaluate(tmp_path, method, attacks)
        assert lines_of(tmp_path) == 5
        assert "begins anew here" in capsys.readouterr().out


def test_the_seconds_of_an_evaluation_are_those_of_all_its_pieces(tmp_path, monkeypatch):
    study, method = a_study(tmp_path, None)
    (attacks,), pipeline = study.evaluations, study.pipeline(method)
    pipeline.logs.mkdir(exist_ok=True)
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(study_machines.time, "monotonic", lambda: next(clock))

    def evaluate_with(run: str, finished: bool = False) -> float:
        def evaluate(*_: object) -> Path:
            (tmp_path / RESULTS).mkdir(exist_ok=True)
            (tmp_path / RESULTS / "run.json").write_text(run)
            if finished:
                (tmp_path / RESULTS / "summary.json").write_text("{}")
            raise UserError("stopped")

        monkeypatch.setattr(Pipeline, "evaluate", evaluate)
        with pytest.raises(UserError):
            pipeline.evaluate(tmp_path, method, attacks)
        return study_machines.seconds_spent(pipeline.logs, str(RESULTS))

    assert study_machines.seconds_spent(pipeline.logs, str(RESULTS)) == 0
    assert evaluate_with("one") == 5
    assert evaluate_with("one") == 10
    # Begun anew.
    assert evaluate_with("other") == 5
    assert evaluate_with("other", finished=True) == 10
    # Nothing is left to do.
    assert evaluate_with("other") == 10


def run(study: Study) -> None:
    ((_, job),) = study.jobs(study.output / "nnUNet_preprocessed" / "Dataset004_Hippocampus")
    job()


def test_evaluations_before_and_after_a_state_are_of_the_same_weights(tmp_path, evaluated):
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    trained = a_training(here, FINAL)
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
    files = [work / FOLD / FINAL for work in (here, there)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.load(files[0], weights_only=True)[ROUNDED_MARK] == HALF


def test_rounding_once_more_changes_nothing(tmp_path):
    a_training(tmp_path, FINAL)
    round_before_evaluations(tmp_path / FOLD, [])
    once = (tmp_path / FOLD / FINAL).read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    round_before_evaluations(tmp_path / FOLD, [tmp_path / "run"])
    assert (tmp_path / FOLD / FINAL).read_bytes() == once


def test_without_a_state_weights_stay_as_they_were_trained(tmp_path, evaluated):
    trained = a_training(tmp_path, FINAL)
    run(a_study(tmp_path, None)[0])
    assert torch.equal(evaluated[0]["encoder.w"], trained["network_weights"]["encoder.w"])


def test_a_model_that_was_evaluated_unrounded_is_not_carried_on_as_rounded(tmp_path, evaluated):
    """Neither one that was here before there was a state, nor one of an older state."""
    here, there, state = (tmp_path / name for name in ("here", "there", "state"))
    a_training(here, FINAL)
    run(a_study(here, None)[0])
    pack(here, state)
    unpack(state, there)
    for work in (here, there):
        before = (work / FOLD / FINAL).read_bytes()
        with pytest.raises(UserError, match="hold results of weights in single precision"):
            run(a_study(work, state)[0])
        assert (work / FOLD / FINAL).read_bytes() == before


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
    before = (state / MANIFEST).stat().st_mtime_ns
    found: list[int] = []

    def jobs(self: Study, dataset: Path) -> list[object]:
        found.append(torch.load(work / FOLD / LATEST, weights_only=True)["current_epoch"])
        assert (dataset / "nnUNetPlans_glance.json").is_file()
        return []

    monkeypatch.setattr(Study, "rounds", jobs)
    command = ["paper_scale.py", "--data", str(task), "-o", str(work), "--scale", "glance", "--methods", "IMA"]
    monkeypatch.setattr(sys, "argv", [*command, "--state", str(state), "--results", str(tmp_path / "results")])
    paper_scale.main()
    assert found == [7]
    assert (work / "nnUNet_raw" / "Dataset004_Hippocampus" / "dataset.json").is_file()
    assert (work / LOGS / "train_IMA.log").is_file()
    assert (state / MANIFEST).stat().st_mtime_ns > before
    # Once more, on the machine where it is.
    paper_scale.main()
    assert found == [7, 7]


def test_a_state_that_was_not_taken_up_is_not_overwritten(tmp_path, monkeypatch):
    a_training(tmp_path / "elsewhere")
    pack(tmp_path / "elsewhere", tmp_path / "state")
    before = stored_in(tmp_path / "state")
    command = ["paper_scale.py", "--data", str(tmp_path / "nothing"), "-o", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*command, "--state", str(tmp_path / "state"), "--scale", "glance"])
    with pytest.raises(SystemExit, match="is no task folder"):
        paper_scale.main()
    assert stored_in(tmp_path / "state") == before
