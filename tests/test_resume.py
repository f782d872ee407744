"""Evaluations that are killed, split over machines, or short of memory give the numbers of one that ran in peace."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_memory import make_memory_little
from nnunet_project import quiet, read, write
from results_of_runs import make_run

from nnunet_ima.attacks.oracle import Watch
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import run as run_module
from nnunet_ima.evaluation.cases import ValidationCases
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.examples import load_example
from nnunet_ima.evaluation.identity import differences, digest, sealed
from nnunet_ima.evaluation.journal import Journal
from nnunet_ima.evaluation.locks import alone
from nnunet_ima.evaluation.merge import conditions_of, merge
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.progress import Progress
from nnunet_ima.evaluation.records import Records, part_folders
from nnunet_ima.evaluation.run import BATCH_SIZE, Runner, default_batch_size, samples_in_a_pass, whole_passes
from nnunet_ima.evaluation.sources import SOURCES

WAY = (
    "--levels", "2", "8", "--attacks", "white-noise:draws=2", "apgd:steps=3", "--max-samples", "24",
    "--batch-size", "4", "-device", "cpu",
)  # fmt: skip
TABLES = ("samples.csv", "cases.csv")
KILLS = 30


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    monkeypatch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)


def evaluate(model: Path, output: Path, *more: str, status: int = 0) -> None:
    with quiet():
        assert main(["evaluate", "-m", str(model), "-o", str(output), *WAY, *more]) == status


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in TABLES]


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Of a command that is refused."""
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(scope="module")
def in_peace(project, std_2d, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in_peace") / "run"
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        evaluate(std_2d, folder)
    return folder


# ---- the journal


@given(st.lists(st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text() | st.none())), st.data())
def test_of_a_journal_that_was_cut_anywhere_all_whole_records_remain(tmp_path_factory, records, data):
    file = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(file)
    ends = []
    for record in records:
        journal.append([record])
        ends.append(file.stat().st_size)
    assert list(journal.read()) == records
    content = file.read_bytes() if records else b""
    cut = data.draw(st.integers(0, len(content)))
    file.write_bytes(content[:cut])
    whole = [record for record, end in zip(records, ends, strict=True) if end - 1 <= cut]
    assert list(journal.read()) == whole
    journal.append([{"after": 1}, {"and": 2}])
    assert list(journal.read()) == [*whole, {"after": 1}, {"and": 2}]


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_byte_that_was_changed_costs_no_more_than_one_record(tmp_path_factory, where, change):
    file = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    records = [{"number": number, "name": "x" * number} for number in range(12)]
    Journal(file).append(records)
    content = bytearray(file.read_bytes())
    content[where % len(content)] ^= change
    file.write_bytes(bytes(content))
    left = list(Journal(file).read())
    assert all(record in records for record in left)
    assert len(left) >= len(records) - 1


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_byte_that_was_changed_costs_no_more_than_one_sample_and_no_case(
    in_peace, tmp_path_factory, where, change
):  # fmt: skip
    (part,) = part_folders(in_peace)
    identity = read(in_peace / "run.json")["identity"]
    content = bytearray((part / "journal.jsonl").read_bytes())
    content[where % len(content)] ^= change
    spoilt = tmp_path_factory.mktemp("part")
    (spoilt / "journal.jsonl").write_bytes(content)
    before, after = (Records(folder, conditions_of(identity), digest(identity)) for folder in (part, spoilt))
    assert after.name == before.name
    lost = [(condition, key) for condition in before.samples for key in before.samples[condition].keys()
            - after.samples[condition].keys()]  # fmt: skip
    assert len(lost) <= 1
    assert before.cases == after.cases
    assert any(before.cases.values())


# ---- killed


def run_in_a_copy(model: Path, output: Path, *more: str) -> Any:
    """In a copy of this process, which has nnU-Net in memory already."""
    child = multiprocessing.get_context("fork").Process(target=evaluate, args=(model, output, *more))
    child.start()
    return child


def killed_again_and_again(model: Path, output: Path, kills: int, longest: float, wanted: list[bytes]) -> None:
    """Until so many kills hit it at work; a run that ended in between must have the same tables, and is begun anew."""
    moments, done = random.Random(0), 0
    while done < kills:
        child = run_in_a_copy(model, output)
        time.sleep(moments.uniform(0.02, longest))
        if child.is_alive():
            child.kill()  # SIGKILL
            done += 1
            child.join()
        else:
            child.join()
            assert tables(output) == wanted
            shutil.rmtree(output)


@pytest.mark.parametrize("kills", [5, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_tables(std_2d, in_peace, tmp_path, kills):
    started = time.monotonic()
    run_in_a_copy(std_2d, tmp_path / "timed").join()
    took = time.monotonic() - started
    output = tmp_path / "run"
    killed_again_and_again(std_2d, output, kills, took / 3, tables(in_peace))
    evaluate(std_2d, output)
    assert tables(output) == tables(in_peace)
    assert (output / "table.md").read_text() == (in_peace / "table.md").read_text()
    assert not list(output.rglob("*.tmp"))
    assert not list(output.rglob("tiles"))


@pytest.mark.parametrize("name", ["run.json", "samples.csv", "worst_samples.png"])
def test_what_a_kill_left_half_written_beside_the_tables_goes(std_2d, in_peace, tmp_path, name):
    output = tmp_path / "run"
    if name != "run.json":
        shutil.copytree(in_peace, output)

    def killed_while_writing() -> None:
        for module, function in ((Path, "replace"), (os, "link")):
            move = getattr(module, function)

            def move_or_die(here: Any, there: Any, move: Any = move) -> Any:
                if Path(there) == output / name:
                    os.kill(os.getpid(), signal.SIGKILL)
                return move(here, there)

            setattr(module, function, move_or_die)
        evaluate(std_2d, output)

    child = multiprocessing.get_context("fork").Process(target=killed_while_writing)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(output.glob(f".{name}.*.tmp"))) == 1
    evaluate(std_2d, output)
    assert not list(output.rglob("*.tmp"))
    assert tables(output) == tables(in_peace)


def test_merges_of_one_folder_wait_for_each_other(in_peace, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    seen: list[Path] = []

    def another_has_to_wait(folder: Path) -> None:
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(folder / "records" / "merge.lock").acquire(timeout=0)
        seen.append(folder)

    monkeypatch.setattr("nnunet_ima.evaluation.merge.remove_leftovers", another_has_to_wait)
    merge(output)
    assert seen == [output]


def test_a_merge_does_not_wait_for_ever_for_another_one(in_peace, tmp_path, monkeypatch, capsys):
    """Where there are no locks of the file system, that of a killed process stays."""
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    lock = output / "records" / "merge.lock"
    monkeypatch.setattr("nnunet_ima.evaluation.merge.PATIENCE", 0.2)
    with alone(lock, "never"):
        answer = sentence(capsys, "--merge", "-o", str(output))
    assert f"writing the tables of {output}" in answer
    assert answer.endswith(f"remove {lock}.")
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(output)]) == 0


def test_what_is_done_is_not_attacked_again(std_2d, in_peace, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    for name in (*TABLES, "summary.json", "table.md", "worst_samples.png"):
        (output / name).unlink()
    monkeypatch.setattr("nnunet_ima.attacks.attack.Attack.__call__", None)
    evaluate(std_2d, output)
    assert tables(output) == tables(in_peace)
    assert (output / "worst_samples.png").read_bytes() == (in_peace / "worst_samples.png").read_bytes()


def stop_on_the_way(model: Path, output: Path) -> None:
    """Once 30 samples are noted."""
    stop_after = {"samples": 30}
    add = Records.add_samples

    def stopping(self: Records, condition: Any, scores: Sequence[Any]) -> None:
        add(self, condition, scores)
        stop_after["samples"] -= len(scores)
        if stop_after["samples"] <= 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add_samples", stopping)
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        evaluate(model, output, status=130)


@pytest.fixture(scope="module")
def stopped(std_2d, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_on_the_way(std_2d, folder)
    return folder


def evaluate_and_count(model: Path, output: Path) -> int:
    """How many samples are attacked, those without an attack included."""
    attack, attacked = Runner.attack, 0

    def counting(self: Runner, choice: Any, condition: Any, batch: Sequence[Any], *more: Any) -> Any:
        nonlocal attacked
        attacked += len(batch)
        return attack(self, choice, condition, batch, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "attack", counting)
        evaluate(model, output)
    return attacked


def assert_same(output: Path, in_peace: Path) -> None:
    assert tables(output) == tables(in_peace)
    assert (output / "worst_samples.png").read_bytes() == (in_peace / "worst_samples.png").read_bytes()
    for file, key in (("run.json", "identity"), ("summary.json", "results")):
        assert read(output / file)[key] == read(in_peace / file)[key]


def damage(file: Path, kind: str, where: float) -> None:
    """Flip a bit at a place, given as a share of the file, or cut the file off there."""
    content = bytearray(file.read_bytes())
    place = min(int(where * len(content)), len(content) - 1)
    if kind == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << (place % 8)
    file.write_bytes(content)


def damaged_and_run_again(model: Path, original: Path, output: Path, name: str, kind: str, where: float) -> int:
    """Of a copy of a run; how many samples were attacked then."""
    shutil.copytree(original, output)
    damage(output / name, kind, where)
    return evaluate_and_count(model, output)


def files_of(run: Path) -> list[str]:
    """Those that hold something."""
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.stat().st_size]
    return [str(file.relative_to(run)) for file in files]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.booleans(), st.sampled_from(["flip", "cut"]), st.integers(0, 10**6), st.floats(0, 1))
def test_whichever_byte_of_whichever_file_is_damaged_the_same_command_repairs_it(
    std_2d, in_peace, stopped, tmp_path_factory, finished, kind, which, where
):
    original = in_peace if finished else stopped
    names = files_of(original)
    output = tmp_path_factory.mktemp("damaged") / "run"
    # As often one of the few large or important files as one of the many small ones.
    kinds = sorted({Path(name).suffix for name in names})
    mine = [name for name in names if Path(name).suffix == kinds[which % len(kinds)]]
    again = damaged_and_run_again(std_2d, original, output, mine[which // len(kinds) % len(mine)], kind, where)
    assert_same(output, in_peace)
    if kind == "flip":
        (part,) = part_folders(original)
        records = [record for record in Journal(part / "journal.jsonl").read() if record["kind"] == "sample"]
        noted = {(record["condition"], record["case"], record["tile"]) for record in records}
        everything = len((in_peace / "samples.csv").read_text().splitlines()) - 1
        assert again <= everything - len(noted) + 1
    shutil.rmtree(output)


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("name", ["journal.jsonl", "run.json", ".npz", "summary.json", "samples.csv"])
def test_a_damaged_file_of_a_finished_run_is_repaired(std_2d, in_peace, tmp_path, name, kind):
    """In the first line of the journal stands whose it is."""
    (found, *_) = [file for file in files_of(in_peace) if file.endswith(name)]
    again = damaged_and_run_again(std_2d, in_peace, tmp_path / "run", found, kind, 0.0 if name == "run.json" else 1e-4)
    assert_same(tmp_path / "run", in_peace)
    everything = len((in_peace / "samples.csv").read_text().splitlines()) - 1
    assert again == {"journal.jsonl": 0 if kind == "flip" else everything, ".npz": 1}.get(name, 0)


@pytest.mark.parametrize("lost", ["last bytes", "a tile", "middle"])
def test_a_damaged_file_costs_what_stood_in_it_and_no_more(std_2d, in_peace, stopped, tmp_path, lost):
    """Stop it on the way, spoil what it left, and count what is attacked again."""
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    (part,) = part_folders(output)
    before = list(Journal(part / "journal.jsonl").read())
    noted = sum(record["kind"] == "sample" for record in before)
    assert noted >= 30
    if lost == "a tile":
        tiles = sorted(part.glob("tiles/*/*/*.npy"))
        tiles[0].write_bytes(tiles[0].read_bytes()[:-5])
    else:
        content = (part / "journal.jsonl").read_bytes()
        content = content[:-5] if lost == "last bytes" else content[:3000] + b"?" + content[3001:]
        (part / "journal.jsonl").write_bytes(content)
    evaluate(std_2d, output)
    assert tables(output) == tables(in_peace)
    after = [record for record in Journal(part / "journal.jsonl").read() if record["kind"] == "sample"]
    everything = len((in_peace / "samples.csv").read_text().splitlines()) - 1
    assert len(after) <= everything + (lost == "a tile")


def test_a_full_disk_costs_no_more_than_what_was_in_flight(std_2d, in_peace, tmp_path, monkeypatch, capsys):
    output, write_to, left = tmp_path / "run", os.write, {"bytes": 9000}

    def full(stream: int, content: bytes) -> int:
        allowed = content[: left["bytes"]]
        left["bytes"] -= len(allowed)
        if not allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_to(stream, allowed)

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ima.evaluation.journal.os.write", full)
        assert "disk is full" in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY)
    (part,) = part_folders(output)
    assert len(list(Journal(part / "journal.jsonl").read())) > 10
    evaluate(std_2d, output)
    assert tables(output) == tables(in_peace)


def test_two_processes_on_one_part_are_one_too_many(std_2d, in_peace, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    (part,) = part_folders(output)
    with Records(part, [], digest(read(output / "run.json")["identity"])).writing():
        assert "Another process is at work" in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY)


# ---- parts


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_any_number_of_parts_gives_the_same_tables(std_2d, in_peace, tmp_path, num_parts):
    output = tmp_path / "run"
    for part in reversed(range(num_parts)):
        evaluate(std_2d, output, "-num_parts", str(num_parts), "-part_id", str(part))
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(output)]) == 0
    assert tables(output) == tables(in_peace)


def test_parts_run_in_folders_of_their_own_are_joined(std_2d, in_peace, tmp_path):
    folders = [tmp_path / f"machine_{part}" for part in range(2)]
    for part, folder in enumerate(folders):
        evaluate(std_2d, folder, "-num_parts", "2", "-part_id", str(part))
    for _ in range(2):  # again: nothing is there twice
        with quiet():
            assert main(["evaluate", "--merge", *map(str, folders), "-o", str(tmp_path / "joined")]) == 0
    assert tables(tmp_path / "joined") == tables(in_peace)
    assert (tmp_path / "joined/worst_samples.png").read_bytes() == (in_peace / "worst_samples.png").read_bytes()


def test_several_folders_are_joined_only_where_they_are_told_to_go(std_2d, in_peace, tmp_path, capsys):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        shutil.copytree(in_peace, folder)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert "with -o" in sentence(capsys, "--merge", *map(str, folders))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    (folders[0] / "samples.csv").unlink()
    with quiet():
        assert main(["evaluate", "--merge", str(folders[0])]) == 0
    assert tables(folders[0]) == tables(in_peace)


@pytest.mark.parametrize("when", ["reading cases", "attacking", "at the same part"])
def test_what_a_refused_process_removes_is_its_own(std_2d, in_peace, tmp_path, capsys, when):
    """Another one begins a part between its start and its end, and has noted no sample yet."""
    output, context = tmp_path / "run", multiprocessing.get_context("fork")
    begun, to_go_on = context.Event(), context.Event()
    plan, select, attack = Records.plan, run_module.select_samples, Runner.attack
    mine, other = (("-num_parts", "2", "-part_id", part) for part in ("0" if when == "at the same part" else "1", "0"))

    def wait_after_planning(*arguments: Any) -> None:
        plan(*arguments)
        begun.set()
        assert to_go_on.wait(60)

    def run_other() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Records, "plan", wait_after_planning)
            patch.setattr(run_module, "select_samples", select)
            patch.setattr(Runner, "attack", attack)
            evaluate(std_2d, output, *other)

    child = context.Process(target=run_other)

    def meanwhile(*arguments: Any) -> Any:
        child.start()
        assert begun.wait(60)
        if when == "at the same part":
            return select(*arguments)
        raise UserError("The case cannot be read; preprocess again.")

    with pytest.MonkeyPatch.context() as patch:
        if when == "attacking":
            patch.setattr(Runner, "attack", meanwhile)
        else:
            patch.setattr(run_module, "select_samples", meanwhile)
        answer = sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY, *mine)
    assert ("at work" if when == "at the same part" else "cannot be read") in answer
    assert [folder.name for folder in part_folders(output)] == ["part_0_of_2"]
    to_go_on.set()
    child.join()
    assert child.exitcode == 0
    evaluate(std_2d, output, "-num_parts", "2", "-part_id", "1")
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(output)]) == 0
    assert tables(output) == tables(in_peace)


def test_what_is_missing_is_named(std_2d, tmp_path, capsys):
    output = tmp_path / "run"
    evaluate(std_2d, output, "-num_parts", "2", "-part_id", "1")
    assert "no part that was begun attacks" in sentence(capsys, "--merge", "-o", str(output))
    (part,) = part_folders(output)
    content = (part / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert "holds no run" in sentence(capsys, "--merge", "-o", str(tmp_path / "nothing"))
    evaluate(std_2d, output, "-num_parts", "2", "-part_id", "0")
    (part / "journal.jsonl").write_bytes(b"".join(content[:20]))
    assert "start that part again" in sentence(capsys, "--merge", "-o", str(output))
    assert not (output / "summary.json").exists()
    for wrong in ("2", "-1"):
        assert "-part_id" in sentence(
            capsys, "-m", str(std_2d), "-o", str(output), *WAY, "-num_parts", "2", "-part_id", wrong
        )


def stopped_in_its_checks(model: Path, output: Path, *part: str) -> None:
    """The last thing that a part does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "check_network", interrupt)
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        evaluate(model, output, *part, status=130)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("apart", [False, True])
def test_a_part_that_was_stopped_in_its_checks_is_not_merged(std_2d, in_peace, tmp_path, capsys, apart):
    """All its samples are there, and another part has checked the network with its own."""
    one, other = (tmp_path / (name if apart else "run") for name in ("one", "other"))
    merging = ("--merge", *([str(one), str(other)] if apart else []), "-o", str(tmp_path / "run"))
    evaluate(std_2d, one, "-num_parts", "2", "-part_id", "0")
    stopped_in_its_checks(std_2d, other, "-num_parts", "2", "-part_id", "1")
    answer = sentence(capsys, *merging)
    assert "part_1_of_2" in answer
    assert "checks of the network are missing; start that part again (-num_parts 2 -part_id 1)" in answer
    assert not (tmp_path / "run" / "summary.json").exists()
    evaluate(std_2d, other, "-num_parts", "2", "-part_id", "1")
    with quiet():
        assert main(["evaluate", *merging]) == 0
    assert tables(tmp_path / "run") == tables(in_peace)


def test_a_copy_of_a_part_from_before_its_checks_is_merged_beside_the_whole_one(std_2d, in_peace, tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    stopped_in_its_checks(std_2d, early)
    shutil.copytree(early, late)
    evaluate(std_2d, late)
    joined = tmp_path / "joined"
    (joined / "records").mkdir(parents=True)
    shutil.copyfile(late / "run.json", joined / "run.json")
    for number, folder in enumerate((early, late)):
        shutil.copytree(*part_folders(folder), joined / "records" / f"part_0_of_1_{number}")
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(joined)]) == 0
    assert tables(joined) == tables(in_peace)
    assert read(joined / "summary.json")["trust"] == read(in_peace / "summary.json")["trust"]


# ---- ensembles


def evaluate_ensemble(model: Path, output: Path, *more: str, status: int = 0) -> None:
    way = ("--attacks", "autoattack:version=fast", "--levels", "5", "--max-samples", "10", "--no-cases")
    evaluate(model, output, *way, *more, status=status)


def test_stopped_in_parts_and_in_other_batches_an_ensemble_chooses_the_same_points(std_2d, tmp_path, monkeypatch):
    """The choice is made of all samples together, when the tables are written."""
    one, other = tmp_path / "one", tmp_path / "other"
    evaluate_ensemble(std_2d, one, "--batch-size", "64")
    add, calls = Records.add_samples, {"left": 3}

    def stopping(self: Records, condition: Any, scores: Sequence[Any]) -> None:
        add(self, condition, scores)
        calls["left"] -= 1
        if not calls["left"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add_samples", stopping)
        evaluate_ensemble(std_2d, other, "--batch-size", "2", "-num_parts", "2", "-part_id", "1", status=130)
    for part in ("1", "0"):
        evaluate_ensemble(std_2d, other, "--batch-size", "2", "-num_parts", "2", "-part_id", part)
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(other)]) == 0
    for name in ("samples.csv", "members.csv", "table.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert read(one / "summary.json")["results"] == read(other / "summary.json")["results"]


# ---- only the same run is continued


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--seed", "1"), "seed: 0 there, 1 here"),
        (("--samples-seed", "1"), "samples seed, if not the attacks': None there, 1 here"),
        (("--protocol", "paper"), "protocol: sound there, paper here"),
        (("--norm", "linf", "--levels", "1/255"), "norm: l2 there, linf here"),
        (("--levels", "2"), "levels: 2 8 there, 2 here"),
        (("--attacks", "apgd:steps=4"), "attacks: "),
        (("--no-cases",), "case level: True there, False here"),
        (("--max-samples", "3"), "max samples: 24 there, 3 here"),
    ],
)
def test_another_request_is_refused_and_the_difference_named(std_2d, in_peace, tmp_path, capsys, changed, named):
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert named in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY, *changed)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_another_model_or_changed_plans_or_another_version_are_refused(std_2d, in_peace, tmp_path, capsys, monkeypatch):
    output, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(in_peace, output)
    shutil.copytree(std_2d, model)
    checkpoint = torch.load(model / "fold_0/checkpoint_final.pth", weights_only=False)
    checkpoint["network_weights"] = {key: value * 1.01 for key, value in checkpoint["network_weights"].items()}
    torch.save(checkpoint, model / "fold_0/checkpoint_final.pth")
    assert "model sha256: " in sentence(capsys, "-m", str(model), "-o", str(output), *WAY)
    shutil.copyfile(std_2d / "fold_0/checkpoint_final.pth", model / "fold_0/checkpoint_final.pth")
    plans = read(model / "plans.json")
    plans["configurations"]["2d_tiny"]["spacing"] = [1.5, 1.0]
    write(model / "plans.json", plans)
    assert "model plans.json: " in sentence(capsys, "-m", str(model), "-o", str(output), *WAY)
    monkeypatch.setattr("nnunet_ima.evaluation.description.versions", lambda: {"torch": "0.4"})
    assert "version of torch: " in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY)


def test_a_run_of_other_sources_of_this_package_is_neither_continued_nor_merged(
    std_2d, in_peace, tmp_path, capsys, monkeypatch
):
    """Its version stays the same through many commits. Of a run that has no such digest nobody knows."""
    other = tmp_path / "other"
    named = "version of nnunet_ima's sources: {} there, {} here".format
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ima.evaluation.environment.SOURCES", "0123456789abcdef")
        assert named(SOURCES, "0123456789abcdef") in sentence(capsys, "-m", str(std_2d), "-o", str(in_peace), *WAY)
        evaluate(std_2d, other)
    answer = sentence(capsys, "--merge", str(in_peace), str(other), "-o", str(tmp_path / "joined"))
    assert named(SOURCES, "0123456789abcdef") in answer
    # What is finished is still reported, beside runs of other sources.
    assert main(["report", str(in_peace), str(other), "--names", "A", "B", "-o", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert SOURCES in page
    assert "0123456789abcdef" in page
    run = read(other / "run.json")
    del run["identity"]["version of"]["nnunet_ima's sources"]
    write(other / "run.json", sealed(run))
    assert named(None, SOURCES) in sentence(capsys, "-m", str(std_2d), "-o", str(other), *WAY)


def test_runs_of_different_models_are_not_merged(std_2d, in_peace, tmp_path, capsys):
    other = tmp_path / "other"
    evaluate(std_2d, other, "--seed", "1", "-num_parts", "1")
    answer = sentence(capsys, "--merge", str(in_peace), str(other), "-o", str(tmp_path / "joined"))
    assert "seed: 0 there, 1 here" in answer
    assert not (tmp_path / "joined").exists()


def test_parts_that_saw_other_data_of_a_case_are_not_merged(tmp_path, capsys):
    """Both are whole, and of the same run, but for what was preprocessed."""
    folders = [make_run(tmp_path / name, jitter=jitter, cases=3) for jitter, name in enumerate(("one", "other"))]
    joined = tmp_path / "joined"
    for number, folder in enumerate(folders):
        identity = read(folder / "run.json")["identity"]
        (part,) = part_folders(folder)
        records = Records(part, conditions_of(identity), digest(identity))
        with records.writing():
            records.plan(records.planned, sorted(records.complete_cases), {"case_000": 7, "case_001": 8 + number})
    answer = sentence(capsys, "--merge", *map(str, folders), "-o", str(joined))
    assert "case_001" in answer
    assert all(part.name in answer for part in part_folders(joined))
    assert not (joined / "summary.json").exists()
    with pytest.MonkeyPatch.context() as patch, quiet():
        for name in ("worst", "dice_against_level"):
            patch.setattr(f"nnunet_ima.evaluation.merge.draw_{name}", lambda *_: None)
        # As the sentence advises.
        shutil.rmtree(part_folders(joined)[1])
        assert main(["evaluate", "--merge", "-o", str(joined)]) == 0


def test_results_of_a_version_without_records_are_not_overwritten(std_2d, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "another version" in sentence(capsys, "-m", str(std_2d), "-o", str(tmp_path / "run"), *WAY)
    assert (tmp_path / "run" / "summary.json").read_text() == "{}"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": "nnunet_ima/run/99"}', "{", '{"schema": "nnunet_ima/run/2"}', None]
)
def test_a_run_file_that_is_lost_is_named_and_the_same_command_writes_it_anew(
    std_2d, in_peace, tmp_path, capsys, content
):  # fmt: skip
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    if content is None:
        (output / "run.json").unlink()
    else:
        (output / "run.json").write_text(content)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    answer = sentence(capsys, "--merge", "-o", str(output))
    assert "run.json" in answer
    assert "give the command again that began" in answer
    assert "run.json" in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY, "--seed", "1")
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    assert main(["evaluate", "-m", str(std_2d), "-o", str(output), *WAY]) == 0
    assert f"run.json was {'missing' if content is None else 'damaged'}" in capsys.readouterr().out
    assert_same(output, in_peace)


def test_any_part_writes_the_run_file_anew_for_all(std_2d, in_peace, tmp_path, capsys):
    output = tmp_path / "run"
    for part in ("0", "1"):
        evaluate(std_2d, output, "-num_parts", "2", "-part_id", part)
    damage(output / "run.json", "cut", 0.5)
    assert "run.json is damaged" in sentence(capsys, "--merge", "-o", str(output))
    evaluate(std_2d, output, "-num_parts", "2", "-part_id", "1")
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(output)]) == 0
    assert_same(output, in_peace)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_differences_are_found_exactly_where_there_are_some(one, other):
    assert differences(one, json.loads(json.dumps(one))) == []

    def plain(value: Any) -> Any:  # an entry that is missing counts as None
        return (
            {key: plain(v) for key, v in value.items() if plain(v) not in (None, {})}
            if isinstance(value, dict)
            else value
        )

    if plain(one) != plain(other) and not (plain(one) in (None, {}) and plain(other) in (None, {})):
        assert differences(one, other)


def test_records_without_their_run_are_not_taken_for_another(std_2d, in_peace, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    run_file = (output / "run.json").read_bytes()
    for name in ("run.json", "summary.json"):
        (output / name).unlink()
    assert "without their run.json" in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY, "--seed", "1")
    other = tmp_path / "other"
    evaluate(std_2d, other, "--seed", "1", "-num_parts", "2", "-part_id", "0")
    shutil.copyfile(other / "run.json", output / "run.json")
    assert "records of another run" in sentence(capsys, "--merge", "-o", str(output))
    (output / "run.json").write_bytes(run_file)
    evaluate(std_2d, output)


def test_data_that_changed_on_the_way_are_noticed(project, std_2d, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "preprocessed" / project.dataset
    shutil.copytree(project.preprocessed, folder)
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    output = tmp_path / "run"
    evaluate(std_2d, output)
    load = ValidationCases._load

    def other(self: ValidationCases, name: str) -> Any:
        case = load(self, name)
        self.fingerprints[name] += 1
        return case

    monkeypatch.setattr(ValidationCases, "_load", other)
    assert "has changed since" in sentence(capsys, "-m", str(std_2d), "-o", str(output), *WAY)


def test_no_damage_to_a_file_is_taken_for_its_content(in_peace, tmp_path):
    (part,) = part_folders(in_peace)
    original = next(part.glob("examples/*/*.npz")).read_bytes()
    draws = random.Random(0)
    for _ in range(300):
        content = bytearray(original)
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        (tmp_path / "file").write_bytes(content)
        assert load_example(tmp_path / "file", "case", 0) is None
    for cut in (0, 1, 4, 5, len(original) - 1):
        (tmp_path / "file").write_bytes(original[:cut])
        assert load_example(tmp_path / "file", "case", 0) is None
    (tmp_path / "file").write_bytes(original)
    assert load_example(tmp_path / "file", "case", 0) is not None


# ---- the bar


class Bar(Progress):
    """Remembers where it was."""

    all: list[Bar] = []  # noqa: RUF012 (of the class on purpose)

    def __init__(self, work: int, done: int, shown: bool) -> None:
        self.work, self.places, self.counts = work, [done], [0]
        if shown:
            Bar.all.append(self)
        super().__init__(work, done, shown)

    @contextmanager
    def doing(self, count: int, passes: int, weight: int = 1) -> Iterator[Watch]:
        self.counts.append(count)
        with super().doing(count, passes, weight) as watch:
            yield watch

    def _go_to(self, passes: int) -> None:
        super()._go_to(passes)
        self.places.append(passes)
        assert self._bar.n == passes


@pytest.fixture
def bars(monkeypatch) -> list[Bar]:
    monkeypatch.setattr(run_module, "Progress", Bar)
    monkeypatch.setattr(Bar, "all", [])
    return Bar.all


@pytest.mark.parametrize("end_to_end", [(), ("--end-to-end",), ("--end-to-end-mirroring",)])
def test_the_bar_moves_with_the_passes_and_ends_at_its_total(std_2d, tmp_path, bars, end_to_end):
    evaluate(std_2d, tmp_path / "run", "--batch-size", "64", "--max-samples", "20", *end_to_end)
    (bar,) = bars
    assert bar.places == sorted(bar.places)
    assert bar.places[0] == 0
    assert bar.places[-1] == bar.work
    # Within a batch as well: there is one for each of five conditions.
    assert len(set(bar.places)) > 3 * 5


def test_a_run_that_goes_on_begins_its_bar_where_it_was_stopped(std_2d, stopped, tmp_path, bars):
    shutil.copytree(stopped, tmp_path / "run")
    evaluate(std_2d, tmp_path / "run")
    evaluate(std_2d, tmp_path / "run")
    again, done = bars
    assert 0 < again.places[0] < again.work == again.places[-1]
    assert again.places == sorted(again.places)
    assert done.places[0] == done.work == again.work


def test_a_batch_that_fails_for_want_of_memory_does_not_count(std_2d, tmp_path, bars, monkeypatch):
    attack = Runner.attack

    def hungry(self: Runner, choice: Any, condition: Any, batch: Sequence[Any], watch: Watch) -> Any:
        found = list(attack(self, choice, condition, batch, watch))
        if choice and len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Runner, "attack", hungry)
    evaluate(std_2d, tmp_path / "run", "--max-samples", "8")
    (bar,) = bars
    assert bar.places != sorted(bar.places)
    assert max(bar.places) == bar.places[-1] == bar.work


@pytest.mark.parametrize(
    ("device", "planned", "patch", "chunk", "batch"),
    [
        ("cpu", 366, (56, 40), 8, 32),  # hippocampus
        ("cpu", 5, (56, 40), 5, 20),
        ("cpu", 49, (128, 128), 4, 16),
        ("cpu", 30, (320, 256), 1, 1),  # heart
        ("cpu", 9, (40, 56, 40), 1, 1),
        ("mps", 366, (56, 40), 16, 64),
        ("cuda", 366, (56, 40), 128, 128),
        ("cuda", 192, (56, 40), 96, 96),
        ("cuda", 96, (128, 128), 48, 48),
        ("cuda", 30, (320, 256), 15, 60),
    ],
)
def test_samples_in_flight_are_as_few_as_cost_little(device, planned, patch, chunk, batch):
    model = cast(TrainedModel, SimpleNamespace(configuration=SimpleNamespace(patch_size=patch, batch_size=planned)))
    assert samples_in_a_pass(model, torch.device(device)) == chunk
    assert default_batch_size(model, torch.device(device)) == batch


@given(st.integers(1, 1000))
def test_by_default_a_gpu_attacks_whole_passes_and_no_more_than_it_must(chunk):
    samples = whole_passes(chunk)
    assert samples % chunk == 0
    assert samples <= max(BATCH_SIZE, chunk) < samples + chunk


def test_that_many_are_attacked_at_once(std_2d, tmp_path, bars):
    way = [word for word in WAY if word not in ("--batch-size", "4")]
    model = load_model(std_2d, 0, "checkpoint_final.pth", torch.device("cpu"))
    with quiet():
        assert main(["evaluate", "-m", str(std_2d), "-o", str(tmp_path / "run"), *way, "--max-samples", "40"]) == 0
    (bar,) = bars
    assert max(bar.counts) == default_batch_size(model, torch.device("cpu")) == 32


def test_it_is_said_how_long_the_samples_of_this_call_took(std_2d, tmp_path, capsys, monkeypatch):
    """Of the second call the half that the first one left; of the clean pass nothing."""
    clock = iter(range(0, 9000, 100))
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    inner, batches = Runner.attack, []

    def stopping(self: Runner, choice: Any, condition: Any, batch: Any, watch: Any = None) -> Any:
        batches.append(condition)
        if choice and len(batches) == 4:
            raise KeyboardInterrupt
        return inner(self, choice, condition, batch, watch)

    monkeypatch.setattr(Runner, "attack", stopping)
    way = ["evaluate", "-m", str(std_2d), "-o", str(tmp_path / "run"), "--levels", "2", "--attacks", "apgd:steps=1"]
    way += ["--max-samples", "8", "--batch-size", "4", "--no-cases", "-device", "cpu"]
    assert main(way) == 130
    capsys.readouterr()
    assert main(way) == 0
    written = capsys.readouterr()
    (sentence,) = [line for line in (written.out + written.err).splitlines() if "samples attacked" in line]
    assert sentence.endswith(": 4 samples attacked, scored and noted in 100.0 s.")
    assert "apgd:steps=1" in sentence


# ---- too little memory


def test_out_of_memory_halves_the_batch_and_says_so(std_2d, in_peace, tmp_path, monkeypatch, capsys):
    sizes = make_memory_little(monkeypatch, 2)
    output = tmp_path / "run"
    assert main(["evaluate", "-m", str(std_2d), "-o", str(output), *WAY]) == 0
    written = capsys.readouterr()
    assert "The memory was not enough" in written.out + written.err
    assert max(sizes) == 8
    assert sizes.count(8) == 1  # not tried again
    summary = read(output / "summary.json")
    assert summary["samples_in_a_pass_reduced_to"] == 2
    assert "The memory was not enough; some passes held 2 samples" in (output / "table.md").read_text()
    there = [float(line.split(",")[4]) for line in (output / "samples.csv").read_text().splitlines()[1:]]
    wanted = [float(line.split(",")[4]) for line in (in_peace / "samples.csv").read_text().splitlines()[1:]]
    # Rounding may decide about a voxel here and there.
    assert np.abs(np.array(there) - wanted).mean() < 0.02


def test_a_memory_too_small_for_one_sample_ends_with_a_sentence(std_2d, tmp_path, monkeypatch, capsys):
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nnunet_ima.evaluation.run.load_batch", refuse)
    assert "memory is not enough" in sentence(capsys, "-m", str(std_2d), "-o", str(tmp_path / "run"), *WAY)


def test_other_errors_are_not_taken_for_it(std_2d, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("nnunet_ima.evaluation.run.load_batch", refuse)
    with pytest.raises(RuntimeError, match="something else"), quiet():
        main(["evaluate", "-m", str(std_2d), "-o", str(tmp_path / "run"), *WAY])
