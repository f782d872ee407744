"""Several models of one task, trained alike and attacked alike: resumable, several at once, stopped in time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.locks import alone
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, PlannedNetwork, SmallNetwork
from nnunet_ima.evaluation.report import write_report
from nnunet_ima.evaluation.steps import Steps

LOCK = "lock"

Job = tuple[str, Callable[[], None]]
"""Its name, and what it does."""


class Study:
    """All trainings and evaluations of a task, each model in logs of its own so that several can run at once.

    Args:
        output: where everything goes.
        plans_name: of the plans file with the models' configurations.
        network: of all models.
        methods: what is trained.
        evaluations: what each model goes through.
        device: for training and attack.
        workers: processes that augment, for each training.
        compiled: whether nnU-Net may compile the network.
        make_folders: see :class:`~nnunet_ima.evaluation.pipeline.Pipeline`.
        before_evaluations: called for each trained model, with nnU-Net's folder of its fold and the folders of its
            results, before it is evaluated.
    """

    def __init__(
        self,
        output: Path,
        plans_name: str,
        network: PlannedNetwork | SmallNetwork,
        methods: Sequence[Method],
        evaluations: Sequence[Attacks],
        device: str,
        workers: int = 1,
        compiled: bool = False,
        make_folders: bool = True,
        before_evaluations: Callable[[Path, Sequence[Path]], None] | None = None,
    ) -> None:
        self._before_evaluations = before_evaluations
        self.output, self.methods, self.evaluations = output, list(methods), list(evaluations)
        self.stopped = False
        self._running: list[Steps] = []
        self._make = partial(
            Pipeline, output, plans_name, network, device, workers, compiled=compiled, make_folders=make_folders
        )

    def prepare(self, task: Path) -> Path:
        """Convert, plan, preprocess; write the plans of all methods. Returns the folder of preprocessed data."""
        pipeline = self.pipeline()
        dataset = pipeline.prepare(task)
        pipeline.write_plans(dataset, self.methods)
        return dataset

    def jobs(
        self, dataset: Path, train: bool = True, attack: bool = True, among: Sequence[Method] | None = None
    ) -> Iterator[Job]:
        """One a model, which trains and then attacks it.

        Args:
            dataset: the folder of preprocessed data.
            train, attack: leave one of the two out.
            among: these methods only.
        """
        for method in self.methods if among is None else among:
            evaluations = self.evaluations if attack else []
            yield f"{method.title}{method.variant}", partial(self._run, dataset, method, train, evaluations)

    def rounds(self, dataset: Path) -> Iterator[Job]:
        """The same work in another order: all trainings, then one evaluation of all models after the other.

        Where the time does not suffice for everything, what there is can be compared. Several may be run at once, in
        this order: an evaluation waits for its model, and one whose training failed, or was stopped, is left out.

        Args:
            dataset: the folder of preprocessed data.
        """
        turns = [(method, _Turn()) for method in self.methods]
        for method, turn in turns:
            yield f"{method.title}{method.variant}", partial(turn.first, partial(self._run, dataset, method, True, []))
        for attacks in self.evaluations:
            for method, turn in turns:
                attack = partial(self._run, dataset, method, False, [attacks])
                yield f"{method.title}{method.variant}, {attacks.name}", partial(turn.further, attack)

    def _run(self, dataset: Path, method: Method, train: bool, evaluations: Sequence[Attacks]) -> None:
        pipeline = self.pipeline(method)
        pipeline.logs.mkdir(parents=True, exist_ok=True)
        if train:
            self._unless_stopped()
            pipeline.train(dataset, method)
        if evaluations and self._before_evaluations is not None:
            results = [pipeline.results(method, attacks) for attacks in self.evaluations]
            self._before_evaluations(pipeline.fold_folder(dataset, method), results)
        for attacks in evaluations:
            self._unless_stopped()
            pipeline.evaluate(dataset, method, attacks)

    def _unless_stopped(self) -> None:
        if self.stopped:
            raise UserError("the time is up")

    def pipeline(self, method: Method | None = None) -> Pipeline:
        """The steps of a method; without one, those that all methods share."""
        logs = "logs" if method is None else f"logs_{method.trainer}{method.variant}"
        pipeline = self._make(logs=logs)
        self._running.append(pipeline.steps)
        return pipeline

    def stop(self) -> None:
        """End what runs; each of these commands goes on from its last checkpoint or record."""
        self.stopped = True
        for steps in self._running:
            steps.stop()

    def report(
        self,
        evaluations: Sequence[Attacks],
        output: Path,
        methods: Sequence[Method] | None = None,
        note: str = "",
        left_out: Collection[Path] = (),
    ) -> Path | None:
        """One page for what is finished of some evaluations; None if nothing is.

        Args:
            evaluations: which of them.
            output: where the page goes.
            methods: of these only.
            note: shown after what the figures say.
            left_out: folders of results that are not to be shown.
        """
        pipeline = self.pipeline()
        runs = [
            (method.title, pipeline.results(method, attacks))
            for attacks in evaluations
            for method in (self.methods if methods is None else methods)
            if pipeline.results(method, attacks) not in left_out
        ]
        done = [(title, run) for title, run in runs if (run / "summary.json").is_file()]
        return write_report([run for _, run in done], output, [title for title, _ in done], note) if done else None


class _Turn:
    """Of one model: its training first, then one evaluation at a time, as they share their logs."""

    def __init__(self) -> None:
        self._ended, self._went_well, self._lock = threading.Event(), False, threading.Lock()

    def first(self, train: Callable[[], None]) -> None:
        try:
            train()
            self._went_well = True
        finally:
            self._ended.set()

    def further(self, attack: Callable[[], None]) -> None:
        self._ended.wait()
        if self._went_well:
            with self._lock:
                attack()


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process; another one that asks for it is refused.

    Args:
        folder: in which the lock lies; it is made.
        what: for the message.

    Raises:
        UserError: somebody else holds it.
    """
    refusal = f"Another study is at work on {what}; wait until it has ended, or give another output folder"
    with alone(folder / LOCK, refusal):
        yield


def run_jobs(jobs: Iterable[Job], at_once: int, stop: Callable[[], None]) -> list[tuple[str, BaseException]]:
    """Run jobs, so many at once; returns those that failed, and why.

    Args:
        jobs: what to do.
        at_once: how many.
        stop: ends what runs, when this process is interrupted.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures: dict[Future[None], str] = {pool.submit(run): title for title, run in jobs}
        try:
            errors = [(title, future.exception()) for future, title in futures.items()]
        except BaseException:
            for future in futures:
                future.cancel()
            stop()
            raise
    return [(title, error) for title, error in errors if error is not None]
