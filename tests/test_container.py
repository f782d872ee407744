"""The Dockerfile, without Docker: what it copies is enough to install, and what it says of the installation is so."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch

import pytest
from shown import ROOT

Instructions = list[tuple[str, str]]


@pytest.fixture(scope="module")
def instructions() -> Instructions:
    """Name and arguments of each instruction, comments left out and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def copied(instructions: Instructions) -> list[str]:
    """Files and folders that are copied into the image, all to a place of the same name."""
    found = []
    for name, rest in instructions:
        if name == "COPY":
            *sources, target = rest.split()
            assert target == "./" or sources == [target]
            found += sources
    return found


def environment(instructions: Instructions) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for name, rest in instructions if name == "ENV")))


def test_what_is_copied_is_there_and_not_left_out(instructions):
    *rules, caches = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")[1:-1]
    assert rules[0] == "*"
    assert caches == "**/__pycache__"
    assert {rule.removeprefix("!") for rule in rules[1:]} == set(copied(instructions))
    for source in copied(instructions):
        assert (ROOT / source).exists()


def test_what_is_copied_is_enough_to_install(instructions, tmp_path):
    """Every module and every file beside them, whatever else lies in the repository."""
    source = tmp_path / "source"
    for name in copied(instructions):
        place = source / name
        ignored = shutil.ignore_patterns("__pycache__")
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, place)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir"]
    done = subprocess.run([*command, str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    data = re.findall(r"[\w.*]+", config["options.package_data"]["nnunet_ima.evaluation.report"])
    wanted = {"nnunet_ima/py.typed"}
    for folder, prefix in (("nnunet_ima", ""), ("trainers", "nnunet_ima/"), ("evaluation", "nnunet_ima/")):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix == ".py" or any(fnmatch(file.name, pattern) for pattern in data):
                wanted.add(prefix + str(file.relative_to(ROOT)))
    assert packed == wanted


def test_nnunet_finds_the_trainers_there(instructions):
    """The base image has its packages in /usr/local; the place of the trainers in them is that of an installation."""
    (base,) = (rest for name, rest in instructions if name == "FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", base)
    assert version
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (package,) = (name for name in config["options"]["packages"].split() if name.endswith(".trainers"))
    within = package.replace(".", "/")
    expected = f"/usr/local/lib/python{version[1]}/site-packages/{within}"
    assert environment(instructions)["nnUNet_extTrainer"] == expected
    # The build itself looks, too.
    assert ("RUN", 'test "$(nnunet_ima trainers)" = "$nnUNet_extTrainer"') in instructions


def test_it_runs_as_a_user_whose_folders_are_its_own(instructions):
    user = [rest for name, rest in instructions if name == "USER"][-1]
    runs = " ".join(rest for name, rest in instructions if name == "RUN")
    assert user == "1000"
    assert f"useradd --uid {user} --home-dir /opt/nnunet --create-home nnunet" in runs
    values = environment(instructions)
    for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert values[folder] == f"/data/{folder}"
        assert values[folder] in runs
    assert (values["HOME"], values["USER"]) == ("/opt/nnunet", "nnunet")
    assert [rest for name, rest in instructions if name == "WORKDIR"][-1] == "/data"


def test_the_versions_are_those_of_the_tests(instructions):
    (install,) = (rest for name, rest in instructions if name == "RUN" and "pip install" in rest)
    assert "--constraint constraints.txt ." in install


def test_what_stands_after_the_image_is_the_command(instructions):
    assert [name for name, _ in instructions if name == "ENTRYPOINT"] == []
    assert ("CMD", '["nnunet_ima", "--help"]') in instructions
