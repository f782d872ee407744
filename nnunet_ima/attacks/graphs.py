"""CUDA graphs of what an attack asks of a network: one launch instead of some hundred.

With few samples left in an attack a GPU waits for Python more than it computes: on an H100 a forward and backward pass
of nnU-Net's 2D hippocampus network takes 8 ms for 32 patches and 15 ms for 366
(benchmarks/results/attack_passes_h100_first.json).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from nnunet_ima.errors import is_out_of_memory

Answer = tuple[Tensor, ...]
Question = Callable[..., Answer]

# Graphs of questions that are not asked any more (TE's loss changes with the epoch) must not pile up.
MOST_GRAPHS = 64
WARM_UP = 3


class CudaGraphs:
    """Captures each question once for each size, when it is asked for the first time, and replays it from then on.

    A graph holds on to the network's parameters where they lie in memory; what an optimiser does to them in place, a
    replay sees. If they are moved, everything is captured anew. What cannot be captured (it looks at a value) is
    answered without a graph from then on, and so is everything where the memory is not enough; :attr:`refused` says
    why.

    Args:
        most: the largest number of images in a pass.
        sizes: of how many sizes, evenly spaced up to ``most``, a pass may be; a pass is filled up to the next of them.
    """

    def __init__(self, most: int, sizes: int = 1) -> None:
        self.sizes = tuple(sorted({-(-most * i // sizes) for i in range(1, sizes + 1)}))
        self.refused: str | None = None
        self._not_these: set[Hashable] = set()
        self._memory_is_enough = True
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._where: tuple[int, ...] = ()
        self._first: _Graph | None = None

    def size_for(self, samples: int) -> int:
        """The smallest size that holds ``samples``, or the largest there is."""
        return next((size for size in self.sizes if size >= samples), self.sizes[-1])

    def ask(self, kind: Hashable, question: Question, network: nn.Module, inputs: Sequence[Tensor]) -> Answer:
        """What ``question(*inputs)`` returns: tensors of its own, not the graph's.

        Args:
            kind: tells questions apart: equal kinds must mean the same computation.
            question: must not look at a value of its inputs (no ``if``, no ``.item()``).
            network: whose parameters the question uses.
            inputs: CUDA tensors, always of the same shapes for the same kind and size.
        """
        if kind in self._not_these or not self._memory_is_enough:
            return question(*inputs)
        where = tuple(parameter.data_ptr() for parameter in network.parameters())
        if where != self._where:
            self._graphs.clear()
            self._first, self._where = None, where
        key = _key(kind, inputs)
        if key not in self._graphs:
            try:
                self._capture(kind, question, inputs)
            except RuntimeError as error:  # torch.OutOfMemoryError is one, too
                self.refused = " ".join(str(error).split())[:200] or type(error).__name__
                self._not_these.add(kind)
                if is_out_of_memory(error):
                    self._memory_is_enough, self._first = False, None
                    self._graphs.clear()
                    torch.cuda.empty_cache()
                return question(*inputs)
            self._graphs.move_to_end(key)
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key].replay(inputs)

    def _capture(self, kind: Hashable, question: Question, inputs: Sequence[Tensor]) -> None:
        """At all sizes, the largest first: blocks of the memory that graphs share do not grow, so small ones first
        would leave what no larger one can use. What a graph is captured on does not matter: zeros.
        """
        asked = len(inputs[0])
        for size in sorted({asked, *(self.sizes if asked in self.sizes else ())}, reverse=True):
            some = [one if size == asked else one.new_zeros((size, *one.shape[1:])) for one in inputs]
            key = _key(kind, some)
            if key not in self._graphs:
                self._graphs[key] = _Graph(question, some, self._first)
                self._first = self._first or self._graphs[key]


def _key(kind: Hashable, inputs: Sequence[Tensor]) -> Hashable:
    return kind, tuple((tuple(one.shape), one.dtype) for one in inputs)


class _Graph:
    """One captured question. The graphs share a pool: an answer is copied before the next replay overwrites it."""

    def __init__(self, question: Question, inputs: Sequence[Tensor], beside: _Graph | None) -> None:
        self._inputs = [one.clone() for one in inputs]
        # cuDNN chooses its kernels, and the allocator grows, before the capture: both are forbidden during it.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no annotations here
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                question(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        # Meanwhile nnU-Net's loader pins memory in a thread of its own, and NCCL watches in another.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._answer = question(*self._inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Answer:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(part.clone() for part in self._answer)
