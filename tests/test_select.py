"""``nnunet_ima select``: the most robust checkpoint within a budget of clean Dice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nnunet_project import make_trainer, quiet, read
from PIL import Image

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import select as module
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.evaluate import Request
from nnunet_ima.evaluation.select import SELECTED, Candidate, select
from nnunet_ima.evaluation.summary import nothing_learned
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

ATTACK = ("--attack", "pgd:steps=2", "--level", "2", "--max-samples", "6", "-device", "cpu")


@pytest.fixture(scope="module")
def hardened(project, std_2d, tmp_path_factory) -> Path:
    """A model folder with two snapshots."""
    folder = tmp_path_factory.mktemp("select")
    start = str(std_2d / "fold_0" / "checkpoint_final.pth")
    with project.in_force(), pytest.MonkeyPatch.context() as patch, quiet():
        patch.setenv("nnUNet_results", str(folder))
        trainer = make_trainer(project, nnUNetTrainerIMA, start_from=start, epsilon=3.0, snapshots=3)
        trainer.on_train_start()
        trainer.network.train()
        for largest in (1.0, 3.0):
            trainer.train_step(next(trainer.dataloader_train))
            trainer.margins.update([("case", 0)], torch.tensor([largest]))
            trainer._keep_snapshot()
            trainer.current_epoch += 1
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert len(trainer.snapshots) == 2
    return Path(trainer.output_folder).parent


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        return main(["select", *arguments])


@pytest.fixture(scope="module")
def selected(hardened, tmp_path_factory) -> Path:
    """What a selection wrote. It may be copied, to go on from there."""
    folder = tmp_path_factory.mktemp("selected") / "out"
    assert run("-m", str(hardened), "-o", str(folder), "--max-clean-drop", "100", *ATTACK) == 0
    return folder


def never(*_: object) -> None:
    raise AssertionError


def test_select_measures_chooses_draws_and_copies(hardened, tmp_path, capsys):
    assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK) == 0
    selection = read(tmp_path / "selection.json")
    names = [candidate["checkpoint"] for candidate in selection["candidates"]]
    assert "checkpoint_final.pth" in names
    assert sum(name.startswith("snapshot") for name in names) > 1
    # Those of epochs in which hardly anything was learned are among them.
    for candidate in selection["candidates"]:
        (folder,) = tmp_path.glob(f"*/{Path(candidate['checkpoint']).stem}")
        summary = read(folder / "summary.json")
        assert candidate["learned"] is not nothing_learned(summary)
        assert candidate["trusted"] is summary["trusted"]
    best = max(selection["candidates"], key=lambda c: (c["learned"], c["trusted"], c["robust"], c["clean"]))
    assert selection["selected"] == best["checkpoint"]
    fold = hardened / "fold_0"
    assert (fold / SELECTED).read_bytes() == (fold / best["checkpoint"]).read_bytes()
    margins = [c["largest_margin"] for c in selection["candidates"] if c["checkpoint"].startswith("snapshot")]
    assert margins == sorted(margins)
    with Image.open(tmp_path / "selection.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
    assert "**selected**" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(hardened, tmp_path, monkeypatch):
    assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK) == 0
    before = (tmp_path / "selection.json").read_text(encoding="utf-8")
    other = tmp_path.with_name("other")
    shutil.copytree(tmp_path, other)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", never)
        assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "99", *ATTACK) == 0
        assert json.loads(before)["candidates"] == read(tmp_path / "selection.json")["candidates"]
        with pytest.raises(AssertionError):
            run("-m", str(hardened), "-o", str(tmp_path), *ATTACK, "--seed", "1")
        # Two programs' attacks would be compared with each other.
        patch.setattr("nnunet_ima.evaluation.environment.SOURCES", "0123456789abcdef")
        with pytest.raises(AssertionError):
            run("-m", str(hardened), "-o", str(other), "--max-clean-drop", "100", *ATTACK)


def test_another_way_of_measuring_costs_nothing_that_was_found(hardened, tmp_path, monkeypatch):
    ways = [(), ("--seed", "1"), ("--level", "3"), ("--max-samples", "5")]
    for way in ways:
        assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK, *way) == 0

    monkeypatch.setattr(module, "evaluate", never)
    for way in ways:
        assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK, *way) == 0


def test_a_file_that_changed_is_measured_again(hardened, tmp_path):
    model = tmp_path / hardened.name
    shutil.copytree(hardened, model)
    assert run("-m", str(model), "-o", str(tmp_path / "out"), "--max-clean-drop", "100", *ATTACK) == 0
    spoil(model / "fold_0" / "checkpoint_final.pth")
    before = by_name(tmp_path)["checkpoint_final.pth"]
    assert run("-m", str(model), "-o", str(tmp_path / "out"), "--max-clean-drop", "100", *ATTACK) == 0
    assert by_name(tmp_path)["checkpoint_final.pth"] != before


def by_name(folder: Path) -> dict[str, tuple[float, float]]:
    candidates = read(folder / "out" / "selection.json")["candidates"]
    return {c["checkpoint"]: (c["clean"], c["robust"]) for c in candidates}


@pytest.mark.parametrize("how", ["edited", "cut", "no table"])
def test_a_measurement_that_was_edited_or_damaged_is_neither_believed_nor_attacked_again(
    hardened, selected, tmp_path, monkeypatch, how
):
    output = tmp_path / "out"
    shutil.copytree(selected, output)
    chosen = read(output / "selection.json")["selected"]
    (file, *_) = [file for file in output.glob("*/*/summary.json") if f"{file.parent.name}.pth" != chosen]
    summary = read(file)
    summary["results"][0]["tvdi"] = summary["clean"]["tvdi"] = 0.999
    content = json.dumps(summary)
    file.write_text({"edited": content, "cut": content[:-9], "no table": "[]"}[how], encoding="utf-8")
    monkeypatch.setattr("nnunet_ima.attacks.attack.Attack.__call__", None)
    assert run("-m", str(hardened), "-o", str(output), "--max-clean-drop", "100", *ATTACK) == 0
    for name in ("selection.json", "table.md"):
        assert (output / name).read_bytes() == (selected / name).read_bytes()


def test_another_fold_or_model_in_the_same_folder_is_measured_and_costs_nothing_that_was_found(
    hardened, tmp_path, monkeypatch
):
    """Of the other fold the weights are the same: only its cases differ."""
    model, other = tmp_path / hardened.name, tmp_path / "other"
    for folder in (model, other):
        shutil.copytree(hardened, folder)
    shutil.copytree(model / "fold_0", model / "fold_1")
    for file in (other / "fold_0").glob("*.pth"):
        spoil(file)
    asked = [("-m", str(model)), ("-m", str(model), "-f", "1"), ("-m", str(other))]
    known = ("-o", str(tmp_path / "out"), "--max-clean-drop", "100", *ATTACK)
    found = []
    for model_and_fold in asked:
        assert run(*model_and_fold, *known) == 0
        found.append(by_name(tmp_path))
    assert found[0] != found[1] != found[2] != found[0]
    monkeypatch.setattr(module, "evaluate", never)
    for model_and_fold, wanted in zip(asked, found, strict=True):
        assert run(*model_and_fold, *known) == 0
        assert by_name(tmp_path) == wanted


def test_another_reference_costs_nothing_that_was_found_of_the_first(hardened, selected, std_2d, tmp_path, monkeypatch):
    """Both have one name, as trainings of two seeds have."""
    other = tmp_path / "other" / std_2d.parent.name / std_2d.name
    shutil.copytree(std_2d, other)
    spoil(other / "fold_0" / "checkpoint_final.pth")
    output = tmp_path / "out"
    shutil.copytree(selected, output)
    known = ("-m", str(hardened), "-o", str(output), "--max-clean-drop", "100", *ATTACK)
    aims = []
    for reference in (std_2d, other):
        assert run(*known, "--reference", str(reference)) == 0
        aims.append(read(output / "selection.json")["clean_aim"])
    assert aims[0] != aims[1]
    monkeypatch.setattr(module, "evaluate", never)
    for reference, aim in zip((std_2d, other), aims, strict=True):
        assert run(*known, "--reference", str(reference)) == 0
        assert read(output / "selection.json")["clean_aim"] == aim


def spoil(file: Path) -> None:
    """Of a checkpoint the weights."""
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"] = {name: 0 * value for name, value in checkpoint["network_weights"].items()}
    torch.save(checkpoint, file)


scores = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=50)
@given(scores, st.floats(0, 20))
@example([(0.9, 0.8, True, False), (0.9, 0.3, True, True), (0.9, 0.9, False, True)], 1.0)
@example([(0.9, 0.8, False, False), (0.9, 0.3, True, False), (0.9, 0.9, False, True)], 1.0)
def test_the_chosen_one_is_the_most_robust_of_those_within_the_budget(tmp_path_factory, found, drop):
    model = tmp_path_factory.mktemp("model")
    (model / "fold_0").mkdir()
    for epoch in range(len(found)):
        (model / "fold_0" / f"snapshot_epoch_{epoch:04d}.pth").write_bytes(bytes([epoch]))
    with pytest.MonkeyPatch().context() as patch:
        values = iter(found)
        patch.setattr(module, "_measure", lambda asked: measured(asked, *next(values)))
        patch.setattr(module, "_draw", lambda *_: None)
        chosen, _ = select(request(model), drop, None)
    lowest = max(clean for clean, *_ in found) - drop / 100
    # Rounding may decide at the very edge of the budget; one that has learned nothing is chosen only where all have.
    # So is one of which a check failed.
    allowed = [(learned, trusted, robust, clean) for clean, robust, learned, trusted in found if clean >= lowest]
    assert (chosen.learned, chosen.trusted, chosen.robust, chosen.clean) == max(allowed)
    text = (model / "out" / "table.md").read_text(encoding="utf-8")
    rows = [line.rpartition(" | ")[2] for line in text.splitlines() if line.startswith("| ")][2:]
    assert ["has not learned" not in row for row in rows] == [learned for *_, learned, _ in found]
    assert ["not to be trusted" not in row for row in rows] == [trusted for *_, trusted in found]
    assert ("says nothing of robustness" in text) is not all(learned for *_, learned, _ in found)
    assert ("a check of the attack failed" in text) is not all(trusted for *_, trusted in found)
    written = read(model / "out" / "selection.json")["candidates"]
    assert [candidate["trusted"] for candidate in written] == [trusted for *_, trusted in found]
    assert (model / "fold_0" / SELECTED).read_bytes() == (model / "fold_0" / chosen.checkpoint).read_bytes()


def measured(asked: Request, clean: float, robust: float, learned: bool = True, trusted: bool = True) -> Candidate:
    return Candidate(asked.checkpoint, 0, None, clean, robust, learned=learned, trusted=trusted)


def request(model: Path) -> Request:
    return Request(None, None, "0", "", "", "", model, "sound", "l2", ["5"], ["pgd"], None, 1, 0, False, "cpu",
                   model / "out", "")  # fmt: skip


def test_a_reference_sets_the_budget_and_may_leave_nobody_within_it(tmp_path, monkeypatch):
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    values = iter([(0.9, 0.1), (0.7, 0.5)])  # the reference comes first
    monkeypatch.setattr(module, "_measure", lambda asked: measured(asked, *next(values)))
    monkeypatch.setattr(module, "_check", lambda *_: None)
    with pytest.raises(UserError, match=r"checkpoint_final\.pth, has 70\.0 %"):
        select(request(tmp_path), 1.0, tmp_path / "stock")
    assert not (tmp_path / "fold_0" / SELECTED).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max-clean-drop", "-1"), "between 0 and 100"),
        (("--max-clean-drop", "nan"), "between 0 and 100"),
        (("-f", "3"), "no snapshot"),
        (("--attack", "none"), "no attack 'none'"),
        (("--level", "0"), "above 0"),
    ],
)
def test_what_cannot_be_done_ends_with_a_sentence(hardened, tmp_path, capsys, arguments, said):
    assert run("-m", str(hardened), "-o", str(tmp_path), *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error


def test_what_cannot_be_measured_is_found_out_before_anything_is_measured_or_removed(hardened, tmp_path, monkeypatch):
    assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK) == 0
    before = sorted(tmp_path.rglob("*"))

    monkeypatch.setattr(module, "evaluate", never)
    assert run("-m", str(hardened), "-o", str(tmp_path), *ATTACK, "--attack", "apdg") == 2
    assert run("-m", str(hardened), "-o", str(tmp_path), *ATTACK, "--reference", str(tmp_path / "none")) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_somebody_elses_results_are_not_removed(hardened, tmp_path, capsys):
    """Neither a folder of another version, nor a run that a user made with evaluate."""
    assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK) == 0
    (other,) = tmp_path.glob("*/checkpoint_final")
    shutil.rmtree(other)
    other.mkdir()
    (other / "summary.json").write_text('{"command": "nnunet_ima evaluate"}', encoding="utf-8")
    assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK) == 2
    assert "move them away" in capsys.readouterr().err
    assert read(other / "summary.json") == {"command": "nnunet_ima evaluate"}
    (other / "summary.json").unlink()
    mine = ("-m", str(hardened), "-o", str(other), "--levels", "3", "--attacks", "pgd:steps=1", "--max-samples", "2")
    assert main(["evaluate", *mine, "--no-cases", "-device", "cpu"]) == 0
    before = {file: file.read_bytes() for file in other.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert run("-m", str(hardened), "-o", str(tmp_path), "--max-clean-drop", "100", *ATTACK) == 2
    assert "holds the results of another evaluation" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in other.rglob("*") if file.is_file()} == before
