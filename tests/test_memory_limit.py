"""How much memory a training may take: the machine's, or less if its job or container was given less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nnunet_ima import memory_limit as module
from nnunet_ima.memory_limit import memory_limit

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 1 << 20


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /proc/self/cgroup and /sys/fs/cgroup: ``self`` and ``groups``."""
    monkeypatch.setattr(module, "SELF", tmp_path / "self")
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "groups")
    return tmp_path


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_without_groups_it_is_the_machines(kernel):
    assert memory_limit() == MACHINE


def test_a_job_has_what_any_of_the_groups_above_it_leaves(kernel):
    """As Slurm sets it: on the job, not on the step that the process is in."""
    put(kernel / "self", "0::/system.slice/job_7/step_0/user\n")
    put(kernel / "groups/system.slice/job_7/step_0/user/memory.max", "max\n")
    put(kernel / "groups/system.slice/job_7/memory.max", f"{64 * MIB}\n")
    put(kernel / "groups/system.slice/memory.max", f"{640 * MIB}\n")
    assert memory_limit() == 64 * MIB


def test_a_container_sees_its_limit_at_the_top_whatever_its_path(kernel):
    put(kernel / "self", "0::/../../docker-1.scope\n")
    put(kernel / "groups/memory.max", f"{8 * MIB}\n")
    assert memory_limit() == 8 * MIB


def test_version_1_has_a_folder_for_memory_and_a_large_number_for_no_limit(kernel):
    put(kernel / "self", "11:cpu,cpuacct:/job\n4:hugetlb,memory:/slurm/job_3\n1:name=systemd:/x\n")
    put(kernel / "groups/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit() == MACHINE
    put(kernel / "groups/memory/slurm/job_3/memory.limit_in_bytes", f"{5 * MIB}\n")
    # Of another controller.
    put(kernel / "groups/cpu,cpuacct/job/memory.limit_in_bytes", "1\n")
    assert memory_limit() == 5 * MIB


@pytest.mark.parametrize("text", ["", "0", "0:", "0::", "\x00", "a:b:c:d\n0::/x"])
def test_what_nobody_understands_is_no_limit(kernel, text):
    put(kernel / "self", text)
    put(kernel / "groups/memory.max", "lots\n")
    assert memory_limit() == MACHINE


def test_of_this_process_it_is_no_more_than_the_machines():
    assert 0 < memory_limit() <= MACHINE
