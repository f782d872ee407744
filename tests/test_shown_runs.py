"""Each command that README, docs and the example workflow show, run in a small nnU-Net project.

The project is called as the one in the docs is, so that commands run as they stand there. What differs is in one table,
with its reason. A page's commands run one after the other, in a folder of their own; the models are shared.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import shown
import yaml
from nnunet_project import (
    Project,
    command_environment,
    easy_task,
    make_project,
    program,
    save_stock,
    tiny,
    train_std,
    write,
)
from shown import PAGES, Block, Command
from test_shown import WORKFLOWS, everything

from nnunet_ima.evaluation.baseline import baseline_of, write_baseline
from nnunet_ima.evaluation.command_line import main, read_arguments
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.evaluation.results import read_results

TASK = "Task04_Hippocampus"
CASES = "8"
# Written over what a page shows: pattern, what stands there instead (None: it is not run), and why.
SUBSTITUTES: tuple[tuple[str, str | None, str], ...] = (
    (r"pip install (\.|'\$NNUNET_IMA')", None, "takes minutes; the tests run in what `make` installs in the same way"),
    (r"make .*", None, "`make test` is this; `make demo` calls the command below"),
    (r"nnunet_ima demo .*", None, "takes ten minutes; test_hippocampus.py runs the same pipeline on real scans"),
    (r"nnunet_ima decathlon .*", None, "takes hours; run as a dry run below, and on phantoms by test_decathlon_run.py"),
    (r"python benchmarks/.*", None, "takes minutes to hours; benchmarks/results has what came of it"),
    (r"docker .*", None, "there is no Docker; what runs inside is parsed, and the like is run elsewhere"),
    (r"sbatch .*", None, "there is no cluster; the scripts are run"),
    (r".* -num_gpus 2", None, "needs two GPUs; test_ddp.py runs the step in two processes"),
    (r"CUDA_VISIBLE_DEVICES=.*", None, "needs two GPUs; the same command is run without the variable"),
    (r"(nnUNetv2_train (?!.*-device).*)", r"\1 -device cpu", "nnU-Net's default is a GPU"),
    (r"(nnUNetv2_predict .*)", r"\1 -device cpu -npp 1 -nps 1", "the same; and one worker is enough"),
    (r"(nnUNetv2_plan_and_preprocess .*|nnUNetv2_convert_MSD_dataset .*) -np 2", r"\1 -np 1", "one worker is enough"),
    (
        r"(nnunet_ima evaluate (?!.*--attacks|--merge).*)",
        r"\1 --levels 5 --attacks apgd:steps=2",
        "the default attacks take a minute",
    ),
    (
        r"(.*) --levels 1/255 2/255 4/255 --attacks white-noise apgd autoattack",
        r"\1 --levels 2/255 --attacks white-noise:draws=2 apgd:steps=2 autoattack:version=fast,mode=threshold",
        "the standard version asks thousands of times",
    ),
    (r"(nnunet_ima attack .*)", r"\1 --attack apgd:steps=2", "a hundred steps take longer"),
    (r"(nnunet_ima (?:select|grid) .*)", r"\1 --max-samples 4", "each attacks several checkpoints"),
    (
        r"(.*) --epsilon 10 15( 20)? --delta-epsilon (1 )?2( 5)?(.*)",
        r"\1 --epsilon 6 --delta-epsilon 1\5",
        "one training, not nine",
    ),
    (r"(.*) hippocampus_017(.*)", r"\1 phantom_003\2", "the project's cases are phantoms"),
    (r"(.*) --cases 40(.*)", rf"\1 --cases {CASES}\2", "there are no more"),
    (
        r"(.*) num_epochs=\d+ num_iterations_per_epoch=50(.*)",
        r"\1 num_epochs=1 num_iterations_per_epoch=2\2",
        "a short training will do",
    ),
    (r"export nnUNet_n_proc_DA=10", "export nnUNet_n_proc_DA=1", "one worker is enough"),
)
# Of a job array, which jobs are run.
JOBS = {"train.sh": ["0"], "attack.sh": ["0", "1", "2", "3"], "merge.sh": [""]}
# Folders and files that a page speaks of and does not make: its own name for what another page made.
GIVEN = {
    "README.md": {
        "run_stock": "harden/run_stock",
        "run_hardened": "harden/run_hard",
        "run": "harden/run_hard",
        "baseline.json": "harden/baseline.json",
    },
    "command-line.md": {
        "run_stock": "harden/run_stock",
        "run_hardened": "harden/run_hard",
        "run": "harden/run_hard",
    },
    "runs.md": {"run_stock": "harden/run_stock", "run_hardened": "harden/run_hard"},
}
# With nothing left in the page's own folder, and expensive or refused a second time: not run again on another page.
ONCE = re.compile(r"nnUNetv2_train |nnunet_ima (evaluate|select|export) (?!.*-o )")


def as_run(text: str) -> str | None:
    """A command with the substitutes in it; None if it is not to be run."""
    for pattern, instead, _ in SUBSTITUTES:
        if found := re.fullmatch(pattern, text):
            if instead is None:
                return None
            text = found.expand(instead)
    return text


@dataclass
class Shell:
    """Runs commands in a folder, in this process if they are ours, and remembers variables and output.

    Attributes:
        done: expensive commands that were run already, in any shell.
        outputs: of every command so far, by its words.
    """

    folder: Path
    environment: dict[str, str]
    done: set[str] = field(default_factory=set)
    outputs: dict[str, str] = field(default_factory=dict)

    def run(self, command: Command) -> None:
        """Run a command after its substitutes; it must end well."""
        meant = self._expanded(command)
        text = as_run(str(meant))
        if text is None or text in self.done:
            return
        for found in [meant] if text == str(meant) else shown.commands(text, command.place):
            self._run(found)
        if ONCE.match(text):
            self.done.add(text)

    def _expanded(self, command: Command) -> Command:
        def expand(text: str) -> str:
            for nested, output in self.outputs.items():
                text = text.replace(f"$({nested})", output)
            return shown.expanded(text, self.environment)

        assigned = tuple((name, expand(value)) for name, value in command.assigned)
        return replace(command, words=tuple(map(expand, command.words)), assigned=assigned)

    def _run(self, command: Command) -> None:
        self.environment.update(command.assigned)
        if not command.words or command.words[0] in ("export", "set"):
            return
        is_ours = command.words[0] == "nnunet_ima"
        self.outputs[shlex.join(command.words)] = (self._ours if is_ours else self._other)(command).strip()

    def _ours(self, command: Command) -> str:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(self.folder)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            status = main(command.words[1:])
        # A gate may find out anything about a model that was trained for seconds; but it must have judged it.
        judged = command.words[1] == "gate" and "| rule |" in out.getvalue()
        said = f"{out.getvalue()[-3000:]}\n{err.getvalue()[-3000:]}"
        assert status == 0 or judged, f"{command.place}: {command} ended with {status}:\n{said}"
        if status and "--write-baseline" in command.words:
            self._keep_baseline(command, out.getvalue())
        return out.getvalue()

    def _keep_baseline(self, command: Command, said: str) -> None:
        """What was trained for seconds has not learned its task, and makes no baseline; but later commands need one."""
        assert "this model has not learned its task" in said, f"{command.place}: {command} wrote no baseline:\n{said}"
        options = read_arguments(command.words[1:])
        results = read_results(self.folder / options.run_folder)
        write_baseline(baseline_of(results), self.folder / options.write_baseline)

    def _other(self, command: Command) -> str:
        name = command.words[0]
        done = subprocess.run(
            [program(name) if name.startswith("nnUNet") else name, *command.words[1:]],
            env=self.environment, cwd=self.folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command.place}: {command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@dataclass
class Laboratory:
    """The project that the docs speak of, and what the pages made of it so far."""

    project: Project
    pages: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def folder(self, page: str) -> Path:
        """Where a page's commands run."""
        return self.project.root / "pages" / page.removesuffix(".md")

    def run(self, page: str) -> Path:
        """Run a page unless it was run."""
        folder = self.folder(page)
        if page in self.pages:
            return folder
        self.pages.add(page)
        (folder / "imagesTs").mkdir(parents=True)
        (folder / "data").mkdir()
        (folder / "data" / TASK).symlink_to(self.project.root / TASK)
        scan = self.project.root / TASK / "imagesTr" / "phantom_003.nii.gz"
        shutil.copyfile(scan, folder / "imagesTs" / "phantom_003_0000.nii.gz")
        for name, source in GIVEN.get(page, {}).items():
            made = self.project.root / "pages" / source
            (shutil.copytree if made.is_dir() else shutil.copyfile)(made, folder / name)
        shell = Shell(folder, command_environment(self.project), self.done)
        path = next(path for path in PAGES if path.name == page)
        for block in shown.blocks(path):
            if block.language == shown.SHELL:
                self._run_block(shell, block)
        return folder

    @staticmethod
    def _run_block(shell: Shell, block: Block) -> None:
        for job in JOBS[block.script] if block.script else [None]:
            if job is not None:
                shell.environment["SLURM_ARRAY_TASK_ID"] = job
            for command in shown.commands(block.text, block.place):
                shell.run(command)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Laboratory:
    """A phantom under the name of the Decathlon's hippocampus, with trained models of stock nnU-Net."""
    root = tmp_path_factory.mktemp("docs")
    project = replace(make_project(root, easy_task(root / TASK)), plans_name="nnUNetPlans")
    plans = project.plans()
    for name, features, batch_size in (("2d", [8, 16, 32], 8), ("3d_fullres", [4, 8, 16], 2)):
        planned = plans["configurations"][name]
        patch = planned["patch_size"] if name == "2d" else (24, 32, 32)
        planned.update(tiny(planned, name, features, batch_size, patch))
        del planned["inherits_from"]
    write(project.preprocessed / "nnUNetPlans.json", plans)
    for name, iterations, learning_rate in (("2d", 120, 0.2), ("3d_fullres", 60, 0.3)):
        trained = train_std(project, name, iterations, learning_rate)
        stock = save_stock(project, name, trained / "fold_0" / "checkpoint_final.pth")
        plans["configurations"][name]["nnunet_ima"]["start_from"] = str(stock / "fold_0" / "checkpoint_final.pth")
    write(project.preprocessed / "nnUNetPlans.json", plans)
    return Laboratory(project)


RUNNABLE = [page for page in PAGES if any(block.language == shown.SHELL for block in shown.blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(laboratory, page):
    # What the other pages go on from.
    laboratory.run("harden.md")
    laboratory.run("README.md")
    laboratory.run(page.name)


@pytest.mark.slow
def test_the_walk_through_ends_with_a_model_of_stock_nnunet(laboratory):
    folder = laboratory.run("harden.md")
    assert (folder / "report" / "report.html").is_file()
    assert [file.name for file in (folder / "predicted").glob("*.nii.gz")] == ["phantom_003.nii.gz"]
    exported = laboratory.project.results / "nnUNetTrainer__nnUNetPlansHardened__2d_hard"
    assert (exported / "fold_0" / "checkpoint_selected.pth").is_file()
    assert (folder / "hardened.zip").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_example_workflow_runs(laboratory, workflow):
    """All steps of it, with the baseline that its first lines speak of."""
    folder = laboratory.folder(workflow.name)
    (folder / "data").mkdir(parents=True)
    (folder / "data" / TASK).symlink_to(laboratory.project.root / TASK)
    (job,) = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    environment = {name: value.replace("${{ github.workspace }}", str(folder)) for name, value in job["env"].items()}
    assert not [value for value in environment.values() if "${{" in value]
    shell = Shell(folder, {**command_environment(laboratory.project), **environment})
    for step in job["steps"]:
        for command in shown.commands(step.get("run", ""), f"{workflow.name}: {step.get('name')}"):
            if "--baseline robustness/baseline.json" in str(command):
                (keep,) = re.findall(
                    r"`(nnunet_ima gate .*?)`", workflow.read_text(encoding="utf-8").replace("\n# ", " ")
                )
                (folder / "robustness").mkdir()
                for kept in shown.commands(keep, workflow.name):
                    shell.run(kept)
            shell.run(command)
    assert (folder / "report" / "report.html").is_file()
    assert "verdict" in (folder / "gate" / "gate.md").read_text(encoding="utf-8")


def test_the_commands_of_the_decathlon_study_run_as_dry_runs(tmp_path, monkeypatch, capsys):
    shutil.copytree(make_phantom_task(tmp_path / TASK, 5, progress=False), tmp_path / "FOLDER" / TASK)
    for name in ("Task02_Heart", "Task05_Prostate"):
        shutil.copytree(tmp_path / TASK, tmp_path / "FOLDER" / name)
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    studies = [command for command in everything() if command.words[:2] == ("nnunet_ima", "decathlon")]
    assert {"docs/decathlon.md", "docs/command-line.md"} <= {command.place.partition(":")[0] for command in studies}
    for command in studies:
        assert main([*command.words[1:], "--dry-run"]) == 0, f"{command.place}: {capsys.readouterr().err}"
        shown_steps = re.findall(r"\[to do\] (\w+)", capsys.readouterr().out)
        assert {"convert", "plan", "train", "evaluate"} == set(shown_steps), command.place
    assert sorted(tmp_path.rglob("*")) == there


def test_every_substitute_is_for_something_that_is_shown():
    texts = [str(replace(command, words=tuple(command.words))) for command in everything()]
    for pattern, _, why in SUBSTITUTES:
        assert why
        assert [text for text in texts if re.fullmatch(pattern, text)], f"nothing shown is like {pattern}"
    assert set(JOBS) == {block.script for block in shown.all_blocks(shown.SHELL) if block.script}
