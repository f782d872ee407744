"""The command ``nnunet_ima``."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from nnunet_ima import __version__
from nnunet_ima.errors import UserError, is_out_of_memory
from nnunet_ima.evaluation.ending import Terminated, ended_in_order
from nnunet_ima.evaluation.environment import trainers_folder
from nnunet_ima.lp import NORMS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake ends with one sentence on standard error and status 2."""
    options = read_arguments(arguments)
    try:
        return _run(options)
    except Exception as error:
        if options.run is not _gate:
            raise
        # Python would end with 1, which of a gate means that a rule is broken.
        traceback.print_exc()
        print(
            f"nnunet_ima: The gate failed with an error of its own ({type(error).__name__}), so nothing is said of the "
            f"model; report it with what stands above.",
            file=sys.stderr,
        )
        return 2


def _run(options: argparse.Namespace) -> int:
    # MONAI and torch warn of their own future changes, which no user of this command can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with ended_in_order():
            return int(options.run(options))
    except UserError as error:
        print(f"nnunet_ima: {error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        print("nnunet_ima: stopped.", file=sys.stderr)
        return error.status if isinstance(error, Terminated) else 130
    except OSError as error:
        print(f"nnunet_ima: {_sentence(error)}", file=sys.stderr)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print("nnunet_ima: The memory is not enough; close what else uses it, or use -device cpu.", file=sys.stderr)
    return 2


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the words after ``nnunet_ima`` ask for, defaults included; by default those of this process."""
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnunet_ima", description="Robust training and honest attack for nnU-Net.")
    parser.add_argument("--version", action="version", version=f"nnunet_ima {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    trainers = commands.add_parser("trainers", help="print the folder to export as nnUNet_extTrainer")
    trainers.set_defaults(run=_trainers)

    _add_evaluate(commands.add_parser("evaluate", help="attack a trained model on its validation cases"))

    _add_attack(commands.add_parser("attack", help="write perturbed scans as files, for any other tool"))
    _add_report(commands.add_parser("report", help="compare evaluated models on one page, and in tables"))
    _add_gate(commands.add_parser("gate", help="does a model still hold? exit 0 if so, 1 if not, 2 if nobody can tell"))
    _add_subset(commands.add_parser("subset", help="make a small copy of a Decathlon task, for CI"))
    _add_select(commands.add_parser("select", help="choose the most robust snapshot that keeps clean Dice"))
    _add_grid(commands.add_parser("grid", help="search over epsilon and delta_epsilon"))
    _add_configure(commands.add_parser("configure", help="show a training's settings, or write a new configuration"))
    _add_export(commands.add_parser("export", help="turn a hardened model into one of stock nnU-Net"))

    _add_decathlon(
        commands.add_parser(
            "decathlon", help="the paper's study: train and attack all methods on tasks of the Decathlon"
        )
    )

    demo = commands.add_parser("demo", help="train a stock and a hardened model, attack both, write a page about it")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo"), help="where to work; default: ./demo")
    demo.add_argument("--data", type=Path, help="a task folder of the Decathlon; default: a phantom made here")
    demo.add_argument("-device", default="cpu", help="cpu (default), cuda or mps")
    demo.set_defaults(run=_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser, trainer: str, checkpoint: bool = True) -> None:
    parser.add_argument("-d", "--dataset", help="number or name of the dataset, as for nnUNetv2_train")
    parser.add_argument("-c", "--configuration", help="such as 2d or 3d_fullres")
    parser.add_argument("-tr", "--trainer", default=trainer, help=f"default {trainer}")
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="default nnUNetPlans")
    if checkpoint:
        parser.add_argument("-chk", "--checkpoint", default="checkpoint_final.pth", help="default checkpoint_final.pth")
    parser.add_argument("-m", "--model", type=Path, help="a model folder, instead of -d -c -tr -p")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--dataset", required=True, help="number or name of the dataset, as for nnUNetv2_train")
    parser.add_argument("-c", "--configuration", required=True, help="such as 2d or 3d_fullres")
    parser.add_argument("-f", "--fold", default="0", help="default 0")
    parser.add_argument("-tr", "--trainer", default="nnUNetTrainerIMA_50epochs", help="default: the paper's length")
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="default nnUNetPlans")
    parser.add_argument("--epsilon", type=float, nargs="+", required=True, help="values to try")
    parser.add_argument("--delta-epsilon", type=float, nargs="+", required=True, help="values to try")
    parser.add_argument("--norm", default="l2", choices=NORMS, help="default l2")
    parser.add_argument("--level", help="of the attack that scores; default: the smallest of nnunet_ima evaluate's")
    parser.add_argument("--attack", default="pgd:steps=20", help="default pgd:steps=20")
    parser.add_argument("--max-samples", type=positive, help="attack no more slices or tiles than this")
    parser.add_argument("-num_parts", type=positive, default=1, help="split the jobs over this many machines")
    parser.add_argument("-part_id", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    parser.add_argument("-o", "--output", type=Path, required=True, help="for logs, results, table and picture")
    parser.set_defaults(run=_grid)


def _add_configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--dataset", required=True, help="number or name of the dataset, as for nnUNetv2_train")
    parser.add_argument("-c", "--configuration", required=True, help="such as 2d or 3d_fullres")
    parser.add_argument("-f", "--fold", default="0", help="whose training cases are counted; default 0")
    parser.add_argument("-tr", "--trainer", default="nnUNetTrainerIMA", help="default nnUNetTrainerIMA")
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="default nnUNetPlans")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the new configuration")
    parser.add_argument("--features", type=positive, help="of the first stage of a smaller network, for a CPU or CI")
    parser.add_argument("--batch-size", type=positive, help="of the new configuration; default: as planned")
    parser.add_argument("--name", help="of the new configuration; default: CONFIGURATION_ima")
    parser.set_defaults(run=_configure)


def _add_decathlon(parser: argparse.ArgumentParser) -> None:
    from_steps = ("convert", "plan", "train", "evaluate", "report")
    methods = ("STD", "SAT", "TE", "TRADES", "IMA")
    parser.add_argument("--raw", type=Path, required=True, help="holds the task folders, such as Task04_Hippocampus")
    parser.add_argument("-o", "--output", type=Path, default=Path("decathlon"), help="default ./decathlon")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 5], metavar="N", help="default 2 4 5")
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods), help="default: all five")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--skip", nargs="+", choices=from_steps, default=[], help="steps to leave out")
    steps.add_argument("--only", nargs="+", choices=from_steps, help="steps to do")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--dry-run", action="store_true", help="print the steps, what they cost, and differences")
    shown.add_argument("--print-jobs", action="store_true", help="print commands for a queue, one a line")
    parser.add_argument("--jobs", type=positive, default=1, help="models at work at once; default 1")
    parser.add_argument("--workers", type=positive, default=1, help="processes that augment, for each training")
    parser.add_argument("--compile", action="store_true", help="let nnU-Net compile the network")
    parser.add_argument("--epochs", type=positive, default=50, help="default 50, as in the paper")
    parser.add_argument("--iterations", type=positive, default=50, help="an epoch; default 50, as in the paper")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all trainings")
    parser.add_argument("--features", type=positive, help="of the first stage of a smaller network, for a CPU")
    parser.add_argument("--batch-size", type=positive, help="of all trainings; default: as planned")
    parser.add_argument(
        "--attack", default="autoattack:version=standard",
        help="beside white noise and PGD-100, as for nnunet_ima evaluate; default autoattack:version=standard",
    )  # fmt: skip
    parser.add_argument("--samples", type=positive, help="attack no more slices than this; default: all")
    parser.add_argument(
        "--evaluations", nargs="+", choices=("sound_l2", "paper_l2", "paper_linf", "paper_linf_noise"),
        default=["sound_l2", "paper_l2", "paper_linf", "paper_linf_noise"], help="default: all four",
    )  # fmt: skip
    parser.add_argument(
        "-device", help="cpu, cuda or mps; default: cuda where there is one, else cpu, as each job of a queue finds it"
    )
    parser.set_defaults(run=_decathlon)


def _add_select(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "nnUNetTrainerIMA", checkpoint=False)
    parser.add_argument("-f", "--fold", default="0", help="default 0")
    parser.add_argument(
        "--max-clean-drop", type=float, default=1.0, help="points of clean Dice that may be lost; default 1.0"
    )
    parser.add_argument("--reference", type=Path, help="model folder that sets the clean Dice; default: the best here")
    parser.add_argument("--norm", default="l2", choices=NORMS, help="default l2")
    parser.add_argument("--level", help="default: the smallest of nnunet_ima evaluate's")
    parser.add_argument("--attack", default="apgd:steps=20", help="default apgd:steps=20")
    parser.add_argument("--max-samples", type=positive, help="attack no more slices or tiles than this")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    parser.add_argument("-o", "--output", type=Path, help="default: inside the fold's folder")
    parser.set_defaults(run=_select)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "nnUNetTrainerIMA")
    parser.add_argument("--plans-name", help="name of the exported model's plans; default: the same")
    parser.add_argument("-o", "--output", type=Path, help="folder to put it in; default: beside the model")
    parser.add_argument("-device", default="cpu", help="on which to verify; default cpu")
    parser.set_defaults(run=_export)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "nnUNetTrainer")
    parser.add_argument("-f", "--fold", default="0", help="fold whose validation cases are attacked, or all; default 0")
    parser.add_argument("--protocol", default="sound", choices=("sound", "paper"), help="default sound")
    parser.add_argument("--norm", default="l2", choices=NORMS, help="default l2")
    parser.add_argument("--levels", nargs="+", help="default 5 15 25 for l2, 2/255 4/255 8/255 for linf")
    parser.add_argument(
        "--attacks", nargs="+", default=["white-noise", "autoattack:version=fast"],
        help="names, with their settings if wanted: white-noise fgsm ifgsm pgd:steps=100,restarts=5 bpgd apgd:loss=dlr "
        "apgd-t fab square spsa autoattack:version=standard,mode=threshold (docs/attacks.md); default: white-noise "
        "autoattack:version=fast",
    )  # fmt: skip
    parser.add_argument("--max-samples", type=positive, help="attack no more slices or tiles than this")
    parser.add_argument(
        "--batch-size", type=positive,
        help="samples attacked, and noted, at once; changes no number; default: 1 to 32 on a CPU, else as many as "
        "fill whole passes, 33 to 128",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the attacks; default 0")
    parser.add_argument(
        "--samples-seed",
        type=int,
        default=0,
        help="of the choice that --max-samples makes; default 0, whatever --seed is",
    )
    parser.add_argument("--no-cases", action="store_true", help="skip the case level")
    whole = parser.add_mutually_exclusive_group()
    whole.add_argument(
        "--end-to-end", action="store_const", const="window", default="off",
        help="attack whole cases too, through nnU-Net's sliding window, and tell how much of the effect survives",
    )  # fmt: skip
    whole.add_argument(
        "--end-to-end-mirroring", action="store_const", const="mirroring", dest="end_to_end",
        help="the same, through nnU-Net's mirroring as well: up to 4 (2D) or 8 (3D) times the passes",
    )  # fmt: skip
    parser.add_argument("-num_parts", type=positive, default=1, help="split the cases over this many machines")
    parser.add_argument("-part_id", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument(
        "--merge", nargs="*", type=Path, metavar="FOLDER",
        help="attack nothing: join the parts that were run into -o, or in these folders (several need -o), into tables "
        "and pictures",
    )  # fmt: skip
    parser.add_argument("-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    parser.add_argument("-o", "--output", type=Path, help="default: inside the fold's folder")
    parser.set_defaults(run=_evaluate)


def _add_attack(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "nnUNetTrainer")
    parser.add_argument("-f", "--fold", default="0", help="whose validation cases are attacked; default 0")
    parser.add_argument("--attack", default="apgd", help="as for nnunet_ima evaluate; default apgd")
    parser.add_argument("--norm", default="l2", choices=NORMS, help="default l2")
    parser.add_argument("--level", required=True, help="such as 5, or 2/255 for linf")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="default: all of the fold")
    parser.add_argument(
        "--batch-size", type=positive,
        help="samples at once; changes no number; default: as many as fill whole passes, up to 64, on CUDA up to 128",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder, or one that this command began")
    parser.set_defaults(run=_attack)


def _attack(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.attack_scans import attack_scans, table
    from nnunet_ima.evaluation.environment import choose_device
    from nnunet_ima.evaluation.evaluate import choose_model, read_fold
    from nnunet_ima.evaluation.models import load_model

    device = choose_device(options.device)
    folder = choose_model(options.model, options.dataset, options.configuration, options.trainer, options.plans)
    model = load_model(folder, read_fold(options.fold), options.checkpoint, device)
    command = shlex.join(["nnunet_ima", *sys.argv[1:]])
    found = attack_scans(
        model, options.attack, options.norm, options.level, options.cases, options.output, device, options.seed,
        command, batch_size=options.batch_size,
    )  # fmt: skip
    print(table(found, model))
    print(f"Written to {options.output}; nnUNetv2_predict -i {options.output / 'images'} ... predicts the images")
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of nnunet_ima evaluate")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the models, one for each run")
    parser.add_argument("-o", "--output", type=Path, default=Path("report"), help="default: ./report")
    parser.set_defaults(run=_report)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of nnunet_ima evaluate")
    parser.add_argument("--baseline", type=Path, help="a file of --write-baseline, or the folder of an earlier run")
    parser.add_argument("--max-drop", type=float, default=1.0, help="points of TVDI that may be lost; default 1.0")
    parser.add_argument(
        "--min", nargs="+", default=[], metavar="RULE", help="such as 'apgd@l2:5 tvdi>=0.55' or 'clean tvdi>=0.85'"
    )
    parser.add_argument("--write-baseline", type=Path, metavar="FILE", help="keep this run's figures for later gates")
    parser.add_argument("-o", "--output", type=Path, help="folder for gate.md and junit.xml")
    parser.set_defaults(run=_gate)


def _gate(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation import gate

    if options.output:
        # What an earlier gate left there must not look like this one's answer, not even if this one is stopped.
        gate.remove_gate(options.output)
    try:
        return _judge(options)
    except Exception as error:
        if options.output:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            unknown = gate.Judgement("the gate could be judged", "", "", gate.Verdict.UNKNOWN, why)
            gate.write_gate(options.output, str(options.run_folder), [unknown])
        raise


def _judge(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation import baseline as kept
    from nnunet_ima.evaluation import gate
    from nnunet_ima.evaluation.changes import what_changed
    from nnunet_ima.evaluation.results import read_results

    if not (options.baseline or options.min or options.write_baseline):
        raise UserError("Say what to check: --baseline FILE, --min RULE, or keep this run with --write-baseline FILE.")
    if not 0 <= options.max_drop <= 100:
        raise UserError(f"--max-drop is {options.max_drop:g}; it must be between 0 and 100 points.")
    minima = [gate.parse_minimum(text) for text in options.min]
    results = read_results(options.run_folder)
    judgements, changes = [gate.judge_trust(results), gate.judge_learned(results)], None
    if options.baseline:
        baseline = kept.read_baseline(options.baseline)
        judgements += gate.judge_drop(results, baseline, options.max_drop)
        changes = what_changed(kept.baseline_of(results), baseline)
    judgements += [gate.judge_minimum(results, minimum) for minimum in minima]
    if options.output:
        gate.write_gate(options.output, results.title, judgements, changes)
    verdict = gate.overall(judgements)
    print(gate.markdown(results.title, judgements, changes))
    if options.write_baseline and verdict is gate.Verdict.MET:
        kept.write_baseline(kept.baseline_of(results), options.write_baseline)
        print(f"Written to {options.write_baseline}")
    elif options.write_baseline:
        print(f"{options.write_baseline} was not written: only a run that meets its rules makes a baseline.")
    return int(verdict)


def _add_subset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, help="a task folder of the Decathlon")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new folder, such as ./Task04_Tiny")
    parser.add_argument("--cases", type=positive, default=20, help="default 20")
    parser.add_argument("--crop", type=int, metavar="MARGIN", help="to the foreground and so many voxels around it")
    parser.add_argument("--shrink", type=positive, default=1, help="enlarge voxels in the plane so many times")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases; default 0")
    parser.set_defaults(run=_subset)


def _subset(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.subset import Subset, make_subset

    if options.crop is not None and options.crop < 0:
        raise UserError(f"--crop is {options.crop}; it must be at least 0 voxels.")
    kept = Subset(options.cases, options.seed, options.crop, options.shrink)
    print(f"Written to {make_subset(options.task, options.output, kept)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.report import write_report

    page = write_report(options.runs, options.output, options.names)
    print(f"Open {page}; its tables are beside it as tables.csv, tables.md and tables.tex")
    return 0


def _trainers(_: argparse.Namespace) -> int:
    print(trainers_folder())
    return 0


def _merge(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.evaluate import choose_model, default_output
    from nnunet_ima.evaluation.merge import gather, merge

    output = options.output
    if output is None and len(options.merge) > 1:
        raise UserError(
            "Say with -o into which folder the results of these runs are to go; --merge changes none of them."
        )
    if output is None and options.merge:
        (output,) = options.merge
    if output is None:
        model = choose_model(options.model, options.dataset, options.configuration, options.trainer, options.plans)
        output = default_output(model, options.fold, options.checkpoint, options.protocol, options.norm)
    gather(options.merge, output)
    merge(output)
    return _show(output)


def _show(folder: Path) -> int:
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"Written to {folder}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.merge is not None:
        return _merge(options)
    # Imported here: nnU-Net and MONAI take seconds, and the other commands do not need them.
    from nnunet_ima.evaluation.evaluate import Request, evaluate

    folder = evaluate(
        Request(
            dataset=options.dataset,
            configuration=options.configuration,
            fold=options.fold,
            trainer=options.trainer,
            plans=options.plans,
            checkpoint=options.checkpoint,
            model=options.model,
            protocol=options.protocol,
            norm=options.norm,
            levels=options.levels,
            attacks=options.attacks,
            max_samples=options.max_samples,
            batch_size=options.batch_size,
            seed=options.seed,
            samples_seed=options.samples_seed,
            case_level=not options.no_cases,
            device=options.device,
            output=options.output,
            command=shlex.join(["nnunet_ima", *sys.argv[1:]]),
            num_parts=options.num_parts,
            part_id=options.part_id,
            end_to_end=options.end_to_end,
        )
    )
    if options.num_parts == 1:
        return _show(folder)
    print(
        f"Part {options.part_id} of {options.num_parts} is done. Once all are: nnunet_ima evaluate --merge -o "
        f"{shlex.quote(str(folder))}"
    )
    return 0


def _configure(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.configure import add_configuration, find_planned, in_force, parse_settings, write_plans
    from nnunet_ima.evaluation.evaluate import read_fold

    planned = find_planned(options.dataset, options.plans)
    shown, settings, fold = options.configuration, parse_settings(options.set), read_fold(options.fold)
    if settings or options.name or options.features or options.batch_size:
        shown = options.name or f"{options.configuration}_ima"
        planned = add_configuration(
            planned, options.configuration, shown, settings, options.features, options.batch_size
        )
    configured, explanation = in_force(planned, shown, options.trainer, fold)
    if shown != options.configuration:
        # Last of all: what cannot be used shall not stand in the user's plans.
        write_plans(planned)
        print(f"Configuration {shown} is in {planned.plans_file}; it inherits from {options.configuration}.")
    print(f"\n{options.trainer}, configuration {shown}, fold {fold}:\n\n{configured.describe()}\n")
    print("\n".join(f"- {sentence}" for sentence in explanation))
    plans = "" if options.plans == "nnUNetPlans" else f" -p {options.plans}"
    print(f"\nTrain it: nnUNetv2_train {options.dataset} {shown} {fold} -tr {options.trainer}{plans}")
    return 0


def _select(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.evaluate import DEFAULT_LEVELS, Request, choose_model
    from nnunet_ima.evaluation.select import SELECTED, select

    if not 0 <= options.max_clean_drop <= 100:
        raise UserError(f"--max-clean-drop is {options.max_clean_drop:g}; it must be between 0 and 100 points.")
    request = Request(
        dataset=None,
        configuration=None,
        fold=options.fold,
        trainer=options.trainer,
        plans=options.plans,
        checkpoint="checkpoint_final.pth",
        model=choose_model(options.model, options.dataset, options.configuration, options.trainer, options.plans),
        protocol="sound",
        norm=options.norm,
        levels=[options.level or DEFAULT_LEVELS[options.norm][0]],
        attacks=[options.attack],
        max_samples=options.max_samples,
        batch_size=None,
        seed=options.seed,
        samples_seed=options.seed,
        case_level=False,
        device=options.device,
        output=options.output,
        command=shlex.join(["nnunet_ima", *sys.argv[1:]]),
    )
    chosen, folder = select(request, options.max_clean_drop, options.reference)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"{chosen.checkpoint} is now {SELECTED}, for nnUNetv2_predict -chk {SELECTED}; more in {folder}")
    return 0


def _grid(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.configure import find_planned
    from nnunet_ima.evaluation.environment import choose_device
    from nnunet_ima.evaluation.evaluate import DEFAULT_LEVELS, read_fold
    from nnunet_ima.evaluation.grid import Grid, points_of

    if not 0 <= options.part_id < options.num_parts:
        raise UserError(f"-part_id is {options.part_id}; it must be from 0 to {options.num_parts - 1}.")
    grid = Grid(
        planned=find_planned(options.dataset, options.plans),
        configuration=options.configuration,
        fold=read_fold(options.fold),
        trainer=options.trainer,
        points=points_of(options.epsilon, options.delta_epsilon),
        norm=options.norm,
        level=options.level or DEFAULT_LEVELS[options.norm][0],
        attack=options.attack,
        max_samples=options.max_samples,
        device=choose_device(options.device).type,
        output=options.output.resolve(),
    )
    grid.run(options.num_parts, options.part_id)
    print(grid.report(grid.collect()))
    print(f"Table and picture are in {grid.output}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.environment import choose_device
    from nnunet_ima.evaluation.evaluate import choose_model
    from nnunet_ima.evaluation.export import export_model

    model = choose_model(options.model, options.dataset, options.configuration, options.trainer, options.plans)
    device = choose_device(options.device)
    target = export_model(model, options.output or model.parent, options.checkpoint, device, options.plans_name)
    print(f"{target} predicts what {model.name} does, bit for bit, and needs nothing but nnU-Net.")
    return 0


def _decathlon(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.configure import parse_settings
    from nnunet_ima.evaluation.decathlon_study import STEPS, DecathlonStudy, Request
    from nnunet_ima.evaluation.decathlon_study.dry_run import describe
    from nnunet_ima.evaluation.environment import choose_device, default_device

    study = DecathlonStudy(
        Request(
            raw=options.raw,
            output=options.output,
            tasks=options.tasks,
            methods=tuple(dict.fromkeys(options.methods)),
            steps=options.only or [step for step in STEPS if step not in options.skip],
            device=options.device,
            jobs=options.jobs,
            workers=options.workers,
            compiled=options.compile,
            epochs=options.epochs,
            iterations=options.iterations,
            settings=parse_settings(options.set),
            features=options.features,
            batch_size=options.batch_size,
            attack=options.attack,
            samples=options.samples,
            evaluations=tuple(dict.fromkeys(options.evaluations)),
        )
    )
    if options.dry_run or options.print_jobs:
        print(describe(study) if options.dry_run else study.jobs(), end="")
        return 0
    choose_device(options.device or default_device())
    print(study.run())
    return 0


def _demo(options: argparse.Namespace) -> int:
    from nnunet_ima.evaluation.demo import run_demo

    page = run_demo(options.output, options.data, options.device)
    print(f"Open {page}")
    return 0


def positive(text: str) -> int:
    """An option's whole number of at least 1, for argparse.

    Raises:
        ArgumentTypeError: it is smaller.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _sentence(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"The disk is full, so{where or ' a file'} could not be written; make room and start again."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"There is no permission to use{where or ' a file'}; choose another folder or change its permissions."
    return f"{error.strerror or error}{where}; check the path."


if __name__ == "__main__":
    sys.exit(main())
