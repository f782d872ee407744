"""How much memory a training may take: the machine's, or what its job or container was given of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SELF, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """Bytes: the machine's memory, or what a control group leaves of it (``#SBATCH --mem``, ``docker -m``)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits()])


def _limits() -> Iterator[int]:
    """Of the groups that this process is in, and of all that they are in; none where the kernel has no such groups."""
    for folder, name in _groups():
        for group in (folder, *folder.parents):
            try:
                text = (group / name).read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError):
                text = ""
            # Version 2 writes "max" where there is no limit, version 1 a number larger than any memory.
            if text.isdecimal():
                yield int(text)
            if group == CGROUPS:
                break


def _groups() -> Iterator[tuple[Path, str]]:
    """Folders and the names of their limits, cgroups(7); in a container both may also lie at the top."""
    try:
        lines = SELF.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        inside = path.lstrip("/")
        if not controllers:
            yield CGROUPS / inside, "memory.max"
        elif "memory" in controllers.split(","):
            yield CGROUPS / "memory" / inside, "memory.limit_in_bytes"
    yield CGROUPS, "memory.max"
    yield CGROUPS / "memory", "memory.limit_in_bytes"
