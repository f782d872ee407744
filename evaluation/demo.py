"""``make demo``: a fragile model and a hardened one, from data to a page that compares them."""

from __future__ import annotations

from pathlib import Path

from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, SmallNetwork
from nnunet_ima.evaluation.report import write_report

# Nine of them are for validation: with six no comparison has a p below 0.03, and one case against it decides.
PHANTOM_CASES = 45
# Without it a network needs longer to learn the phantom than a demonstration should take.
PHANTOM_ENHANCEMENT = 1.0

NETWORK = SmallNetwork("2d_demo", features=8, most_features=64, batch_size=16)

# Short enough for two cores, long enough to learn the phantom: the longer a stock network trains, the more fragile it
# becomes. The hardened model starts from the stock one's weights.
STOCK = Method(
    "Stock nnU-Net",
    "nnUNetTrainerSTD",
    {"num_epochs": 12, "num_iterations_per_epoch": 60, "num_val_iterations_per_epoch": 2, "initial_lr": 0.1},
)
HARDENED = Method(
    "nnU-Net hardened with IMA",
    "nnUNetTrainerIMA",
    {
        "num_epochs": 13,
        "num_iterations_per_epoch": 36,
        "num_val_iterations_per_epoch": 2,
        "initial_lr": 0.1,
        # Few, but then more steps of training fit into the time.
        "steps": 4,
        "bisections": 4,
        "epsilon": 20.0,
        "delta_epsilon": 5.0,
    },
    start=STOCK,
)
# Not the loss of the training alone: the stock model looks much less fragile under that than it is. Slices of all
# cases, so no case level.
ATTACKS = Attacks(
    "evaluate",
    ("2.5", "5", "10"),
    ("white-noise:draws=3", "autoattack:version=fast"),
    further=("--max-samples", "40", "--no-cases"),
)


def run_demo(output: Path, data: Path | None, device: str) -> Path:
    """Make or take data, plan, train two models, attack both, write a page; a step that is done is not done again.

    Args:
        output: where everything goes.
        data: a task folder of the Decathlon, None for a phantom.
        device: for training and attack.

    Returns:
        The page, ``report.html``.

    Raises:
        UserError: the data is no task folder, or a step failed; its log is named.
    """
    pipeline = Pipeline(output, "nnUNetPlansDemo", NETWORK, device)
    _say(1, "Making a phantom dataset" if data is None else f"Taking {data}")
    task = data or make_phantom_task(
        pipeline.output / "data" / "Task901_Phantom", PHANTOM_CASES, enhancement=PHANTOM_ENHANCEMENT
    )
    _say(2, "nnU-Net plans and preprocesses")
    dataset = pipeline.prepare(task)
    pipeline.write_plans(dataset, (STOCK, HARDENED))
    runs = []
    for number, method in enumerate((STOCK, HARDENED), start=3):
        _say(number, f"{method.title}: train, then attack")
        pipeline.train(dataset, method)
        runs.append(pipeline.evaluate(dataset, method, ATTACKS))
    _say(5, "Writing the page")
    made_up = "The scans are a made-up, MRI-like phantom. " if data is None else ""
    caveat = (
        f"{made_up}Both models are small and were trained for minutes: this shows that the machinery works, not what a "
    )
    caveat += "real model reaches."
    return write_report(runs, pipeline.output, [STOCK.title, HARDENED.title], caveat=caveat)


def _say(step: int, what: str) -> None:
    print(f"[{step}/5] {what}", flush=True)
