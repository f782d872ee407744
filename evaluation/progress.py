"""How far an evaluation is, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from tqdm import tqdm

from nnunet_ima.attacks.oracle import Watch


class Progress:
    """A bar that moves with each pass of an attack, not only when samples are done.

    It runs up to the passes that all attacks take at the most. A sample from which nothing more can be gained counts as
    all of its passes once it is done: it can only be earlier than the bar says.

    Args:
        work: passes of all samples and cases, at the most.
        done: of these, what an earlier call did.
        shown: whether there is a bar at all.
    """

    def __init__(self, work: int, done: int, shown: bool) -> None:
        self._done = done
        # The mean of the whole run tells the time left: that of the last moments jumps with every sample that is done.
        self._bar = tqdm(
            total=work, initial=done, disable=not shown, dynamic_ncols=True, smoothing=0, miniters=1,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()

    def tell(self, condition: str, what: str) -> None:
        """Show what is being done."""
        self._bar.set_description_str(condition, refresh=False)
        self._bar.set_postfix_str(what)

    @contextmanager
    def doing(self, count: int, passes: int, weight: int = 1) -> Iterator[Watch]:
        """Give what is to watch an attack on ``count`` samples; if it fails, the bar goes back to where it was.

        Args:
            count: samples of a batch, or one case.
            passes: of each, at the most; what an attack takes beyond does not move the bar.
            weight: by which each pass counts more than one of a sample.
        """
        before = self._done

        def watch(spent: Tensor) -> None:
            self._go_to(before + weight * int(spent.clamp(max=passes).sum()))

        try:
            yield watch
        except BaseException:
            self._go_to(before)
            raise
        self._go_to(before + weight * count * passes)

    def _go_to(self, passes: int) -> None:
        self._bar.update(passes - self._done)
        self._done = passes
