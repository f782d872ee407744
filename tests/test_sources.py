"""The digest of this package's sources: changes with whatever may change a number, and with nothing else."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.sources import LEFT_OUT, PACKAGES, SOURCES, digest_of, installed, source_files

FOLDERS = {"nnunet_ima": "nnunet_ima", "nnunet_ima.trainers": "trainers", "nnunet_ima.evaluation": "evaluation"}


@pytest.fixture
def checkout(tmp_path) -> dict[str, Path]:
    """The packages that are at work, beside each other as in the repository."""
    names = dict(source_files(installed()))
    for package, folder in FOLDERS.items():
        others = [other for other in PACKAGES if other.startswith(f"{package}.")]
        for name, file in names.items():
            path = Path(name)
            inside = path.is_relative_to(package.replace(".", "/"))
            if inside and not any(path.is_relative_to(other.replace(".", "/")) for other in others):
                target = tmp_path / folder / path.relative_to(package.replace(".", "/"))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    return {package: tmp_path / folder for package, folder in FOLDERS.items()}


def test_it_is_that_of_what_is_installed_and_stands_among_the_versions():
    assert versions()["nnunet_ima's sources"] == SOURCES == digest_of(installed())
    names = [name for name, _ in source_files(installed())]
    for name in ("__init__", "attacks/apgd", "attacks/__init__", "trainers/nnUNetTrainerIMA", "evaluation/run"):
        assert f"nnunet_ima/{name}.py" in names


def test_it_does_not_tell_how_the_package_is_installed(checkout, tmp_path):
    """In place, as a copy with everything in one folder, or by links."""
    assert digest_of(checkout) == SOURCES
    flat = tmp_path / "site-packages" / "nnunet_ima"
    linked = tmp_path / "linked" / "nnunet_ima"
    linked.mkdir(parents=True)
    for package, folder in checkout.items():
        shutil.copytree(folder, flat / package.partition(".")[2], dirs_exist_ok=True)
        for entry in [folder] if "." in package else folder.iterdir():
            (linked / entry.name).symlink_to(entry)
    for root in (flat, linked):
        packages = {package: root / package.partition(".")[2] for package in PACKAGES}
        assert digest_of(packages) == SOURCES
        assert digest_of({"nnunet_ima": root}) == SOURCES


def test_every_source_counts(checkout):
    known = {SOURCES}
    for _, file in source_files(checkout):
        content = file.read_bytes()
        file.write_bytes(content + b"# changed\n")
        known.add(digest_of(checkout))
        file.write_bytes(content)
    assert len(known) == 1 + len(list(source_files(checkout)))
    apgd = checkout["nnunet_ima"] / "attacks" / "apgd.py"
    for change in (lambda: apgd.rename(apgd.with_name("other.py")), apgd.with_name("new.py").touch,
                   apgd.with_name("other.py").unlink):  # fmt: skip
        change()
        known.add(digest_of(checkout))
    assert len(known) == 4 + len(list(source_files(checkout)))


def test_what_no_number_depends_on_does_not_count(checkout):
    evaluation = checkout["nnunet_ima.evaluation"]
    for name in ("__pycache__/run.cpython-311.pyc", "__pycache__/run.py", ".hidden/run.py", "page.html", "gate.py",
                 "report/report.py", "decathlon_study/study.py"):  # fmt: skip
        (evaluation / name).parent.mkdir(exist_ok=True)
        (evaluation / name).write_text("anything")
    apgd = checkout["nnunet_ima"] / "attacks" / "apgd.py"
    apgd.write_bytes(apgd.read_bytes().replace(b"\n", b"\r\n"))
    assert digest_of(checkout) == SOURCES


def test_neither_evaluations_nor_trainers_import_what_is_left_out():
    """Not even by way of others: the imports, those within functions too, of all that they reach."""
    every = {name: file for package, folder in installed().items() for name, file in _all_files(package, folder)}
    todo = {name for name in every if "/trainers/" in name or name.startswith("nnunet_ima/evaluation/evaluate.py")}
    todo.add("nnunet_ima/evaluation/merge.py")
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= {found for found in _imported(every[name], every) if found not in reached}
    assert len(reached) > 80
    assert [name for name in sorted(reached) if name.startswith(LEFT_OUT)] == []
    assert all(any(name.startswith(one) for name in every) for one in LEFT_OUT)


def _all_files(package: str, folder: Path) -> list[tuple[str, Path]]:
    root = package.replace(".", "/")
    return [(f"{root}/{file.relative_to(folder).as_posix()}", file) for file in _walk(folder)]


def _walk(folder: Path) -> list[Path]:
    return [file for entry in folder.iterdir() for file in (_walk(entry) if entry.is_dir() else [entry])
            if file.suffix == ".py"]  # fmt: skip


def _imported(file: Path, every: dict[str, Path]) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {module.replace(".", "/") for module in modules}
    # Whatever is imported, the packages that it lies in are, too.
    paths |= {parent.as_posix() for path in paths for parent in Path(path).parents}
    return {name for path in paths for name in (f"{path}.py", f"{path}/__init__.py") if name in every}
