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

from nnunet_ima.step_memory import StepMemory, name_of_gpu
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT

GIB = 2**30
CUDA = torch.device("cuda")
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
        again.run_training()
    assert again._graphs is not None
    assert again._graphs.refused is None
