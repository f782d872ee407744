"""When a training takes up CUDA graphs: once it is known that there is room for them; if resumed, at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunet_project import make_trainer, quiet
from test_trainers import started

from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.step_memory import StepMemory, name_of_gpu
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT

GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
sizes = st.integers(0, 2**40)


class Gpu:
    """In place of one: memory that others leave free, that this process reserved, and the most that it ever did."""

    name, total_memory = "Some GPU", 80 * GIB
    free, reserved, most = 70 * GIB, 10 * GIB, 10 * GIB


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Gpu]:
    found = Gpu()
    for name, answer in (
        ("get_device_properties", lambda _: found),
        ("mem_get_info", lambda _: (found.free, found.total_memory)),
        ("memory_reserved", lambda _: found.reserved),
        ("max_memory_reserved", lambda _: found.most),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    return found


def begin_epoch(trainer: Any) -> bool:
    """Whether its attack passes are graphs."""
    with patch.object(trainer, "device", CUDA), quiet():
        trainer._keep_graphs()
    return trainer._graphs is not None


def end_epoch(trainer: Any) -> None:
    with patch.object(trainer, "device", CUDA):
        trainer.note_memory()


def continued(project: Any, checkpoint: Any) -> Any:
    trainer = make_trainer(project, nnUNetTrainerSAT, resume=True, num_epochs=9, robust_every=0)
    with quiet():
        trainer.load_checkpoint(str(checkpoint))
        trainer.on_train_start()
    return trainer


@pytest.fixture
def one_epoch(project, results, start) -> Any:
    return started(project, nnUNetTrainerSAT, "2d_tiny", start, robust_every=0)


def test_graphs_begin_after_an_epoch_and_in_a_resumed_training_at_once(project, results, one_epoch, gpu):
    assert not begin_epoch(one_epoch)
    gpu.most = 30 * GIB
    end_epoch(one_epoch)
    with quiet():
        one_epoch.save_checkpoint(str(results / "stopped.pth"))
    assert begin_epoch(one_epoch)
    gpu.most = gpu.reserved = GIB // 2
    assert begin_epoch(continued(project, results / "stopped.pth"))
    # 60 GiB are what it may take; so much is not there now, or it is another GPU, of which nothing is known.
    gpu.free = 59 * GIB
    assert not begin_epoch(continued(project, results / "stopped.pth"))
    gpu.free, gpu.total_memory = 120 * GIB, 160 * GIB
    other = continued(project, results / "stopped.pth")
    assert not begin_epoch(other)
    end_epoch(other)
    assert other._memory == StepMemory(name_of_gpu(CUDA), GIB // 2, GIB // 2)
    assert begin_epoch(other)


def test_without_room_there_are_none_and_it_is_said_once(one_epoch, gpu, monkeypatch):
    told: list[str] = []
    gpu.most, gpu.reserved, gpu.free = 41 * GIB, 41 * GIB, 39 * GIB
    end_epoch(one_epoch)
    monkeypatch.setattr(one_epoch, "print_to_log_file", told.append)
    assert not begin_epoch(one_epoch)
    assert not begin_epoch(one_epoch)
    (sentence,) = told
    assert "82.0 GiB" in sentence
    assert "80.0 GiB" in sentence


def test_a_training_on_a_cpu_notes_nothing(results, one_epoch):
    one_epoch.note_memory()
    with quiet():
        one_epoch.save_checkpoint(str(results / "cpu.pth"))
    content = torch.load(results / "cpu.pth", weights_only=False)["init_args"]["nnunet_ima"]
    assert "memory" not in content


def step_that_fails(trainer: Any, monkeypatch: Any, errors: list[Exception]) -> list[bool]:
    """Its next steps meet these errors, after the method's loss; returns whether each try had graphs."""
    tried: list[bool] = []
    step = trainer.adversarial_step

    def adversarial_step(batch: Any) -> Any:
        tried.append(trainer._graphs is not None)
        found = step(batch)
        if errors:
            raise errors.pop(0)
        return found

    monkeypatch.setattr(trainer, "adversarial_step", adversarial_step)
    return tried


class NoGraphs(CudaGraphs):
    """Answers at once."""

    def ask(self, _: Any, question: Any, __: Any, inputs: Any) -> Any:
        return question(*inputs)


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_step_that_does_not_fit_beside_graphs_is_taken_without_them(project, results, one_epoch, gpu, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(one_epoch, "print_to_log_file", lambda *words, **_: told.append(" ".join(map(str, words))))
    end_epoch(one_epoch)
    one_epoch._graphs = NoGraphs(8)
    tried = step_that_fails(one_epoch, monkeypatch, [out_of_memory()])
    weights = {name: value.clone() for name, value in one_epoch.network.state_dict().items()}
    with quiet():
        found = one_epoch.train_step(next(one_epoch.dataloader_train))
        one_epoch.save_checkpoint(str(results / "stopped.pth"))
    assert tried == [True, False]
    assert found["counts"][0]["steps"] == 1
    assert any(not torch.equal(value, weights[name]) for name, value in one_epoch.network.state_dict().items())
    assert any("without them from now on" in words for words in told)
    # Not again in this training, nor when it goes on.
    gpu.free = 10_000 * GIB
    assert not begin_epoch(one_epoch)
    gpu.free = gpu.total_memory - gpu.reserved
    assert not begin_epoch(continued(project, results / "stopped.pth"))


@pytest.mark.parametrize(
    ("graphs", "errors", "tries"),
    [(False, [out_of_memory()], 1), (True, [RuntimeError("another one")], 1),
     (True, [out_of_memory(), out_of_memory()], 2)],
)  # fmt: skip
def test_what_graphs_are_not_to_blame_for_ends_the_training_as_before(
    one_epoch, gpu, monkeypatch, graphs, errors, tries
):
    if graphs:
        one_epoch._graphs = NoGraphs(8)
    last = str(errors[-1])
    tried = step_that_fails(one_epoch, monkeypatch, errors)
    with pytest.raises(RuntimeError) as ended, quiet():
        one_epoch.train_step(next(one_epoch.dataloader_train))
    assert str(ended.value) == last
    assert len(tried) == tries


def test_a_checkpoint_is_read_into_the_cpus_memory(project, results, one_epoch, monkeypatch):
    """With TE's averages in it, it may be more than the GPU's."""
    with quiet():
        one_epoch.save_checkpoint(str(results / "stopped.pth"))
    trainer = make_trainer(project, nnUNetTrainerSAT, resume=True, num_epochs=9, robust_every=0)
    load, places = torch.load, []

    def noted(*asked: Any, map_location: Any = None, **options: Any) -> Any:
        places.append(torch.device(map_location))
        return load(*asked, map_location=map_location, **options)

    monkeypatch.setattr(torch, "load", noted)
    with quiet():
        trainer.initialize()
        trainer.device = CUDA
        trainer.load_checkpoint(str(results / "stopped.pth"))
    assert places == [CPU]
    assert trainer.device == CUDA


def test_what_attacks_held_on_to_is_free_for_the_final_validation(one_epoch):
    with quiet():
        one_epoch.on_train_epoch_start()
        one_epoch.train_step(next(one_epoch.dataloader_train))
        one_epoch._graphs = NoGraphs(8)
        one_epoch.on_train_end()
    assert one_epoch._graphs is None


@given(sizes, st.lists(sizes))
def test_what_is_needed_is_never_less_than_what_was_taken(eager, later):
    memory = StepMemory("some", eager, eager)
    for reserved in later:
        memory = memory.after(reserved)
    assert memory.needed == max([2 * eager, *later])
    assert StepMemory.from_dict(memory.as_dict()) == memory


@needs_gpu
def test_a_resumed_training_on_a_gpu_replays_graphs_from_its_first_epoch(project, results, start):
    trainer = make_trainer(project, nnUNetTrainerSAT, device="cuda", num_epochs=1, robust_every=0)
    with quiet():
        trainer.initialize()
        trainer.run_training()
    assert trainer._graphs is None
    again = make_trainer(project, nnUNetTrainerSAT, resume=True, device="cuda", num_epochs=2, robust_every=0)
    with quiet():
        again.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
        again.on_train_start()
        again.on_train_epoch_start()
        again.train_step(next(again.dataloader_train))
    assert again._graphs is not None
    assert again._graphs.refused is None
