"""The ensemble: nothing but the best of its members."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import KINDS, make_problem

from nnunet_ima.attacks import APGD, FAB, PGD, SPSA, AutoAttack, Square, TargetedAPGD, WhiteNoise
from nnunet_ima.attacks.autoattack import VERSIONS
from nnunet_ima.lp import NORMS
from nnunet_ima.threat import ThreatModel

kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 200)
norms = st.sampled_from(NORMS)
few = settings(max_examples=10, deadline=None)
ANYWHERE = ThreatModel("l2", 0.0)
MEMBERS = {
    "ce": APGD(ANYWHERE, loss="ce", steps=3),
    "targeted": TargetedAPGD(ANYWHERE, steps=2),
    "fab": FAB(ANYWHERE, steps=3),
    "square": Square(ANYWHERE, n_queries=4),
}


@few
@given(kinds, seeds, norms, st.floats(0.05, 3))
def test_its_dice_is_the_lowest_of_its_members_run_alone(kind, seed, norm, epsilon):
    problem = make_problem(kind, seed)
    threat = ThreatModel(norm, epsilon)
    attacked = problem.network, problem.images, problem.targets
    result = AutoAttack(threat, problem.criterion, members=MEMBERS, seed=seed)(*attacked)
    assert list(result.by_attack) == list(MEMBERS)
    alone = {
        "ce": APGD(threat, problem.criterion, loss="ce", steps=3, seed=seed),
        "targeted": TargetedAPGD(threat, problem.criterion, steps=2, seed=seed),
        "fab": FAB(threat, problem.criterion, steps=3, seed=seed),
        "square": Square(threat, problem.criterion, n_queries=4, seed=seed),
    }
    finished = torch.zeros(len(problem.images), dtype=torch.bool)
    dice = []
    for name, member in alone.items():
        own, part = member(*attacked), result.by_attack[name]
        assert torch.equal(part.dice.isnan(), finished)
        assert torch.equal(part.dice[~finished], own.dice[~finished])
        assert torch.equal(part.images[~finished], own.images[~finished])
        # On its own it also asks about the clean image.
        assert torch.equal(part.queries[~finished], own.queries[~finished] - 1)
        assert (part.queries[finished] == 0).all()
        dice.append(own.dice)
        finished |= own.dice == 0
    assert torch.equal(result.dice, torch.stack(dice).amin(0))
    total = sum(part.queries for part in result.by_attack.values())
    assert torch.equal(result.queries, total + 1)


@few
@given(kinds, seeds, norms)
def test_in_threshold_mode_a_sample_leaves_once_it_is_wrong(kind, seed, norm):
    problem = make_problem(kind, seed)
    members = {"noise": WhiteNoise(ANYWHERE, draws=5), **MEMBERS}
    attack = AutoAttack(ThreatModel(norm, 1.0), problem.criterion, mode="threshold", members=members)
    result = attack(problem.network, problem.images, problem.targets)
    wrong = ~problem.criterion.is_correct(result.clean_dice)
    for part in result.by_attack.values():
        assert torch.equal(part.dice.isnan(), wrong)
        assert (part.queries[wrong] == 0).all()
        wrong = wrong | ~problem.criterion.is_correct(part.dice.nan_to_num(1.0))
    assert torch.equal(wrong, ~problem.criterion.is_correct(result.dice))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_threshold_mode_makes_as_many_samples_wrong_for_less(kind):
    problem = make_problem(kind, 1, samples=8)
    members = {"apgd": APGD(ANYWHERE, steps=10), "dlr": APGD(ANYWHERE, loss="dlr", steps=10)}
    lowest, enough = (
        AutoAttack(ThreatModel("l2", 10.0), problem.criterion, mode=mode, members=members)(
            problem.network, problem.images, problem.targets
        )
        for mode in ("dice", "threshold")
    )
    assert torch.equal(problem.criterion.is_correct(lowest.dice), problem.criterion.is_correct(enough.dice))
    assert (enough.queries <= lowest.queries).all()
    assert enough.queries.sum() < lowest.queries.sum()


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_versions_are_made_of_attacks_with_what_they_share(version):
    threat = ThreatModel("linf", 0.1)
    problem = make_problem("2d regions", 0)
    attack = AutoAttack(threat, problem.criterion, version=version, mode="threshold", seed=7, chunk=3)
    for member in attack.chosen_members().values():
        assert member.threat is threat
        assert member.criterion is problem.criterion
        assert (member.mode, member.seed, member.chunk) == ("threshold", 7, 3)


def test_the_standard_has_the_budgets_of_the_original():
    members = AutoAttack(ThreatModel("l2", 1.0)).chosen_members()
    assert {name: member.steps for name, member in members.items() if name != "square"} == dict.fromkeys(
        ("apgd-balanced-ce", "apgd-dice-ce-shrinking", "apgd-dice-odds", "apgd-dice-ce", "apgd-ce", "apgd-dlr",
         "apgd-t", "fab"), 100
    )  # fmt: skip
    assert members["apgd-t"].targets == 9
    assert members["square"].n_queries == 5000


@pytest.mark.parametrize(("kind", "seed"), [("2d classes", 0), ("2d regions", 1), ("3d classes", 2)])
def test_no_sample_is_left_better_by_the_standard_than_by_the_cheaper_strong(kind, seed):
    problem = make_problem(kind, seed)
    low, high = float(problem.images.min()), float(problem.images.max())
    found = {}
    for version in ("strong", "standard"):
        attack = AutoAttack(ThreatModel("l2", 3.0, low, high), problem.criterion, version=version)
        # As few steps for all, or this would take minutes.
        short = {name: shorter(member) for name, member in attack.chosen_members().items()}
        found[version] = replace(attack, members=short)(problem.network, problem.images, problem.targets).dice
    assert (found["standard"] <= found["strong"]).all()


def shorter(member):
    return replace(member, n_queries=10) if isinstance(member, Square) else replace(member, steps=8)


def test_what_cannot_be_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"version is 'best'; it must be one of standard, fast, strong"):
        AutoAttack(ThreatModel("l2", 1.0), version="best")
    twice = AutoAttack(ThreatModel("l2", 1.0), members=[PGD(ANYWHERE), PGD(ANYWHERE, steps=3)])
    with pytest.raises(ValueError, match=r"several members are called pgd; give them as a mapping"):
        twice.chosen_members()
    with pytest.raises(ValueError, match=r"there is no loss 'best'; there are dice-ce, ce"):
        APGD(ANYWHERE, loss="best")
    with pytest.raises(ValueError, match=r"fab has a loss of its own; leave loss at None"):
        FAB(ANYWHERE, loss="ce")
    with pytest.raises(ValueError, match=r"apgd: steps is 2.5; it must be a whole number not below 0"):
        APGD(ANYWHERE, steps=2.5)
    with pytest.raises(ValueError, match=r"apgd: eot is 0; it must be at least 1"):
        APGD(ANYWHERE, eot=0)
    with pytest.raises(ValueError, match=r"samples is 5; it must be an even number"):
        SPSA(ANYWHERE, samples=5)
    problem = make_problem("2d classes", 0)
    with pytest.raises(ValueError, match=r"labels from 0 to 7, but the network gives 3 classes"):
        APGD(ANYWHERE)(problem.network, problem.images, torch.where(problem.targets == 1, 7.0, problem.targets))
    with pytest.raises(ValueError, match=r"gives one class"):
        APGD(ANYWHERE)(torch.nn.Conv2d(2, 1, 1), problem.images, torch.zeros_like(problem.targets))
    with pytest.raises(ValueError, match=r"images are of type torch.int64"):
        APGD(ANYWHERE)(problem.network, problem.images.long(), problem.targets)
    with pytest.raises(ValueError, match=r"mode is 'best'; it must be one of dice, threshold"):
        APGD(ANYWHERE, mode="best")
    with pytest.raises(ValueError, match=r"apgd: schedule is 'best'; it must be one of constant, shrinking"):
        APGD(ANYWHERE, schedule="best")


class Noisy(torch.nn.Module):
    """Draws noise of its own at each pass."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images + 0.7 * torch.randn(images.shape))


def test_an_ensemble_of_members_that_average_begins_with_an_average():
    """At ε = 0 nothing can be gained; a single lucky draw at the start would stay for good."""
    problem = make_problem("2d classes", 0, samples=6)
    network = Noisy(problem.network.eval())
    members = {"fast": APGD(ANYWHERE, steps=1), "averaging": APGD(ANYWHERE, steps=2, eot=30)}
    ensemble = AutoAttack(ANYWHERE, problem.criterion, members={"averaging": members["averaging"]})
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([problem.criterion.dice(network(problem.images), problem.targets) for _ in range(300)])
    result = ensemble(network, problem.images, problem.targets)
    # The mean of 30 scatters by a fifth of what one draw does.
    assert ((result.clean_dice - draws.mean(0)).abs() < 0.8 * draws.std(0)).all()
    assert AutoAttack(ANYWHERE, problem.criterion, members=members).repeats == 30
    assert AutoAttack(ANYWHERE, problem.criterion).repeats == 1
    assert ((result.forward_passes % 30) == 0).all()
