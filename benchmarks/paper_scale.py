"""The paper's study at its own scale: stock, SAT, TE, TRADES and IMA, trained alike, attacked in both protocols.

    python benchmarks/paper_scale.py --data <Task04_Hippocampus> -o work -device cuda
    python benchmarks/paper_scale.py --data <Task04_Hippocampus> -o work --scale small

``--scale paper``: nnU-Net's own 2D plan (hippocampus: batch 366, patch 56 x 40), 50 epochs of 50 iterations.
``--scale small``: networks of 16 to 128 features, batch 32, for two CPU cores, three repetitions.
``--scale glance``: the same path in a minute, to see that it runs; its figures mean nothing.

All trainings come first, then one evaluation of all models after the other, the costliest last. Started again it goes
on: trainings from their last checkpoint, evaluations from their records. ``--minutes 8`` stops in time on a machine
that is only lent for so long; ``--state FOLDER`` then keeps all that is needed to go on elsewhere in a few files of at
most 15 MiB (weights in half precision, margins, records), every two minutes, and takes it up at the next start; give
the same ``-o`` everywhere. The weights of a finished training are then rounded before anything is measured, so that all
figures are of the same model. ``--jobs`` trains and attacks several models at once, as a GPU waits for one of them half
of the time.

Results go to ``results`` in the work folder. Once the whole study of a scale is complete they go beside this program,
too, or at any time to the folder that ``--results`` names.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from study_machines import NotedStudy
from study_results import collect, most_samples, table
from study_state import pack, round_before_evaluations, unpack

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.command_line import positive
from nnunet_ima.evaluation.ending import Terminated, ended_in_order
from nnunet_ima.evaluation.environment import available_cores
from nnunet_ima.evaluation.pipeline import Attacks, Method, PlannedNetwork, SmallNetwork
from nnunet_ima.evaluation.study import Job, Study, run_jobs
from nnunet_ima.files import write_text

RESULTS = Path(__file__).parent / "results"
METHODS = ("STD", "IMA", "SAT", "TRADES", "TE")
# Methods once more with other settings, for those who ask.
# IMA with its attacks in single precision throughout: does the faster precision change what is trained?
SINGLE: Mapping[str, Mapping[str, Any]] = {"IMA-single": {"attack_precision": "single"}}
# IMA as the final paper prints it: without noise at the start of GenAdv; with Algorithm 3, which it has for trainings
# with augmentation.
AS_PRINTED: Mapping[str, Mapping[str, Any]] = {
    "IMA-no-noise": {"random_start": False},
    "IMA-origin": {"boundary_search": "origin"},
}
ANYWHERE = {**SINGLE, **AS_PRINTED}
# SAT and TE with the papers' ε and weight: do they need those of the small scale?
AS_PUBLISHED: Mapping[str, Mapping[str, Any]] = {"SAT-eps15": {"epsilon": 15.0}, "TE-weight300": {"te_weight": 300.0}}
VARIANTS = (*ANYWHERE, *AS_PUBLISHED)
FAST, STANDARD = "autoattack:version=fast", "autoattack:version=standard"


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        network: nnU-Net's plan, or a small one.
        settings: of all trainings.
        own: settings of single methods.
        samples: validation slices that are attacked; None for all with foreground.
        other_samples: for Linf and the protocol paper; None for as many.
        repetitions: trainings of each method; nnU-Net's trainings are not seeded, so each is another draw.
        paper_linf: Linf levels of the protocol paper; none, and no such evaluation, unless given.
        standard: L2 levels of the protocol sound, at which the standard AutoAttack is run, too.
        variants: ``<method>-<what differs>``, which may be asked for, and the settings that differ from the method's.
    """

    network: PlannedNetwork | SmallNetwork
    settings: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    samples: int | None
    repetitions: int
    other_samples: int | None = None
    paper_linf: Sequence[str] = ()
    standard: Sequence[str] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: ANYWHERE)


# Of every epoch: a stop loses what came after the last checkpoint, and five epochs may be longer than a spell.
CHECKPOINTS = {"save_every": 1}
# Validation batches give nnU-Net's pseudo Dice and change no weight; the paper does not say how many there were.
PAPER = Scale(
    PlannedNetwork("2d"),
    {"num_epochs": 50, "num_iterations_per_epoch": 50, "num_val_iterations_per_epoch": 5, **CHECKPOINTS},
    {"IMA": {"robust_every": 10}, **{name: {"robust_every": 10} for name in ("SAT", "TE", "TRADES")}},
    None,
    1,
    # Those of Table 3: the first three are AutoAttack's, the last three white noise's.
    paper_linf=("2/255", "4/255", "8/255", "16/255", "32/255"),
    # What the study is judged by.
    standard=("5", "10", "15"),
)
SMALL = Scale(
    SmallNetwork("2d_small", features=16, most_features=128, batch_size=32),
    # 500 steps at nnU-Net's rate of 0.01 do not learn the task at all.
    {
        "num_epochs": 22,
        "num_iterations_per_epoch": 50,
        "num_val_iterations_per_epoch": 5,
        "initial_lr": 0.1,
        **CHECKPOINTS,
    },
    # At ε 15 so small a network learns nothing from SAT in so few steps, and TE's pull at the paper's weight of 300
    # keeps it from its task; the variants show it. IMA's ε is only the largest that a margin may become.
    {
        "IMA": {"steps": 10},
        "SAT": {"steps": 5, "epsilon": 5.0},
        "TE": {"steps": 5, "epsilon": 5.0, "te_weight": 30.0},
        "TRADES": {"epsilon": 5.0},
    },
    200,
    3,
    other_samples=100,
    variants={**ANYWHERE, **AS_PUBLISHED},
)
GLANCE = Scale(
    SmallNetwork("2d_glance", features=4, most_features=16, batch_size=8),
    {
        "num_epochs": 2,
        "num_iterations_per_epoch": 4,
        "num_val_iterations_per_epoch": 1,
        "initial_lr": 0.1,
        "steps": 2,
        **CHECKPOINTS,
    },
    {},
    4,
    1,
)
SCALES = {"paper": PAPER, "small": SMALL, "glance": GLANCE}


def main() -> None:
    """Do whatever is not done yet, then write the results."""
    try:
        with ended_in_order():
            failed = run(_options())
    except UserError as error:
        raise SystemExit(str(error)) from None
    except Terminated as error:
        raise SystemExit(error.status) from None
    if failed:
        raise SystemExit("\n".join(failed))


def run(options: argparse.Namespace) -> list[str]:
    """Returns a sentence for each thing that failed.

    Raises:
        UserError: nothing could be begun.
    """
    scale = SCALES[options.scale]
    study = make_study(options, scale)
    stop = threading.Timer(60 * options.minutes, study.stop) if options.minutes else None
    if stop is not None:
        stop.daemon = True
        stop.start()
    failed: list[str] = []
    # A state that was not taken up yet must not be overwritten.
    taken_up = False
    try:
        dataset = study.prepare(options.data)
        if options.state is not None:
            # Not before: nnU-Net refuses to convert a task of which there are results.
            unpack(options.state, options.output)
        taken_up = True
        with packed_meanwhile(options.output, options.state):
            failed += failures(study.rounds(dataset), options.jobs, study)
    finally:
        if stop is not None:
            stop.cancel()
        if options.state is not None and taken_up:
            failed += _refusals_of(lambda: pack(options.output, options.state))
    failed += _refusals_of(lambda: sys.stdout.write(write(study, options, scale, complete_if_there=not failed)))
    if study.stopped:
        sys.stdout.write(f"\nStopped after {options.minutes:g} minutes; start it again to go on.\n")
    return failed


@contextmanager
def packed_meanwhile(work: Path, state: Path | None, seconds: float = 120.0) -> Iterator[None]:
    """Carry what there is all along, too: a lent machine may be taken back before this program can end."""
    ended = threading.Event()

    def keep_packing(state: Path) -> None:
        while not ended.wait(seconds):
            # What cannot be read now is told at the end, unless it can be by then.
            with suppress(UserError, OSError):
                pack(work, state)

    if state is None:
        yield
        return
    packing = threading.Thread(target=keep_packing, args=(state,), daemon=True)
    packing.start()
    try:
        yield
    finally:
        ended.set()
        packing.join()


def failures(jobs: Iterable[Job], at_once: int, study: Study) -> list[str]:
    """Run jobs, so many at once; says of each that failed why, but not of those that the study's stop ended.

    Args:
        jobs: of the study.
        at_once: how many.
        study: may be stopped meanwhile.
    """
    ended: set[str] = set()

    def watched(title: str, job: Callable[[], None]) -> Callable[[], None]:
        def run_it() -> None:
            try:
                job()
            except UserError:
                # What failed before the stop failed by itself; and so does what is no sentence of ours.
                if study.stopped:
                    ended.add(title)
                raise

        return run_it

    found = run_jobs([(title, watched(title, job)) for title, job in jobs], at_once, study.stop)
    return [f"{title}: {error}" for title, error in found if title not in ended]


def _refusals_of(call: Callable[[], object]) -> list[str]:
    try:
        call()
    except UserError as error:
        return [str(error)]
    return []


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # the text above is laid out by hand
    parser.add_argument("--data", type=Path, required=True, help="a task folder of the Decathlon")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/paper_scale"), help="where to work")
    parser.add_argument("--scale", choices=list(SCALES), default="paper")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *VARIANTS), default=list(METHODS))
    parser.add_argument("--levels", nargs="+", default=["5", "10", "15"], help="L2, of the protocol sound")
    parser.add_argument("--linf", nargs="*", default=["2/255", "4/255", "8/255"], help="Linf, of the protocol sound")
    parser.add_argument("--paper-levels", nargs="*", default=["5", "15", "25"], help="L2, of the protocol paper")
    parser.add_argument("--paper-linf", nargs="*", help="Linf, of the protocol paper; Table 3's at the paper's scale")
    parser.add_argument("--attack", default=FAST, help=f"for instance {STANDARD}")
    parser.add_argument("--standard", nargs="*", help=f"L2 levels of {STANDARD}, sound; 5 10 15 at the paper's scale")
    parser.add_argument(
        "--samples", type=positive, help="validation slices that are attacked; unless given, the scale's"
    )
    parser.add_argument("--other-samples", type=positive, help="for Linf and the protocol paper")
    parser.add_argument("--repetitions", type=positive, help="the last repetition: so many trainings of each method")
    parser.add_argument(
        "--from-repetition",
        type=positive,
        default=1,
        help="the first that is trained here, in a work folder and a state of its own; study_join.py joins the parts",
    )
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--state", type=Path, help="folder for what is needed to go on elsewhere")
    parser.add_argument("--jobs", type=positive, default=1, help="models at work at once")
    parser.add_argument(
        "--workers",
        type=positive,
        help="processes that augment, for each training; unless given, 1, and on CUDA all cores",
    )
    parser.add_argument("--compile", action="store_true", help="let nnU-Net compile the network")
    parser.add_argument("--results", type=Path, help="where the JSON and the table go in any case")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu")
    options = parser.parse_args(arguments)
    last = options.repetitions or SCALES[options.scale].repetitions
    options.methods = list(dict.fromkeys(options.methods))
    for name in set(options.methods) & set(VARIANTS) - set(SCALES[options.scale].variants):
        same = _method_of(name)
        parser.error(f"--methods {name}: at the scale {options.scale} that is {same} as it is; leave it out.")
    if options.minutes is not None and options.minutes <= 0:
        parser.error("--minutes must be more than 0.")
    if options.from_repetition > last:
        parser.error(f"--from-repetition {options.from_repetition} is none of the repetitions 1 to {last}.")
    if options.workers is None:
        # A GPU waits for the augmentation of nnU-Net's batches of 366; a core is left for each training itself.
        shared = (available_cores() - options.jobs) // options.jobs
        options.workers = max(1, shared) if options.device == "cuda" else 1
    if options.paper_linf is None:
        options.paper_linf = list(SCALES[options.scale].paper_linf)
    if options.standard is None:
        options.standard = list(SCALES[options.scale].standard)
    return options


def make_study(options: argparse.Namespace, scale: Scale) -> Study:
    """What the options ask for."""
    return NotedStudy(
        options.output,
        f"nnUNetPlans_{options.scale}",
        scale.network,
        [method for method, _ in methods(options, scale)],
        evaluations(options, scale),
        options.device,
        options.workers,
        options.compile,
        before_evaluations=None if options.state is None else round_before_evaluations,
        jobs=options.jobs,
    )


def methods(options: argparse.Namespace, scale: Scale) -> Iterator[tuple[Method, int]]:
    """Each method as often as it is trained, and the number of the repetition."""
    for repetition in range(options.from_repetition - 1, options.repetitions or scale.repetitions):
        for name in options.methods:
            method, differs = _method_of(name), scale.variants.get(name, {})
            settings = {**scale.settings, **scale.own.get(method, {}), **differs}
            if name == "TRADES":
                settings.pop("steps", None)
            variant = name.removeprefix(method).replace("-", "_") + (f"_r{repetition}" if repetition else "")
            yield Method(name, f"nnUNetTrainer{method}", settings, variant=variant), repetition


def _method_of(name: str) -> str:
    return name.partition("-")[0]


def evaluations(options: argparse.Namespace, scale: Scale) -> list[Attacks]:
    """What each model goes through."""

    def slices(number: int | None) -> list[str]:
        return ["--no-cases", *(("--max-samples", str(number)) if number else ())]

    samples = options.samples or scale.samples
    further, others = slices(samples), slices(options.other_samples or scale.other_samples or samples)
    attacks = ("white-noise", options.attack)
    found = [Attacks("sound_l2", options.levels, attacks, further=further)]
    if options.linf:
        found.append(Attacks("sound_linf", options.linf, attacks, norm="linf", further=others))
    if options.paper_levels:
        found.append(Attacks("paper_l2", options.paper_levels, attacks, protocol="paper", further=others))
    if options.paper_linf:
        found.append(Attacks("paper_linf", options.paper_linf, attacks, norm="linf", protocol="paper", further=others))
    if options.standard:
        found.append(Attacks("sound-standard_l2", options.standard, (STANDARD,), further=further))
    return found


def write(study: Study, options: argparse.Namespace, scale: Scale, complete_if_there: bool = True) -> str:
    """JSON, table and report of what there is; returns the table.

    Args:
        study: whose.
        options: of the command.
        scale: of the study.
        complete_if_there: False if something failed.
    """
    found = sorted(study.pipeline().folders["nnUNet_preprocessed"].glob("Dataset*"))
    if not found:
        return "Nothing was prepared yet.\n"
    result = {
        "scale": options.scale,
        "dataset": found[0].name.partition("_")[2],
        "network": asdict(scale.network),
        "parts": [{"command": _command(options), "date": time.strftime("%Y-%m-%d")}],
        "rows": collect(study, found[0], list(methods(options, scale))),
    }
    text = table(result)
    places = [options.output / "results"]
    if options.results is not None:
        places.append(options.results)
    elif complete_if_there and is_the_study(options, scale) and is_complete(result["rows"]):
        places.append(RESULTS)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / f"paper_scale_{options.scale}.json", json.dumps(result, indent=1) + "\n")
        write_text(place / f"paper_scale_{options.scale}.md", text)
    # One page for the first repetition of all methods that is trained here.
    first = [method for method, repetition in methods(options, scale) if repetition == options.from_repetition - 1]
    for attacks in study.evaluations:
        study.report([attacks], study.output / f"{attacks.name}_report", first)
    return f"{text}\nIn {', '.join(map(str, places))}.\n"


def is_the_study(options: argparse.Namespace, scale: Scale) -> bool:
    """Whether the options ask for all methods, trainings, attacks, levels and samples that the scale has, at least."""
    asked = {one.name: one for one in evaluations(options, scale)}
    whole = evaluations(_options(["--data", "none", "--scale", options.scale]), scale)
    return (
        scale is not GLANCE
        and set(METHODS) <= set(options.methods)
        and options.from_repetition == 1
        and (options.repetitions or scale.repetitions) >= scale.repetitions
        and all(one.name in asked and _covers(asked[one.name], one) for one in whole)
    )


def _covers(asked: Attacks, wanted: Attacks) -> bool:
    """Whether an evaluation is of the same attacks, and of all levels and samples that are wanted."""
    samples, least = most_samples(asked), most_samples(wanted)
    enough = samples is None or (least is not None and samples >= least)
    return enough and list(asked.attacks) == list(wanted.attacks) and set(wanted.levels) <= set(asked.levels)


def is_complete(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every model was trained, and went through every evaluation."""
    return all(row["training"] and all(row["evaluations"].values()) for row in rows)


def _command(options: argparse.Namespace) -> str:
    """Without the folders of this machine."""
    shown = ["benchmarks/paper_scale.py", "--data", options.data.resolve().name, "--scale", options.scale]
    shown += ["--methods", *options.methods, "--attack", options.attack, "-device", options.device]
    for name in ("levels", "linf", "paper_levels", "paper_linf"):
        shown += [f"--{name.replace('_', '-')}", *getattr(options, name)]
    for name in ("samples", "other_samples", "repetitions", "from_repetition", "jobs", "workers"):
        if getattr(options, name) and (name != "from_repetition" or options.from_repetition > 1):
            shown += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.standard != list(SCALES[options.scale].standard) or options.standard:
        shown += ["--standard", *options.standard]
    if options.compile:
        shown.append("--compile")
    if options.state is not None:
        # Weights are then rounded before they are attacked.
        shown += ["--state", "STATE"]
    return "python " + shlex.join(shown)


if __name__ == "__main__":
    main()
