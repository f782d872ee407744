"""Facts about what an attack may ask a network: true answers, honest counts, and a network left as it was."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import KINDS, Problem, make_problem, seeded, tiny_network
from torch import Tensor, nn

from nnunet_ima.attacks.oracle import BestSoFar, Oracle, undisturbed
from nnunet_ima.errors import UserError
from nnunet_ima.losses import SegmentationLoss, first
from nnunet_ima.seeds import sample_generators

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 200)
chunks = st.sampled_from([None, 1, 2, 3, 5])
indices = st.lists(st.integers(0, 2), min_size=0, max_size=3, unique=True).map(
    lambda chosen: torch.tensor(chosen, dtype=torch.long)
)


class CountingNetwork(nn.Module):
    """Counts its runs for each sample, which it knows by the last channel: a constant, the sample's number plus one.

    Filled-up images are zero there, and are not counted.
    """

    def __init__(self, network: nn.Module, samples: int) -> None:
        super().__init__()
        self.network = network
        self.forward_runs = torch.zeros(samples, dtype=torch.long)
        self.backward_runs = torch.zeros(samples, dtype=torch.long)

    def forward(self, images: Tensor) -> Tensor:
        numbers = images.detach()[:, -1].flatten(1)[:, 0].round().long()
        numbers = numbers[numbers > 0] - 1
        self.forward_runs.index_add_(0, numbers, torch.ones_like(numbers))
        if images.requires_grad:

            def count(_: Tensor) -> None:
                self.backward_runs.index_add_(0, numbers, torch.ones_like(numbers))

            images = images * 1.0
            images.register_hook(count)
        return self.network(images[:, :-1])


def counting(problem: Problem) -> tuple[CountingNetwork, Tensor]:
    """The problem's network with a counter, and its images with the sample's number in one more channel."""
    images = problem.images
    numbers = torch.arange(1.0, len(images) + 1).reshape(-1, *[1] * (images.ndim - 1))
    numbered = torch.cat([images, numbers.expand(-1, 1, *images.shape[2:])], 1)
    return CountingNetwork(problem.network, len(images)), numbered


def oracle_of(problem: Problem, **options) -> Oracle:
    loss = SegmentationLoss(problem.criterion.labels)
    options = {"network": problem.network, "targets": problem.targets, "loss": loss, **options}
    return Oracle(criterion=problem.criterion, **options)


@given(kinds, seeds, indices, chunks)
def test_answers_are_those_of_each_sample_alone(kind, seed, index, chunk):
    problem = make_problem(kind, seed)
    oracle = oracle_of(problem, chunk=chunk)
    points = problem.images[index] + 0.3 * torch.randn(problem.images[index].shape, generator=seeded(seed))
    answer, dice = oracle.ascent(points, index), oracle.dice(points, index)
    assert answer.gradient.shape == points.shape
    assert len(answer.loss) == len(answer.dice) == len(dice) == len(index)
    assert torch.equal(answer.dice, dice)
    for row, sample in enumerate(index.tolist()):
        point = points[row : row + 1].clone().requires_grad_(True)
        target = problem.targets[sample : sample + 1]
        logits = problem.network(point)
        loss = SegmentationLoss(problem.criterion.labels)(logits, target)[0]
        (gradient,) = torch.autograd.grad(loss, point)
        torch.testing.assert_close(answer.loss[row], loss.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answer.gradient[row : row + 1], gradient, rtol=1e-3, atol=1e-6)
        assert answer.dice[row] == problem.criterion.dice(logits.detach(), target)[0]


@given(kinds, seeds, st.lists(st.tuples(st.booleans(), indices), max_size=4), chunks)
def test_passes_are_counted_as_often_as_the_network_ran(kind, seed, questions, chunk):
    problem = make_problem(kind, seed)
    network, images = counting(problem)
    oracle = oracle_of(problem, network=network, chunk=chunk)
    for ascends, index in questions:
        (oracle.ascent if ascends else oracle.dice)(images[index], index)
    assert torch.equal(oracle.forward_passes, network.forward_runs)
    assert torch.equal(oracle.backward_passes, network.backward_runs)
    for sample in range(3):
        assert oracle.forward_passes[sample] == sum(sample in index for _, index in questions)
        assert oracle.backward_passes[sample] == sum(sample in index for ascends, index in questions if ascends)


@given(kinds, seeds, st.integers(1, 3))
def test_with_a_chunk_the_network_always_sees_that_many_images(kind, seed, chunk):
    problem = make_problem(kind, seed)
    sizes = []
    problem.network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    oracle = oracle_of(problem, chunk=chunk)
    for count in (1, 2, 3):
        oracle.dice(problem.images[:count], torch.arange(count))
        oracle.ascent(problem.images[:count], torch.arange(count))
    assert set(sizes) == {chunk}


@settings(max_examples=15)
@given(kinds, seeds, st.integers(1, 4))
def test_with_a_chunk_an_answer_does_not_depend_on_the_other_samples(kind, seed, chunk):
    problem = make_problem(kind, seed, samples=4)
    oracle = oracle_of(problem, chunk=chunk)
    together = oracle.ascent(problem.images, torch.arange(4))
    for chosen in ([3], [2, 0], [1, 3, 2]):
        index = torch.tensor(chosen)
        some = oracle.ascent(problem.images[index], index)
        assert torch.equal(some.gradient, together.gradient[index])
        assert torch.equal(some.loss, together.loss[index])
        assert torch.equal(some.dice, together.dice[index])


@given(kinds, seeds, st.lists(st.tuples(indices, seeds), max_size=5))
def test_the_best_point_that_was_asked_about_is_kept(kind, seed, questions):
    problem = make_problem(kind, seed)
    best = BestSoFar(problem.images)
    oracle = oracle_of(problem, best=best)
    everyone = torch.arange(3)
    asked = [(problem.images, everyone, oracle.dice(problem.images, everyone))]
    for step, (index, other_seed) in enumerate(questions):
        noise = torch.randn(problem.images[index].shape, generator=seeded(other_seed))
        points = problem.images[index] + noise
        dice = oracle.dice(points, index) if step % 2 else oracle.ascent(points, index).dice
        asked.append((points, index, dice))
    for sample in range(3):
        seen = [
            (float(dice[row]), points[row])
            for points, index, dice in asked
            for row in (index == sample).nonzero()[:, 0].tolist()
        ]
        lowest = min(dice for dice, _ in seen)
        assert best.dice[sample] == lowest
        # The first of equals.
        assert torch.equal(best.images[sample], next(point for dice, point in seen if dice == lowest))


def test_of_points_of_equal_dice_the_first_is_kept():
    best = BestSoFar(torch.zeros(1, 1, 2, 2))
    index, dice = torch.tensor([0]), torch.tensor([0.5])
    best.update(index, torch.ones(1, 1, 2, 2), dice)
    best.update(index, 2 * torch.ones(1, 1, 2, 2), dice)
    assert best.images.unique().tolist() == [1.0]


def test_the_best_point_is_kept_as_a_copy():
    images = torch.zeros(2, 1, 2, 2)
    best = BestSoFar(images)
    point = torch.ones(1, 1, 2, 2)
    best.update(torch.tensor([1]), point, torch.tensor([0.5]))
    point += 1
    images += 7
    assert best.images[1].unique().tolist() == [1.0]
    assert best.images[0].unique().tolist() == [0.0]
    assert best.dice.tolist() == [torch.inf, 0.5]


@given(st.sampled_from([kind for kind in sorted(KINDS) if "ignore" in kind]), seeds)
def test_logits_at_ignored_voxels_have_no_influence(kind, seed):
    """A network that adds its last input channel to the logits: where voxels are ignored, that channel does nothing."""
    problem = make_problem(kind, seed)
    labels = problem.criterion.labels

    class Adding(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = problem.network(images[:, :-1])
            return logits + images[:, -1:] * torch.arange(1.0, logits.shape[1] + 1).reshape(
                1, -1, *[1] * (images.ndim - 2)
            )

    images = torch.cat([problem.images, torch.zeros_like(problem.images[:, :1])], 1)
    oracle = oracle_of(problem, network=Adding())
    answer = oracle.ascent(images, torch.arange(3))
    ignored = ~labels.valid(problem.targets)
    added = answer.gradient[:, -1:]
    assert (added[ignored] == 0).all()
    assert (added[~ignored] != 0).any()
    shifted = images.clone()
    shifted[:, -1:] = torch.where(ignored, 9.0, 0.0)
    assert torch.equal(oracle.dice(shifted, torch.arange(3)), answer.dice)


class DeepSupervision(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        logits = self.network(images)
        return [logits, logits[..., ::2, ::2], logits[..., ::4, ::4]]


@given(seeds, st.booleans(), chunks)
def test_networks_with_deep_supervision_are_asked_about_all_outputs_if_there_are_targets(seed, all_targets, chunk):
    problem = make_problem("2d classes", seed)
    targets = [problem.targets[..., ::step, ::step] for step in (1, 2, 4)]
    weights = (0.6, 0.3, 0.1)
    index = torch.tensor([2, 0])
    oracle = Oracle(
        DeepSupervision(problem.network),
        targets if all_targets else problem.targets,
        SegmentationLoss(weights=weights),
        problem.criterion,
        chunk,
    )
    answer = oracle.ascent(problem.images[index], index)
    outputs = DeepSupervision(problem.network)(problem.images[index])
    alone = [SegmentationLoss()(o, t[index]) for o, t in zip(outputs, targets, strict=True)]
    expected = sum(w * loss for w, loss in zip(weights, alone, strict=True)) if all_targets else alone[0]
    torch.testing.assert_close(answer.loss, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(answer.dice, problem.criterion.dice(first(outputs), targets[0][index]))


def test_gradients_under_bfloat16_point_where_those_in_single_precision_do():
    """Scaled before the backward pass: the loss is a mean over voxels, whose gradient is small."""
    for kind in sorted(KINDS):
        problem = make_problem(kind, 7)
        index = torch.arange(3)
        exact = oracle_of(problem).ascent(problem.images, index)
        mixed = oracle_of(problem, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        rough = mixed.ascent(problem.images, index)
        assert rough.gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(exact.gradient.flatten(1), rough.gradient.flatten(1))
        assert (cosine > 0.99).all()
        size = rough.gradient.flatten(1).norm(dim=1) / exact.gradient.flatten(1).norm(dim=1)
        assert ((size > 0.95) & (size < 1.05)).all()


class SwitchedPrecision(nn.Module):
    """A network that is another one within ``low()``."""

    low_precision = False

    @contextmanager
    def low(self):
        self.low_precision = True
        try:
            yield
        finally:
            self.low_precision = False


class HalfPrecisionBackward(SwitchedPrecision):
    """Rounds what flows back to half precision, as autocast does on a GPU; within ``low()`` only."""

    def __init__(self, network: nn.Module, overflow: bool = False) -> None:
        super().__init__()
        self.network, self.overflow = network, overflow

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        if self.low_precision and logits.requires_grad:
            factor = 1e9 if self.overflow else 1.0
            logits.register_hook(lambda gradient: (gradient * factor).half().float() / factor)
        return logits


def test_gradients_of_large_images_do_not_underflow_in_half_precision():
    """A mean over 512² voxels: a gradient below 2⁻²⁴ a voxel would be rounded to zero."""
    torch_network = tiny_network(2, 1, 2, seed=0)
    images = torch.randn(1, 1, 512, 512, generator=seeded(0))
    targets = torch.randint(0, 2, (1, 1, 512, 512), generator=seeded(1)).float()
    network = HalfPrecisionBackward(torch_network)
    problem = Problem(network, images, targets, make_problem("2d classes", 0).criterion)
    exact = oracle_of(problem).ascent(images, torch.arange(1)).gradient
    rough = oracle_of(problem, autocast=network.low).ascent(images, torch.arange(1)).gradient
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=float(exact.abs().max()) * 2e-3)
    # The same where the caller says nothing of half precision: his network or his own context is.
    with network.low():
        rough = oracle_of(problem).ascent(images, torch.arange(1)).gradient
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=float(exact.abs().max()) * 2e-3)


def test_where_half_precision_overflows_the_gradient_is_that_of_single_precision():
    problem = make_problem("2d classes", 3)
    network = HalfPrecisionBackward(problem.network, overflow=True)
    exact = oracle_of(problem, network=network).ascent(problem.images, torch.arange(3))
    rough = oracle_of(problem, network=network, autocast=network.low).ascent(problem.images, torch.arange(3))
    assert torch.isfinite(rough.gradient).all()
    assert torch.equal(rough.gradient, exact.gradient)


class OverflowsFor(SwitchedPrecision):
    """Within ``low()`` the gradient of images that begin with the mark overflows; notes how many images it is asked."""

    MARK = 77.0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.asked: list[tuple[bool, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append((self.low_precision, len(images)))
        logits: Tensor = self.network(images)
        if self.low_precision:
            marked = images.detach().flatten(1)[:, 0] == self.MARK
            factor = torch.where(marked, torch.inf, 1.0).reshape(-1, *[1] * (logits.ndim - 1))
            logits.register_hook(lambda gradient: gradient * factor)
        return logits


@given(seeds, st.sets(st.integers(0, 6)), st.sampled_from([None, 1, 3, 4, 7]))
def test_only_samples_that_overflow_are_repeated_in_passes_of_half_the_size(seed, marked, chunk):
    """Single precision takes twice the memory; and no sample's numbers depend on which others are repeated."""
    problem = make_problem("2d classes", seed, 7)
    problem.images.flatten(1)[sorted(marked), 0] = OverflowsFor.MARK
    network, index = OverflowsFor(problem.network), torch.arange(7)
    exact = oracle_of(problem, network=network, chunk=chunk).ascent(problem.images, index)
    network.asked.clear()
    found = oracle_of(problem, network=network, chunk=chunk, autocast=network.low).ascent(problem.images, index)
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    whole = [size for low, size in network.asked if low]
    again = [size for low, size in network.asked if not low]
    # A caller's size is kept: his network may take no other.
    size = chunk or 4
    assert set(whole) == {chunk or 7}
    assert set(again) <= {size}
    runs = [range(start, min(start + (chunk or 7), 7)) for start in range(0, 7, chunk or 7)]
    assert len(again) == sum(-(-len(marked & set(run)) // size) for run in runs)


def test_where_the_callers_autocast_overflows_single_precision_answers():
    problem = make_problem("2d classes", 3)
    large = nn.Sequential(problem.network.eval(), nn.Conv2d(3, 3, 1, bias=False))
    with torch.no_grad():
        large[1].weight.copy_(3e5 * torch.eye(3)[:, :, None, None])
    index = torch.arange(3)
    exact = oracle_of(problem, network=large).ascent(problem.images, index)
    with torch.autocast("cpu", torch.float16):
        assert not torch.isfinite(large(problem.images)).all()
        oracle = oracle_of(problem, network=large)
        dice, found = oracle.dice(problem.images, index), oracle.ascent(problem.images, index)
    assert torch.equal(dice, exact.dice)
    assert torch.equal(found.gradient, exact.gradient)


class SeesOneRegion:
    """A loss that a careless caller might write: it does not look at the second region."""

    def __call__(self, outputs, targets):
        return -(outputs[:, 0].sigmoid() * targets[:, 0]).flatten(1).mean(1)


def test_nan_that_the_loss_does_not_look_at_is_no_success():
    problem = make_problem("2d regions", 0)
    spoilt = torch.tensor([0.0, torch.nan])[:, None, None]

    class Spoilt(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return problem.network(images) + spoilt

    best = BestSoFar(problem.images)
    oracle = Oracle(Spoilt(), problem.targets, SeesOneRegion(), problem.criterion, best=best)
    with pytest.raises(UserError, match="NaN or infinite"):
        oracle.ascent(problem.images, torch.arange(3))
    assert torch.isinf(best.dice).all()


class Root(nn.Module):
    """Two classes; the gradient of the root is infinite at intensity zero."""

    def forward(self, images: Tensor) -> Tensor:
        root = images[:, :1].abs().sqrt()
        return torch.cat([1 - root, root], 1)


def test_a_gradient_that_is_no_number_is_reported_and_never_followed():
    """Following it would give an image of NaN, whose Dice of 0 looks like a success."""
    images = torch.rand(2, 1, 3, 3, generator=seeded(0))
    images[1, 0, 1, 1] = 0
    criterion = make_problem("2d classes", 0).criterion
    oracle = Oracle(Root(), torch.ones(2, 1, 3, 3), SegmentationLoss(), criterion)
    oracle.ascent(images[:1], torch.tensor([0]))
    with pytest.raises(UserError, match="its loss, or the gradient, is NaN or infinite"):
        oracle.ascent(images, torch.arange(2))


def test_the_filling_of_a_chunk_may_have_any_gradient():
    images = torch.rand(2, 1, 3, 3, generator=seeded(0)) + 0.1
    criterion = make_problem("2d classes", 0).criterion
    oracle = Oracle(Root(), torch.ones(2, 1, 3, 3), SegmentationLoss(), criterion, chunk=4)
    assert torch.isfinite(oracle.ascent(images, torch.arange(2)).gradient).all()


def stateful_network(seed: int) -> nn.Sequential:
    """In a mixed state: modes, weight gradients, and which parameters learn."""
    network = tiny_network(2, 2, 3, seed, training=True)
    network[1].eval()
    network[0].bias.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=seeded(seed))
    return network


def state_of(network: nn.Module) -> list[object]:
    return [
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad.tolist() for parameter in network.parameters()],
        [value.tolist() for value in network.state_dict().values()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_comes_back_as_it_was_even_after_an_error(fails):
    problem = make_problem("2d classes", 1)
    network = stateful_network(1)
    before = state_of(network)
    oracle = oracle_of(problem, network=network)
    expected = pytest.raises(RuntimeError, match="something broke") if fails else nullcontext()
    with expected, undisturbed(network):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        oracle.ascent(problem.images, torch.arange(3))
        oracle.dice(problem.images, torch.arange(3))
        if fails:
            raise RuntimeError("something broke")
    assert state_of(network) == before


@given(seeds, st.permutations(range(3)))
def test_a_samples_random_numbers_belong_to_its_image(seed, order):
    images = make_problem("2d classes", seed).images
    drawn = [torch.rand(4, generator=g).tolist() for g in sample_generators(images, seed, "noise", 1)]
    again = [torch.rand(4, generator=g).tolist() for g in sample_generators(images[list(order)], seed, "noise", 1)]
    assert again == [drawn[sample] for sample in order]
    for other in ((seed + 1, "noise", 1), (seed, "start", 1), (seed, "noise", 2)):
        changed = [torch.rand(4, generator=g).tolist() for g in sample_generators(images, *other)]
        assert all(a != b for a, b in zip(changed, drawn, strict=True))
    assert len({tuple(numbers) for numbers in drawn}) == 3
