"""Attack passes as CUDA graphs give the answers that they give without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import tiny_network
from torch import Tensor

from nnunet_ima.attacks import APGD, BPGD, FAB, PGD, SPSA, AutoAttack, Square, TargetedAPGD, WhiteNoise, graphs
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import BestSoFar, Oracle, undisturbed
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.losses import SegmentationLoss
from nnunet_ima.threat import ThreatModel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


class Replayed:
    """What stands in for a graph where there is no GPU: the question, about buffers that are filled before."""

    captured = 0

    def __init__(self, question: graphs.Question, inputs: Sequence[Tensor], beside: object) -> None:
        del beside
        self._question, self._inputs = question, [one.clone() for one in inputs]
        type(self).captured += 1

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for mine, given_one in zip(self._inputs, inputs, strict=True):
            mine.copy_(given_one)
        return self._question(*self._inputs)


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr(graphs, "_Graph", Replayed)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    Replayed.captured = 0


def make(device: str, samples: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    network = tiny_network(2, 1, 3, seed).to(device)
    images = torch.randn((samples, 1, 8, 8), generator=generator).to(device)
    targets = torch.randint(0, 3, (samples, 1, 8, 8), generator=generator).float().to(device)
    return network, images, targets


def answers(network, images, targets, index, graph: CudaGraphs | None):
    with undisturbed(network):
        best = BestSoFar(images)
        oracle = Oracle(network, targets, SegmentationLoss(), DiceCriterion(), best=best, graphs=graph, checked=True)
        ascent = oracle.ascent(images[index], index)
        score = oracle.score(images[index] - 1, index)
        dice = oracle.dice(images[index] + 1, index)
    return [*ascent, *score, dice, best.dice, best.images, oracle.forward_passes, oracle.backward_passes]


def same(some, others, tolerance: float = 1e-6) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@given(st.data())
def test_any_samples_get_the_same_answers(data):
    """Whatever is attacked of a batch, and in however many sizes passes are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_Graph", Replayed)
        samples = data.draw(st.integers(1, 9))
        chosen = data.draw(st.lists(st.integers(0, samples - 1), unique=True, min_size=1))
        most, sizes = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
        network, images, targets = make("cpu", samples)
        index = torch.tensor(chosen)
        graph = CudaGraphs(most, sizes)
        plain = answers(network, images, targets, index, None)
        same(answers(network, images, targets, index, graph), plain)
        # Again: by replay.
        same(answers(network, images, targets, index, graph), plain)


@given(st.integers(1, 500), st.integers(1, 20), st.data())
def test_a_pass_is_filled_up_to_the_next_size(most, sizes, data):
    graph = CudaGraphs(most, sizes)
    samples = data.draw(st.integers(1, most))
    size = graph.size_for(samples)
    assert samples <= size <= most
    assert size - samples < -(-most // sizes) + 1
    assert graph.size_for(most + 1) == most


def test_a_question_is_captured_once_for_each_size(replayed):
    network, images, targets = make("cpu", 8)
    graph = CudaGraphs(8, 4)  # 2, 4, 6, 8
    for samples in (8, 7, 6, 5, 3, 1, 8, 2):
        answers(network, images, targets, torch.arange(samples), graph)
    assert Replayed.captured == 3 * 4  # ascents, scores and Dice, at four sizes


@pytest.mark.parametrize("first", [1, 5, 12])
def test_all_sizes_of_a_question_are_captured_at_once_the_largest_first(replayed, monkeypatch, first):
    """Smaller ones then find room in the memory that these took; the other way round nothing larger would."""
    captured: list[tuple[int, bool]] = []

    class Noting(Replayed):
        def __init__(self, question: graphs.Question, inputs: Sequence[Tensor], beside: object) -> None:
            assert len({len(one) for one in inputs}) == 1
            captured.append((len(inputs[0]), beside is not None))
            super().__init__(question, inputs, beside)

    monkeypatch.setattr(graphs, "_Graph", Noting)
    network, images, targets = make("cpu", 12)
    graph, index = CudaGraphs(12, 4), torch.arange(first)
    same(answers(network, images, targets, index, graph), answers(network, images, targets, index, None))
    sizes = [size for size, _ in captured]
    assert sizes == [12, 9, 6, 3] * 3
    # All share the memory of the first.
    assert [shared for _, shared in captured] == [False] + [True] * 11
    answers(network, images, targets, torch.arange(12), graph)
    assert len(captured) == 12


def test_weights_that_an_optimiser_changed_are_seen(replayed):
    network, images, targets = make("cpu", 4)
    graph, index = CudaGraphs(4), torch.arange(4)
    before = answers(network, images, targets, index, graph)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-0.5)
    after = answers(network, images, targets, index, graph)
    assert not torch.equal(before[1], after[1])
    same(after, answers(network, images, targets, index, None))
    assert Replayed.captured == 3


def test_weights_that_moved_are_captured_anew(replayed):
    network, images, targets = make("cpu", 4)
    graph, index = CudaGraphs(4), torch.arange(4)
    answers(network, images, targets, index, graph)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone() * 2
    same(answers(network, images, targets, index, graph), answers(network, images, targets, index, None))
    assert Replayed.captured == 6


def test_without_memory_for_graphs_answers_come_without_them(monkeypatch):
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(graphs, "_Graph", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    network, images, targets = make("cpu", 4)
    graph, index = CudaGraphs(4), torch.arange(3)
    same(answers(network, images, targets, index, graph), answers(network, images, targets, index, None))
    assert graph.refused == "CUDA out of memory."


def test_what_cannot_be_captured_does_not_spoil_the_rest(monkeypatch):
    class Picky(Replayed):
        def __init__(self, question: graphs.Question, inputs: Sequence[Tensor], beside: object) -> None:
            if len(inputs) == 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            super().__init__(question, inputs, beside)

    monkeypatch.setattr(graphs, "_Graph", Picky)
    graph, network = CudaGraphs(1), torch.nn.Identity()
    before = Replayed.captured, Picky.captured
    for _ in range(2):
        assert graph.ask("one", lambda x: (x + 1,), network, [torch.zeros(1)])[0] == 1
        assert graph.ask("two", lambda x, y: (x + y,), network, [torch.ones(1), torch.ones(1)])[0] == 2
    assert graph.refused == "operation not permitted when stream is capturing"
    assert Picky.captured == before[1] + 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_attack_finds_with_graphs_what_it_finds_without(replayed, norm):
    """Also those whose loss changes on the way, or that bring random numbers of their own."""
    network, images, targets = make("cpu", 4)
    threat = ThreatModel(norm, 0.5)
    for kind in (
        partial(AutoAttack, members=[APGD(threat, steps=4), TargetedAPGD(threat, steps=4), FAB(threat, steps=4)]),
        partial(APGD, loss="segpgd", steps=4),
        partial(Square, n_queries=6),
        partial(PGD, steps=3, restarts=2),
        partial(BPGD, steps=3),
        partial(SPSA, steps=2, samples=4),
        partial(WhiteNoise, draws=3),
    ):
        plain = kind(threat, chunk=3)(network, images, targets)
        found = kind(threat, chunk=3, graphs=CudaGraphs(3))(network, images, targets)
        assert torch.equal(found.images, plain.images)
        assert torch.equal(found.dice, plain.dice)
        assert torch.equal(found.queries, plain.queries)
    assert Replayed.captured


def test_old_graphs_go(replayed, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    graph, network = CudaGraphs(1), torch.nn.Identity()
    for kind in range(10):
        graph.ask(kind, lambda x: (x,), network, [torch.zeros(1)])
    assert len(graph._graphs) == 3
    graph.ask(9, lambda x: (x,), network, [torch.zeros(1)])
    assert Replayed.captured == 10


@needs_gpu
@pytest.mark.parametrize("samples", [16, 11, 1])
def test_graphs_on_a_gpu_answer_as_the_network_does(samples):
    network, images, targets = make("cuda", 16)
    torch.backends.cudnn.allow_tf32 = False
    graph, index = CudaGraphs(16, 4), torch.arange(samples, device="cuda")
    for _ in range(3):
        same(answers(network, images, targets, index, graph), answers(network, images, targets, index, None), 1e-4)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05)
    assert graph.refused is None
    assert len(graph._graphs) == 3 * 4


@needs_gpu
def test_a_network_that_cannot_be_captured_answers_without_graphs():
    class Curious(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images) if float(images.sum()) < 1e9 else self.inner(-images)

    network, images, targets = make("cuda", 4)
    network = Curious(network)
    graph, index = CudaGraphs(4), torch.arange(4, device="cuda")
    same(answers(network, images, targets, index, graph), answers(network, images, targets, index, None), 1e-4)
    assert graph.refused
    same(answers(network, images, targets, index, graph), answers(network, images, targets, index, None), 1e-4)
