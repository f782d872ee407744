"""What each of two processes does in the test of DDP: the methods' steps and epoch ends, with gloo on the CPU."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def work(rank: int, folder: str, project: Any, jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Train each of ``jobs`` (method, weights, settings) for the steps whose batches lie in ``folder``.

    nnU-Net itself runs DDP on GPUs alone, so a trainer is made first, and told of its rank then.
    """
    import nnunet_project
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_ima.evaluation.environment import our_trainers_too

    torch.set_num_threads(1)
    os.environ["nnUNet_results"] = str(Path(folder) / f"rank_{rank}")
    with project.in_force(), nnunet_project.quiet():
        os.environ["nnUNet_results"] = str(Path(folder) / f"rank_{rank}")
        trainers = []
        for name, weights, settings in jobs:
            with our_trainers_too():
                kind = recursive_find_trainer_class_by_name(name)
            trainer = nnunet_project.make_trainer(project, kind, "2d_tiny", **settings)
            trainer.initialize()
            trainer.network.load_state_dict(nnunet_project.weights_of(Path(weights)))
            trainer.on_train_start()
            trainers.append(trainer)
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=3))
        for trainer in trainers:
            _train(trainer, rank, Path(folder))
        dist.destroy_process_group()


def _train(trainer: Any, rank: int, folder: Path) -> None:
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer.loss = trainer._build_loss()
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.network.train()
    batches = torch.load(folder / f"batches_{rank}.pt", weights_only=False)
    outputs = []
    for batch in batches:
        trainer.generator.manual_seed(7)
        outputs.append(trainer.train_step(batch))
    trainer.on_train_epoch_end(outputs)
    checkpoint = folder / f"{type(trainer).__name__}_checkpoint_{rank}.pth"
    trainer.save_checkpoint(str(checkpoint))
    found = {
        "weights": trainer.network.module.state_dict(),
        "state": trainer.method_state(),
        "log": {k: v[-1] for k, v in trainer.logger.local_logger.my_fantastic_logging.items() if v},
    }
    torch.save(found, folder / f"{type(trainer).__name__}_{rank}.pt")


def measure(rank: int, folder: str, project: Any, error: Exception) -> None:
    """Begin an epoch on each rank, where measuring the strength of attacks fails on the second one.

    How each ended is written to ``folder``.
    """
    import nnunet_project

    from nnunet_ima import trainers
    from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT

    def strength(*_: object) -> float:
        if rank == 1:
            raise error
        return 1.0

    torch.set_num_threads(1)
    trainers.nnUNetTrainerAdversarial.faster_autocast = lambda _: partial(torch.autocast, "cpu", dtype=torch.float16)
    trainers.nnUNetTrainerAdversarial.attack_strength = strength
    with project.in_force(), nnunet_project.quiet():
        os.environ["nnUNet_results"] = str(Path(folder) / f"rank_{rank}")
        trainer = nnunet_project.make_trainer(project, nnUNetTrainerSAT, "2d_tiny", robust_patches=2)
        trainer.initialize()
        trainer.on_train_start()
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=3))
        trainer.is_ddp, trainer.local_rank = True, rank
        trainer.network = DistributedDataParallel(trainer.network)
        # Both have their group by now, so that only what is measured can be waited for.
        trainer.from_all_ranks(rank)
        try:
            trainer.on_train_epoch_start()
            ended = "it went on"
        except BaseException as caught:
            ended = f"{type(caught).__name__}: {caught}"
        (Path(folder) / f"ended_{rank}").write_text(ended)
        # Without a word to the other one, as a process that dies does.
        os._exit(0)
