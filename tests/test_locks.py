"""One process at a time, also where the file system has no locks; who is refused learns which file holds him up."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.locks import alone

pytestmark = pytest.mark.filterwarnings("ignore:flock not supported")


def _missing(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=[True, False])
def flock(request, monkeypatch) -> bool:
    """Whether the file system has locks; on some clusters it has none."""
    if not request.param:
        monkeypatch.setattr(fcntl, "flock", _missing)
    return bool(request.param)


def test_a_lock_is_held_by_one_and_the_refusal_names_its_file(flock, tmp_path):
    lock = tmp_path / "new" / "lock"
    for _ in range(2):
        with alone(lock, "never"), pytest.raises(UserError) as refused, alone(lock, "It is taken; wait"):
            pytest.fail("held twice")
        assert str(refused.value) == f"It is taken; wait; if no such process is left on any machine, remove {lock}."
    # Where the system does not let go of it, the file must not stay.
    assert lock.exists() == flock


def test_without_locks_that_of_a_process_killed_elsewhere_stays_until_it_is_removed(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", _missing)
        lock.write_text("1\nanother-machine\n", encoding="utf-8")
        with pytest.raises(UserError, match="remove"), alone(lock, "It is taken", patience=0.1):
            pytest.fail("taken over")
        lock.unlink()
        with alone(lock, "never"):
            pass
    # With locks, what stands in the file does not matter.
    lock.write_text("1\nanother-machine\n", encoding="utf-8")
    with alone(lock, "never"):
        pass
