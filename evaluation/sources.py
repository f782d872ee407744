"""Which program made a number: a digest of this package's own sources; its version stays through many commits."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

# Installed in place, these are folders of their own; else they lie within the first one.
PACKAGES = ("nnunet_ima", "nnunet_ima.trainers", "nnunet_ima.evaluation")
# What neither an evaluation nor a trainer imports, so that no number depends on it; a test goes through the imports.
LEFT_OUT = (
    "nnunet_ima/evaluation/baseline.py",
    "nnunet_ima/evaluation/changes.py",
    "nnunet_ima/evaluation/decathlon_study/",
    "nnunet_ima/evaluation/gate.py",
    "nnunet_ima/evaluation/report/",
)
DIGITS = 16


def digest_of(packages: Mapping[str, Path]) -> str:
    """A number that changes with every source file of these packages, however and wherever they are installed.

    Args:
        packages: their folders by name.
    """
    total = hashlib.sha256()
    for name, file in sorted(dict(source_files(packages)).items()):
        # A checkout on Windows may end its lines otherwise.
        content = file.read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{name} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()[:DIGITS]


def source_files(packages: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """What a number may depend on, as ``nnunet_ima/attacks/apgd.py``, and where it is; also through linked folders."""
    for package, folder in packages.items():
        for found in glob.glob("**/*.py", root_dir=folder, recursive=True):  # noqa: PTH207 (pathlib skips linked folders)
            name = f"{package.replace('.', '/')}/{Path(found).as_posix()}"
            if "__pycache__" not in name and not name.startswith(LEFT_OUT):
                yield name, folder / found


def installed() -> dict[str, Path]:
    """The folders of the packages that are at work."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {
        name: Path(folder)
        for name, spec in specs.items()
        if spec is not None
        for folder in list(spec.submodule_search_locations or ())[:1]
    }


# At import: what is loaded now is what runs, whatever comes onto the disk meanwhile.
SOURCES = digest_of(installed())
