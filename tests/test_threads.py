"""OMP_NUM_THREADS counts for a training on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nnunet_ima.threads import use_threads_as_told


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("told", "expected"),
    [("1", 1), ("2", 2), ("2,1", 2), (" 2 ", 2), ("", 3), ("0", 3), ("-1", 3), ("two", 3), (None, 3)],
)
def test_the_first_number_counts_and_nonsense_does_not(monkeypatch, told, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    use_threads_as_told(torch.device("cpu"))
    assert torch.get_num_threads() == expected


def test_on_a_gpu_nnunets_number_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    use_threads_as_told(torch.device("cuda"))
    assert torch.get_num_threads() == 3
