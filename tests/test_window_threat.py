"""What an attacker may do to a whole case: a ball for each window through which the network sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import seeded, tiny_network
from torch import Tensor, nn

from nnunet_ima.attacks import ATTACKS, AutoAttack
from nnunet_ima.overlap import Place
from nnunet_ima.threat import ThreatModel
from nnunet_ima.window_threat import WindowThreat

TAKES_WINDOWS = ("white-noise", "fgsm", "ifgsm", "pgd", "apgd", "apgd-t")
SHAPE = (4, 5, 6)


@dataclass(frozen=True)
class Situation:
    """A threat model for an image within its range, and a point anywhere."""

    threat: WindowThreat
    image: Tensor
    point: Tensor


def slices() -> list[Place]:
    return [(slice(z, z + 1), slice(0, SHAPE[1]), slice(0, SHAPE[2])) for z in range(SHAPE[0])]


@st.composite
def overlapping(draw: st.DrawFn) -> list[Place]:
    """Boxes of one size that cover everything."""
    corners = [(0, size - edge) for size, edge in zip(SHAPE, (3, 3, 4), strict=True)]
    places = [
        (slice(z, z + 3), slice(y, y + 3), slice(x, x + 4)) for z in corners[0] for y in corners[1] for x in corners[2]
    ]
    return places + ([places[0]] if draw(st.booleans()) else [])


@st.composite
def situations(draw: st.DrawFn, windows: st.SearchStrategy[list[Place]] | None = None) -> Situation:
    generator = seeded(draw(st.integers(0, 10_000)))
    places = draw(windows or st.one_of(st.just(slices()), overlapping()))
    shape = (1, draw(st.integers(1, 2)), *SHAPE)
    image = 2 * torch.randn(shape, generator=generator)
    low, high = image - torch.rand(shape, generator=generator), image + torch.rand(shape, generator=generator)
    fixed = torch.rand(shape, generator=generator) < 0.2
    low, high = torch.where(fixed, image, low), torch.where(fixed, image, high)
    shares = draw(st.sampled_from([None, 1 + torch.rand(len(places), generator=generator)]))
    threat = WindowThreat("l2", draw(st.sampled_from([0.3, 1.0])), low, high, places, shares)
    size = 3.0 ** draw(st.integers(-4, 3))
    return Situation(threat, image, image + size * torch.randn(shape, generator=generator))


def norms(delta: Tensor, windows: list[Place]) -> list[float]:
    """Slowly and obviously."""
    return [sum(value**2 for value in delta[0, :, z, y, x].flatten().tolist()) ** 0.5 for z, y, x in windows]


def allowed(threat: WindowThreat) -> list[float]:
    shares = [1.0] * len(threat.windows) if threat.shares is None else threat.shares.tolist()
    return [float(threat.epsilon) * share for share in shares]


@given(situations())
def test_what_is_brought_back_is_in_every_ball_and_in_the_range(situation):
    threat, image, point = situation.threat, situation.image, situation.point
    back = threat.project(point, image)
    for norm, radius in zip(norms(back - image, threat.windows), allowed(threat), strict=True):
        assert norm <= radius * (1 + 1e-5) + 1e-6
    low, high = threat.bounds(image)
    assert bool(((back >= low) & (back <= high)).all())
    assert bool(threat.contains(back, image).all())
    # What is allowed stays, but for rounding; what was never outside a ball, to the last bit.
    assert torch.allclose(threat.project(back, image), back, atol=1e-5)
    assert torch.equal(threat.project(image, image), image)
    # No voxel is pushed the other way, or farther.
    moved, wanted = back - image, point - image
    assert bool((moved * wanted >= -1e-6).all())
    assert bool((moved.abs() <= wanted.abs() + 1e-5).all())


@given(situations())
def test_norms_and_membership_are_those_of_the_windows_one_by_one(situation):
    image, point = situation.image, situation.point
    threat = replace(situation.threat, low=float("-inf"), high=float("inf"))
    expected = norms(point - image, threat.windows)
    assert threat.window_norms(point, image).tolist() == pytest.approx(expected, rel=1e-4)
    assert float(threat.distance(point, image)) == pytest.approx(max(expected), rel=1e-4)
    inside = all(norm <= radius for norm, radius in zip(expected, allowed(threat), strict=True))
    # Points are drawn far from the boundary.
    assert bool(threat.contains(point, image, tolerance=1e-6)) == inside


@given(situations(st.just(slices())))
def test_windows_side_by_side_are_a_batch_of_samples(situation):
    """As the slices of a 2D model are at the sample level."""
    threat, image, point = situation.threat, situation.image, situation.point

    def batch(volume: Tensor) -> Tensor:
        return volume[0].transpose(0, 1)

    radii = torch.tensor(allowed(threat))
    each = ThreatModel("l2", radii, batch(threat.low), batch(threat.high))
    back, steepest = threat.project(point, image), threat.steepest(point)
    assert torch.allclose(batch(back), each.project(batch(point), batch(image)), atol=1e-5)
    assert torch.allclose(batch(steepest), each.steepest(batch(point)), atol=1e-5)
    assert torch.allclose(threat.window_norms(point, image).amax(), each.distance(batch(point), batch(image)).amax())


@given(situations(), st.integers(0, 100))
def test_directions_and_draws_are_no_larger_than_a_window_allows(situation, seed):
    threat, image = situation.threat, situation.image
    direction = threat.steepest(situation.point)
    assert max(norms(direction, threat.windows)) == pytest.approx(1.0, rel=1e-4)
    assert bool((direction * situation.point >= 0).all())
    assert not bool(threat.steepest(torch.zeros_like(image)).any())
    # Gradients are means over many voxels: they are small.
    assert torch.allclose(threat.steepest(1e-30 * situation.point), direction, atol=1e-4)
    for draw, exact in ((threat.draw_on_sphere, True), (threat.draw_in_ball, False)):
        noise = draw(image, [seeded(seed)])
        largest = max(norms(noise, threat.windows))
        assert largest <= float(threat.epsilon) * 1.0001
        assert not exact or largest == pytest.approx(float(threat.epsilon), rel=1e-4)
        assert not bool(noise[~threat.perturbable(image)].any())
        assert torch.equal(noise, draw(image, [seeded(seed)]))


@given(situations(), st.sampled_from(TAKES_WINDOWS), st.booleans(), st.integers(0, 50))
def test_no_attack_leaves_a_ball_or_the_range_wherever_it_starts(situation, name, with_start, seed):
    threat, image = situation.threat, situation.image
    network = tiny_network(3, image.shape[1], 3, seed)
    target = network.eval()(image).argmax(1, keepdim=True).float()
    settings = {"draws": 4} if name == "white-noise" else {} if name == "fgsm" else {"steps": 4}
    start = situation.point if with_start else None
    attack = ATTACKS[name](threat, seed=seed, start=start, **settings)
    assert attack.takes_windows
    found = attack(network, image, target)
    assert bool(threat.contains(found.images, image).all())
    assert bool((found.dice <= found.clean_dice).all())
    still = ~threat.perturbable(image)
    assert torch.equal(found.images[still], image[still])


class SliceBySlice(nn.Module):
    """A 2D network over the slices of a volume, blind for all but the first few."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.network, self.seen = tiny_network(2, 1, 3, 5), seen

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(image[0].transpose(0, 1))
        logits = torch.where(torch.arange(len(logits))[:, None, None, None] < self.seen, logits, logits.detach())
        return logits.transpose(0, 1)[None]


def problem(seen: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    network, image = SliceBySlice(seen), torch.randn((1, 1, *SHAPE), generator=seeded(1))
    return network, image, network.eval()(image).argmax(1, keepdim=True).float()


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_an_attack_goes_to_the_edge_of_every_windows_ball(name):
    """Otherwise it would be weaker than attacks on single slices."""
    network, image, target = problem()
    found = ATTACKS[name](WindowThreat("l2", 0.3, windows=slices()), steps=20)(network, image, target)
    assert min(norms(found.images - image, slices())) > 0.25
    assert float(found.dice) < 0.95


def test_a_window_that_the_loss_does_not_depend_on_costs_the_others_nothing():
    network, image, target = problem(seen=2)
    threat = WindowThreat("l2", 0.3, windows=slices())
    found = ATTACKS["apgd"](threat, steps=10, start=image)(network, image, target)
    used = norms(found.images - image, slices())
    assert min(used[:2]) > 0.25
    assert max(used[2:]) == 0


def test_the_others_say_that_they_do_not_take_windows():
    for name, kind in ATTACKS.items():
        if name != "autoattack":
            assert kind(ThreatModel("l2", 1.0)).takes_windows == (name in TAKES_WINDOWS)
    for version, takes in (("fast", True), ("strong", True), ("standard", False)):
        assert AutoAttack(ThreatModel("l2", 1.0), version=version).takes_windows == takes


@pytest.mark.parametrize("wrong", [{"norm": "linf"}, {"epsilon": torch.tensor([1.0, 2.0])}])
def test_what_windows_cannot_hold_is_refused(wrong):
    with pytest.raises(ValueError, match="window"):
        WindowThreat(**{"norm": "l2", "epsilon": 1.0, "windows": slices(), **wrong})


# ---- where an attack starts


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_given_start_is_where_the_attack_begins_and_is_not_lost(name):
    tiles = torch.randn((2, 1, 6, 6), generator=seeded(1))
    threat = ThreatModel("l2", 1.0)
    network = tiny_network(2, 1, 3, 5).eval()
    target = network(tiles).argmax(1, keepdim=True).float()
    attack = ATTACKS[name](threat, steps=30)
    strong = attack(network, tiles, target)
    assert float(strong.dice.max()) < 0.9
    looked_at: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: looked_at.append(inputs[0].detach().clone()))
    again = replace(attack, start=strong.images, steps=1)(network, tiles, target)
    # The clean images come first, then the start.
    assert torch.allclose(looked_at[1], strong.images, atol=1e-5)
    assert bool((again.dice <= strong.dice + 1e-6).all())


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_start_outside_the_ball_is_brought_back(name):
    tiles = torch.randn((2, 1, 6, 6), generator=seeded(1))
    network = tiny_network(2, 1, 3, 5).eval()
    target = network(tiles).argmax(1, keepdim=True).float()
    threat = ThreatModel("l2", 0.5)
    found = ATTACKS[name](threat, steps=3, start=tiles + 10.0)(network, tiles, target)
    assert bool(threat.contains(found.images, tiles).all())
