"""Each command and each piece of Python that README, docs and examples show: read by the very programs it names.

Whatever the programs' own parsers refuse fails here, and so does a program that nobody told this test how to check.
tests/test_shown_runs.py runs the commands.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shown
import torch
import yaml
from shown import PAGES, ROOT, Block, Command
from tiny_networks import seeded, tiny_network

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.configure import parse_settings
from nnunet_ima.evaluation.gate import parse_minimum
from nnunet_ima.evaluation.protocols import parse_level
from nnunet_ima.settings import validate
from nnunet_ima.threat import image_range

WORKFLOWS = sorted((ROOT / "docs" / "examples").glob("*.yml"))
# A block in none of these languages is read by nobody. ``text`` is for what is no code at all.
LANGUAGES = {"bash", "python", "json", "text", "{toctree}", "{argparse}", "{eval-rst}", "{include}"}
SHELL_BUILTINS = {"export", "set", "cat", "echo", "mkdir", "id"}
# Of a job array, and of GitHub.
VARIABLES = {"SLURM_ARRAY_TASK_ID": "0"}
OUR_TRAINERS = {path.stem for path in (ROOT / "trainers").glob("nnUNetTrainer*.py")} | {
    node.name
    for node in ast.parse((ROOT / "trainers" / "nnUNetTrainer_robust_lengths.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
}


def everything() -> list[Command]:
    """All commands of all pages and workflows."""
    found = []
    for block in shown.all_blocks(shown.SHELL):
        found += shown.commands(block.text, block.place)
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                found += shown.commands(step.get("run", ""), f"{file.relative_to(ROOT)}: {step.get('name')}")
    return found


class Parsed(Exception):  # noqa: N818 (no error: the way out of a program once it has read its arguments)
    """Carries what a program made of its arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


@pytest.fixture
def read(monkeypatch, capsys) -> Callable[[Callable[[], Any], Command, list[str]], argparse.Namespace]:
    """Start a program, and stop it when its own parser has read the arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(original(parser, args, namespace))

    def start(program: Callable[[], Any], command: Command, arguments: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            program()
        except Parsed as parsed:
            return parsed.options
        except SystemExit:
            pytest.fail(f"{command.place}: {command}\n{capsys.readouterr().err}")
        pytest.fail(f"{arguments[0]} did not read its arguments")

    return start


def check(command: Command, arguments: list[str], read: Any) -> None:
    """What the program of a command says to its arguments; variables are expanded."""
    program, rest = arguments[0], arguments[1:]
    if program.startswith(("nnunet_ima", "nnUNetv2_")):
        scripts = importlib.metadata.entry_points(group="console_scripts", name=program)
        assert scripts, f"{command.place}: there is no program {program}"
        options = read(next(iter(scripts)).load(), command, arguments)
        check_values(command, vars(options))
    elif program == "python":
        script = ROOT / rest[0]
        assert script.is_file(), f"{command.place}: there is no {rest[0]}"
        # As Python does for a script, which may import what lies beside it.
        with pytest.MonkeyPatch.context() as here:
            here.syspath_prepend(script.parent)
            read(lambda: runpy.run_path(str(script), run_name="__main__"), command, rest)
    elif program == "make":
        done = subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command.place}: {done.stderr}"
    elif program == "docker":
        check_docker(command, rest, read)
    elif program == "sbatch":
        page = ROOT / command.place.partition(":")[0]
        assert rest[-1] in {block.script for block in shown.blocks(page)}, f"{command.place}: {rest[-1]} is not shown"
    elif program == "pip":
        # What the example workflow's variable may be: test_gate_benchmarks.py.
        assert rest in (["install", "."], ["install", "$NNUNET_IMA"]), f"{command.place}: {command} is not known here"
    else:
        assert program in SHELL_BUILTINS, f"{command.place}: tests/test_shown.py does not know how to check {program}"


def check_values(command: Command, options: dict[str, Any]) -> None:
    """What the program itself looks at only later: attacks, levels, settings, rules, trainers."""
    attacks = options.get("attacks") or [options["attack"]] if options.get("attack") else options.get("attacks") or []
    for attack in attacks:
        parse_attack(attack)
    for level in options.get("levels") or filter(None, [options.get("level")]):
        parse_level(level, options["norm"])
    validate(parse_settings(options.get("set") or []), command.place)
    for rule in options.get("min") or []:
        parse_minimum(rule)
    trainer = options.get("trainer") or options.get("tr") or "nnUNetTrainer"
    assert trainer in {"nnUNetTrainer", *OUR_TRAINERS}, f"{command.place}: there is no trainer {trainer}"


DOCKER_RUN_OPTIONS = {"--rm": 0, "--ipc=host": 0, "--gpus": 1, "--user": 1, "--volume": 1}


def check_docker(command: Command, rest: list[str], read: Any) -> None:
    """There is no Docker where the tests run: options are those known here; what runs inside is checked as all else."""
    page = (ROOT / command.place.partition(":")[0]).read_text(encoding="utf-8")
    image = re.search(r"docker build --tag (\S+) \.", page)
    assert image, f"{command.place}: no image is built on this page"
    if rest[0] == "build":
        return
    assert rest[0] == "run", f"{command.place}: docker {rest[0]}?"
    options = rest[1 : rest.index(image[1])]
    while options:
        assert options[0] in DOCKER_RUN_OPTIONS, f"{command.place}: docker run {options[0]}?"
        options = options[1 + DOCKER_RUN_OPTIONS[options[0]] :]
    check(command, rest[rest.index(image[1]) + 1 :], read)


def test_every_command_shown_is_one_that_its_program_takes(read):
    variables = dict(VARIABLES)
    counted = 0
    for command in everything():
        variables.update(command.assigned)
        words = [shown.expanded(word, variables) for word in command.words]
        if words:
            check(command, words, read)
            counted += 1
    assert counted > 50


def test_a_wrong_command_would_be_found(read):
    """Of each kind one."""
    for text in (
        "nnunet_ima evaluate -d 4 --level 5 --no-such-option",
        "nnunet_ima evaluate -d 4 -c 2d --attacks apgd:step=3",
        "nnunet_ima configure -d 4 -c 2d --set epsilom=3",
        "nnunet_ima gate run --min nonsense",
        "nnUNetv2_train 4 2d 0 -tr nnUNetTrainerIMO",
        "nnUNetv2_train 4 2d",
        "nnUNetv2_nothing 4",
        "python benchmarks/moons.py --no-such-option",
        "python benchmarks/nothing.py",
        "make nothing",
        "curl something",
    ):
        (command,) = shown.commands(text, "docs/container.md:1")
        with pytest.raises((AssertionError, pytest.fail.Exception, UserError)):
            check(command, list(command.words), read)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    for block in shown.blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: a block in {block.language!r}, which no test reads"
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(shown.blocks(page)), "a block that is not closed"


@pytest.mark.parametrize("block", shown.all_blocks(shown.SHELL), ids=lambda block: block.place)
def test_every_shell_block_is_shell(block: Block):
    done = subprocess.run(["bash", "-n", "-c", block.filled], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", shown.all_blocks("json"), ids=lambda block: block.place)
def test_json_shown_is_json_with_settings_there_are(block: Block):
    for configuration in json.loads(f"{{{block.text}}}").values():
        validate(configuration["nnunet_ima"], block.place)


def test_commands_named_in_sentences_exist_with_these_options():
    from nnunet_ima.evaluation.command_line import _parser

    subparsers = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for page in PAGES:
        if page.name == "decisions.md":  # speaks of what is to come
            continue
        for span in shown.inline(page):
            program, name, *rest = span.split()
            options = {word.split("=")[0] for word in rest if word.startswith("-")}
            if program != "nnunet_ima" or name == "COMMAND":
                continue
            assert name in subparsers.choices, f"{page.name}: {span}"
            known = subparsers.choices[name]._option_string_actions
            assert options <= set(known), f"{page.name}: {span}"


# ---- Python


def given(page: Path) -> dict[str, Any]:
    """What a page's Python may use without making it: a network, a batch for it, and the range of its images."""
    if page.name != "attacks.md":
        return {}
    images = torch.randn(2, 1, 12, 12, generator=seeded(0))
    low, high = image_range(images)
    targets = (images > 0.5).long()
    return {"network": tiny_network(2, 1, 2, seed=0), "images": images, "targets": targets, "low": low, "high": high}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in shown.blocks(page))], ids=lambda p: p.name
)
def test_python_shown_runs(page: Path, capsys):
    names = given(page)
    for block in shown.blocks(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    if page.name == "python.md":
        # What its comments say.
        result, threat = names["result"], names["threat"]
        assert (result.clean_dice == 1).all()
        assert (result.dice < 1).all()
        assert bool(threat.contains(result.images, names["images"]).all())
        assert float((result.images - names["images"]).flatten(1).norm(dim=1).max()) <= 1.0 + 1e-5
        assert "same_output_twice True" in capsys.readouterr().out
