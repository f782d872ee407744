"""Facts about the settings of a training and where they come from."""

import json
import math
from dataclasses import fields

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nnunet_ima.errors import UserError
from nnunet_ima.settings import (
    _ALLOWED,
    PAPER,
    Plan,
    Settings,
    configure,
    default_delta_epsilon,
    default_epsilon,
    expected_visits,
    explain,
    validate,
)

WHERE = "nnunet_ima in plans.json"
NAMES = [field.name for field in fields(Settings)]

plans = st.builds(
    Plan,
    dataset=st.just("Dataset777_Other"),
    patch_size=st.one_of(
        st.tuples(*[st.integers(4, 2048)] * 2),
        st.tuples(*[st.integers(4, 512)] * 3),
    ),
    channels=st.integers(1, 8),
    num_epochs=st.integers(1, 4000),
    num_iterations_per_epoch=st.integers(1, 1000),
    batch_size=st.integers(1, 512),
)
samples = st.integers(0, 10**7)


def paper_plan(dataset: str, patch_size: tuple[int, ...] = (56, 40)) -> Plan:
    return Plan(dataset, patch_size, 1, 50, 50, 366)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("norm", "l1", 'one of "l2", "linf"'),
        ("attack_precision", "half", 'one of "auto", "single"'),
        ("norm", 2, 'one of "l2", "linf"'),
        ("norm", ["l2"], 'one of "l2", "linf"'),
        ("epsilon", -1, "a number at least 0"),
        ("epsilon", "15", "a number at least 0"),
        ("epsilon", True, "a number at least 0"),
        ("epsilon", None, "a number at least 0"),
        ("epsilon", math.nan, "a number at least 0"),
        ("epsilon", math.inf, "a number at least 0"),
        pytest.param("epsilon", 10**400, "a number at least 0", id="a whole number above all floats"),
        ("delta_epsilon", 0, "a number above 0"),
        ("steps", 0, "a whole number at least 1 and at most 1000"),
        ("steps", 1001, "a whole number at least 1 and at most 1000"),
        ("steps", 20.0, "a whole number at least 1 and at most 1000"),
        ("step_factor", 0.0, "a number above 0"),
        ("bisections", 0, "a whole number at least 1 and at most 60"),
        ("bisections", 61, "a whole number at least 1 and at most 60"),
        ("boundary_search", "line", 'one of "path", "origin"'),
        ("random_start", 1, "true or false"),
        ("random_start", "false", "true or false"),
        ("dice_threshold", 1, "a number at least 0 and under 1"),
        ("dice_threshold", -0.1, "a number at least 0 and under 1"),
        ("dice_reduction", "median", 'one of "mean", "max", "min"'),
        ("beta", 1.1, "a number at least 0 and at most 1"),
        ("trades_beta", -1, "a number at least 0"),
        ("te_momentum", 1, "a number at least 0 and under 1"),
        ("te_weight", -1, "a number at least 0"),
        ("te_start", 1.5, "a number at least 0 and at most 1"),
        ("te_end", -0.1, "a number at least 0 and at most 1"),
        ("num_epochs", 0, "a whole number at least 1"),
        ("num_iterations_per_epoch", 2.5, "a whole number at least 1"),
        ("num_val_iterations_per_epoch", 0, "a whole number at least 1"),
        ("initial_lr", 0, "a number above 0"),
        ("save_every", 0, "a whole number at least 1"),
        ("start_from", "", "the path of a checkpoint"),
        ("start_from", 3, "the path of a checkpoint"),
    ],
)
def test_a_bad_value_gives_one_sentence_with_key_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(UserError) as error:
        validate({"epsilon": 3, name: value}, WHERE)
    assert str(error.value) == f"{WHERE} sets {name} to {value!r}; it must be {allowed}."


@given(st.text(max_size=10).filter(lambda name: name not in NAMES))
def test_an_unknown_setting_is_named_with_the_known_ones(name):
    with pytest.raises(UserError) as error:
        validate({name: 1}, WHERE)
    assert str(error.value) == f"{WHERE} has the unknown setting {name!r}; allowed are {', '.join(NAMES)}."


@pytest.mark.parametrize("overrides", [None, 15, "epsilon", ["epsilon", 15], True])
def test_what_is_no_table_is_refused(overrides):
    with pytest.raises(UserError) as error:
        validate(overrides, WHERE)
    assert str(error.value) == f'{WHERE} is {overrides!r}; it must be a table of settings such as {{"epsilon": 15}}.'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=2))
def test_whatever_stands_in_a_plans_file_is_either_usable_or_refused_with_a_sentence(overrides):
    parsed = json.loads(json.dumps(overrides))
    bad = any(not _ALLOWED[name].allows(value) for name, value in parsed.items())
    if bad or parsed.get("te_start", 0.5) > parsed.get("te_end", 0.7):
        with pytest.raises(UserError, match=rf"^{WHERE} .*\.$"):
            validate(parsed, WHERE)
        return
    configured = configure(validate(parsed, WHERE), paper_plan("Dataset777_Other"), 100)
    for name, value in parsed.items():
        assert getattr(configured.settings, name) == value
        assert configured.origins[name] == "user"


@given(plans, samples, st.sampled_from(["l2", "linf"]))
def test_self_configured_values_are_positive_and_finite(plan, count, norm):
    configured = configure({"norm": norm}, plan, count)
    for name in ("epsilon", "delta_epsilon"):
        value = getattr(configured.settings, name)
        assert 0 < value < math.inf
        assert configured.origins[name] == "self-configured"
        # Computed and written values are the same thing: the user may copy them.
        validate({name: value}, WHERE)


@given(plans, samples)
def test_the_step_lies_between_the_papers_and_reaches_epsilon_within_a_third_of_the_visits_if_it_can(plan, count):
    chosen = configure({}, plan, count).settings
    expansions = chosen.epsilon / chosen.delta_epsilon
    rounding = 1.06  # two digits
    assert expansions <= 7.5 * rounding
    assert expansions <= max(expected_visits(plan, count) / 3, 4) * rounding
    assert expansions >= min(max(expected_visits(plan, count) / 3, 4), 7.5) / rounding


@given(st.floats(0, 1e300), st.floats(0, 1e9))
@example(5e-324, 1e9)
def test_the_step_is_positive_for_every_epsilon(epsilon, visits):
    assert 0 < default_delta_epsilon(epsilon, visits) < math.inf


@given(plans)
def test_more_voxels_never_get_a_smaller_l2_epsilon_and_never_a_larger_linf_one(plan):
    larger = Plan(plan.dataset, plan.patch_size, plan.channels + 1, plan.num_epochs, plan.num_iterations_per_epoch, 2)
    assert default_epsilon(larger, "l2") >= default_epsilon(plan, "l2")
    assert default_epsilon(larger, "linf") <= default_epsilon(plan, "linf")


@pytest.mark.parametrize(
    ("patch_size", "channels", "epsilon"), [((56, 40), 1, 14.0), ((320, 256), 1, 27.0), ((320, 320), 2, 32.0)]
)
def test_the_power_law_gives_for_the_papers_plans_what_the_source_says(patch_size, channels, epsilon):
    assert default_epsilon(Plan("Dataset777_Other", patch_size, channels, 50, 50, 8), "l2") == epsilon


@pytest.mark.parametrize(
    ("dataset", "epsilon", "delta_epsilon"),
    [("Dataset002_Heart", 20, 5), ("Dataset004_Hippocampus", 15, 2), ("Dataset005_Prostate", 40, 10)],
)
def test_the_papers_datasets_have_the_papers_values_in_2d_and_l2_alone(dataset, epsilon, delta_epsilon):
    paper = configure({}, paper_plan(dataset), 7419)
    assert (paper.settings.norm, paper.settings.epsilon, paper.settings.delta_epsilon) == ("l2", epsilon, delta_epsilon)
    assert (paper.origins["epsilon"], paper.origins["delta_epsilon"]) == ("paper", "paper")
    in_3d = configure({}, paper_plan(dataset, (40, 56, 40)), 7419)
    linf = configure({"norm": "linf"}, paper_plan(dataset), 7419)
    for other in (in_3d, linf):
        assert (other.origins["epsilon"], other.origins["delta_epsilon"]) == ("self-configured", "self-configured")
        assert other.settings.epsilon != epsilon
    assert set(PAPER) == {"Dataset002_Heart", "Dataset004_Hippocampus", "Dataset005_Prostate"}


def test_the_rest_of_the_papers_settings_are_the_defaults():
    chosen = configure({}, paper_plan("Dataset004_Hippocampus"), 7419)
    expected = {"steps": 20, "step_factor": 4.0, "bisections": 10, "dice_threshold": 0.6, "beta": 0.5}
    assert {name: getattr(chosen.settings, name) for name in expected} == expected
    assert {chosen.origins[name] for name in NAMES if "epsilon" not in name} == {"default"}


@pytest.mark.parametrize("dataset", [*PAPER, "Dataset777_Other"])
def test_a_users_epsilon_gets_a_step_of_its_own(dataset):
    chosen = configure({"epsilon": 7.5}, paper_plan(dataset), 7419)
    assert chosen.settings.epsilon == 7.5
    assert chosen.settings.delta_epsilon == 1.0  # 123 visits: the most steps, 7.5 of them
    assert (chosen.origins["epsilon"], chosen.origins["delta_epsilon"]) == ("user", "self-configured")


def test_a_users_step_leaves_the_papers_epsilon():
    chosen = configure({"delta_epsilon": 1.5}, paper_plan("Dataset004_Hippocampus"), 7419)
    assert (chosen.settings.epsilon, chosen.settings.delta_epsilon) == (15.0, 1.5)
    assert (chosen.origins["epsilon"], chosen.origins["delta_epsilon"]) == ("paper", "user")


@pytest.mark.parametrize(
    ("overrides", "level", "origin"),
    [
        ({}, 5.0, "self-configured"),
        ({"epsilon": 9}, 3.0, "self-configured"),
        ({"robust_epsilon": 4.5}, 4.5, "user"),
        ({"epsilon": 0}, None, "default"),
    ],
)
def test_the_robust_dice_is_measured_at_a_third_of_epsilon_unless_the_user_says_otherwise(overrides, level, origin):
    chosen = configure(overrides, paper_plan("Dataset004_Hippocampus"), 7419)
    assert chosen.settings.robust_epsilon == level
    assert chosen.origins["robust_epsilon"] == origin
    told = " ".join(explain(chosen, paper_plan("Dataset004_Hippocampus"), 7419))
    assert ("robust_epsilon" in told) == (origin == "self-configured")


def test_the_description_has_a_line_for_each_setting_with_value_and_origin():
    lines = configure({"epsilon": 7.5}, paper_plan("Dataset004_Hippocampus"), 7419).describe().splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[NAMES.index("epsilon")].split()[1:] == ["7.5", "(user)"]
    assert lines[NAMES.index("steps")].split()[1:] == ["20", "(default)"]


def test_the_papers_hippocampus_run_visits_a_slice_123_times():
    assert expected_visits(paper_plan("Dataset004_Hippocampus"), 7419) == pytest.approx(123, abs=0.5)


def test_the_pull_of_te_cannot_be_fully_grown_before_it_starts():
    with pytest.raises(UserError) as error:
        validate({"te_start": 0.8}, WHERE)
    assert str(error.value) == f"{WHERE} sets te_start to 0.8 and te_end to 0.7; te_start must not be above te_end."


def test_a_method_has_defaults_of_its_own_and_says_only_what_it_reads():
    plan = paper_plan("Dataset004_Hippocampus")
    chosen = configure({"beta": 0.3, "epsilon": 7}, plan, 7419, ("epsilon", "steps"), {"steps": 10})
    assert chosen.in_force == {"epsilon": 7, "steps": 10}
    assert chosen.origins == {"epsilon": "user", "steps": "default"}
    assert configure({"steps": 3}, plan, 7419, None, {"steps": 10}).settings.steps == 3
