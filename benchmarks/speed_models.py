"""What ``speed.py`` measures on: preprocessed data and a half-trained stock model, for 2D and 3D.

A folder of ``hippocampus_small.py`` serves as it is, for the small 2D network. Whatever it does not hold is made in a
folder of the benchmark's own: some cases of a task (or a phantom) planned, preprocessed, and trained for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from hippocampus_small import IMA_ALL, LENGTH, NETWORK, STD

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.demo import PHANTOM_ENHANCEMENT
from nnunet_ima.evaluation.environment import available_cores
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.evaluation.pipeline import Method, Pipeline, PlannedNetwork, SmallNetwork
from nnunet_ima.evaluation.subset import Subset, make_subset

Dimension = Literal["2d", "3d"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
CASES = 24
# Networks that a CPU can train, and on a GPU those that nnU-Net plans.
SMALL: dict[Dimension, SmallNetwork] = {
    "2d": NETWORK,
    "3d": SmallNetwork("3d_small", "3d_fullres", features=8, most_features=64, batch_size=2),
}
PLANNED: dict[Dimension, PlannedNetwork] = {"2d": PlannedNetwork("2d"), "3d": PlannedNetwork("3d_fullres")}
LENGTHS: dict[Dimension, dict[str, Any]] = {"2d": LENGTH, "3d": {**LENGTH, "num_epochs": 12}}


@dataclass(frozen=True)
class Ground:
    """Where to find data and model of one dimension.

    Attributes:
        pipeline: with nnU-Net's folders.
        dataset: the folder of preprocessed data.
        method: of the stock model, half-trained.
        hardened: of the model whose weights are taken instead; None for those of ``method``.
    """

    pipeline: Pipeline
    dataset: Path
    method: Method
    hardened: Method | None = None

    @property
    def configuration(self) -> str:
        """The one that the stock model was trained with."""
        return self.pipeline.configuration(self.method)

    @property
    def plans(self) -> Path:
        """The plans file that holds it."""
        return self.dataset / f"{self.pipeline.plans_name}.json"

    @property
    def checkpoint(self) -> Path:
        """Of the model whose weights are taken."""
        return self.pipeline.fold_folder(self.dataset, self.hardened or self.method) / "checkpoint_final.pth"

    def environment(self) -> dict[str, str]:
        """nnU-Net's, for a process that loads and augments by itself, so that nothing runs beside what is timed."""
        folders = {name: str(folder) for name, folder in self.pipeline.folders.items()}
        return {**folders, "nnUNet_n_proc_DA": "0", "nnUNet_compile": "1" if self.pipeline.compiled else "0"}


def find_ground(
    dimension: Dimension, models: Path | None, data: Path | None, work: Path, device: str, compiled: bool = False
) -> Ground:
    """Data and model of one dimension; made in ``work`` where ``models`` does not hold them.

    Args:
        dimension: 2D or 3D.
        models: a folder of ``hippocampus_small.py``, in which nothing is changed.
        data: a task folder of the Decathlon, of which some cases are taken; None for a phantom.
        work: where to make what is missing.
        device: on which to train; on a CPU the networks are small.
        compiled: whether nnU-Net may compile the network.

    Raises:
        UserError: ``models`` is no such folder, or a step failed.
    """
    if device == "cpu" and dimension == "2d" and models is not None:
        return _ready(models)
    network = SMALL[dimension] if device == "cpu" else PLANNED[dimension]
    folder, workers = work / f"{dimension}_{network.name}", workers_for(device)
    pipeline = Pipeline(folder, "nnUNetPlansSpeed", network, device, workers, compiled=compiled)
    task = data or make_phantom_task(work / "Task901_Phantom", CASES, enhancement=PHANTOM_ENHANCEMENT)
    dataset = pipeline.prepare(_some_cases(task, work))
    method = Method(f"stock {dimension}, half-trained", "nnUNetTrainerSTD", LENGTHS[dimension])
    pipeline.write_plans(dataset, [method])
    pipeline.train(dataset, method)
    return Ground(pipeline, dataset, method)


def workers_for(device: str) -> int:
    """Processes that augment: a GPU waits for the augmentation of nnU-Net's batches, and a core is left for it."""
    return max(1, available_cores() - 1) if device == "cuda" else 1


def _ready(models: Path) -> Ground:
    datasets = sorted((models / "nnUNet_preprocessed").glob("Dataset004_*"))
    if not datasets:
        raise UserError(f"{models} holds no preprocessed data; give a folder in which hippocampus_small.py has run.")
    ground = Ground(Pipeline(models, "nnUNetPlansSmall", NETWORK, "cpu", make_folders=False), datasets[0], STD)
    if not ground.checkpoint.is_file():
        raise UserError(f"{ground.checkpoint} is missing; let hippocampus_small.py train its stock model first.")
    return ground


def hardened(ground: Ground) -> Ground | None:
    """The same with the weights of the model that ``hippocampus_small.py`` hardened; None where that is not there."""
    found = replace(ground, hardened=IMA_ALL)
    return found if ground.method is STD and found.checkpoint.is_file() else None


def _some_cases(task: Path, work: Path) -> Path:
    """The task, or a copy of some of its cases."""
    if len(list((task / "labelsTr").glob("[!.]*"))) <= CASES:
        return task
    subset = work / "subset" / task.resolve().name
    return subset if subset.exists() else make_subset(task, subset, Subset(CASES))
