"""TE's averages: an exponential running average for each voxel of a case, however the patches were cut and turned."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_project import make_trainer, quiet
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from slow_averages import SlowAverages
from tiny_networks import seeded
from torch import Tensor

from nnunet_ima.averages import PredictionAverages, checkpoint_bytes, memory_bytes
from nnunet_ima.coordinate_loader import CoordinateDataLoader
from nnunet_ima.errors import UserError
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE, place_of_averages

SHAPE = (3, 5, 6)
seeds = st.integers(0, 10_000)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


def whole(shape=SHAPE) -> Tensor:
    """Coordinates of every voxel of a case."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))


def predictions(seed: int, count: int, heads: int = 2) -> list[Tensor]:
    generator = seeded(seed)
    return [torch.rand((heads, *SHAPE), generator=generator) for _ in range(count)]


@given(seeds, st.integers(1, 6), st.sampled_from([0.0, 0.5, 0.9]))
def test_a_voxel_that_is_seen_at_every_visit_holds_the_normalised_exponential_average(seed, count, momentum):
    averages = PredictionAverages(momentum, {"a": SHAPE}, 2)
    seen = predictions(seed, count)
    expected = torch.zeros_like(seen[0])
    for prediction in seen:
        averages.update("a", whole(), prediction)
        expected = momentum * expected + (1 - momentum) * prediction
    found, known = averages.read("a", whole())
    assert known.all()
    torch.testing.assert_close(found, expected / (1 - momentum**count), atol=5e-3, rtol=0)


@given(seeds, st.integers(1, 5))
def test_voxels_that_were_not_seen_stay_as_they_were(seed, count):
    averages = PredictionAverages(0.9, {"a": SHAPE, "b": SHAPE}, 2)
    averages.update("a", whole(), predictions(seed, 1)[0])
    before, _ = averages.read("a", whole())
    part = whole()[:, 1:2, 1:4, 2:5]
    for prediction in predictions(seed + 1, count):
        averages.update("a", part, prediction[:, 1:2, 1:4, 2:5])
    after, _ = averages.read("a", whole())
    seen = torch.zeros(SHAPE, dtype=torch.bool)
    seen[1:2, 1:4, 2:5] = True
    torch.testing.assert_close(before[:, ~seen], after[:, ~seen], atol=1e-5, rtol=0)
    assert (before - after)[:, seen].abs().max() > 1e-3
    assert not averages.read("b", whole())[1].any()


@given(seeds)
def test_several_voxels_of_a_patch_at_one_place_count_as_their_mean(seed):
    generator = seeded(seed)
    averages = PredictionAverages(0.0, {"a": SHAPE}, 2)
    places = torch.rand((3, 1, 40, 1), generator=generator) * (torch.tensor(SHAPE).reshape(3, 1, 1, 1) - 1.0)
    values = torch.rand((2, 1, 40, 1), generator=generator)
    averages.update("a", places, values)
    expected: dict[tuple[int, ...], list[Tensor]] = {}
    for i in range(40):
        voxel = tuple(int(v) for v in places[:, 0, i, 0].round())
        expected.setdefault(voxel, []).append(values[:, 0, i, 0])
    for voxel, found in expected.items():
        at, known = averages.read("a", torch.tensor(voxel, dtype=torch.float32).reshape(3, 1, 1, 1))
        assert known.all()
        torch.testing.assert_close(at.flatten(), torch.stack(found).mean(0), atol=2e-3, rtol=0)


@given(seeds)
def test_what_lies_outside_the_case_is_neither_read_nor_written(seed):
    averages = PredictionAverages(0.9, {"a": SHAPE}, 2)
    outside = torch.full((3, *SHAPE), torch.nan)
    averages.update("a", outside, predictions(seed, 1)[0])
    assert len(averages) == 0
    averages.update("a", whole(), predictions(seed, 1)[0])
    half = whole()
    half[:, :, :2] = torch.nan
    found, known = averages.read("a", half)
    assert not known[:, :, :2].any()
    assert known[:, :, 2:].all()
    assert not found[:, :, :2].any()


@given(seeds, st.sampled_from([float("nan"), float("inf")]))
def test_a_prediction_that_is_no_number_is_left_out(seed, bad):
    averages = PredictionAverages(0.9, {"a": SHAPE}, 2)
    first, second = predictions(seed, 2)
    averages.update("a", whole(), first)
    broken = second.clone()
    broken[1, 1, 2, 3] = bad
    averages.update("a", whole(), broken)
    found, known = averages.read("a", whole())
    assert known.all()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 1, 2, 3], first[:, 1, 2, 3], atol=5e-3, rtol=0)


@given(seeds)
def test_a_state_that_is_saved_and_loaded_is_the_same(seed):
    averages = PredictionAverages(0.9, {"a": SHAPE}, 2)
    for prediction in predictions(seed, 2):
        averages.update("a", whole(), prediction)
    again = PredictionAverages(0.9, {"a": SHAPE}, 2)
    state = copy.deepcopy(averages.state_dict())
    again.load_state_dict(state)
    assert state == {}  # there must not be two copies in memory
    assert torch.equal(again.read("a", whole())[0], averages.read("a", whole())[0])
    again.update("a", whole(), predictions(seed + 5, 1)[0])
    assert not torch.equal(again.read("a", whole())[0], averages.read("a", whole())[0])


@pytest.mark.parametrize("shapes", [{"b": SHAPE}, {"a": (3, 5, 7)}])
def test_averages_of_other_cases_or_other_preprocessing_are_refused(shapes):
    averages = PredictionAverages(0.9, {"a": SHAPE}, 2)
    averages.update("a", whole(), predictions(0, 1)[0])
    with pytest.raises(UserError, match="case a"):
        PredictionAverages(0.9, shapes, 2).load_state_dict(averages.state_dict())


def merge_all(ranks: list[PredictionAverages]) -> None:
    """As processes do it: each gets copies of what all hold."""
    changes = copy.deepcopy([rank.changes() for rank in ranks])
    for rank in ranks:
        rank.merge(copy.deepcopy(changes))


@given(seeds)
def test_after_a_merge_all_ranks_hold_the_same_and_a_voxel_of_one_rank_is_that_ranks(seed):
    ranks = [PredictionAverages(0.9, {"a": SHAPE, "b": SHAPE}, 2) for _ in range(2)]
    for rank in ranks:
        rank.update("a", whole(), predictions(seed, 1)[0])
    merge_all(ranks)
    left, right = whole()[:, :, :, :4], whole()[:, :, :, 2:]
    ranks[0].update("a", left, predictions(seed + 1, 1)[0][..., :4])
    ranks[1].update("a", right, predictions(seed + 2, 1)[0][..., 2:])
    ranks[1].update("b", whole(), predictions(seed + 3, 1)[0])
    alone = [rank.read("a", whole())[0] for rank in ranks]
    merge_all(ranks)
    merged = [(rank.read("a", whole())[0], rank.read("b", whole())[0]) for rank in ranks]
    assert [rank.changes() for rank in ranks] == [{}, {}]
    for mine, other in zip(*merged, strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(merged[0][0][..., :2], alone[0][..., :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(merged[0][0][..., 4:], alone[1][..., 4:], atol=1e-4, rtol=0)
    both = (alone[0] + alone[1])[..., 2:4] / 2
    torch.testing.assert_close(merged[0][0][..., 2:4], both, atol=2e-3, rtol=0)


@given(st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abcd")))
def test_changes_of_some_cases_are_those_of_all_but_for_the_others(updated, asked):
    averages = PredictionAverages(0.9, dict.fromkeys("abc", SHAPE), 2)
    for case in sorted(updated):
        averages.update(case, whole(), predictions(ord(case), 1)[0])
    every, some = averages.changes(), averages.changes(asked)
    assert set(every) == updated
    assert set(some) == updated & asked
    for case, parts in some.items():
        assert all(torch.equal(mine, other) for mine, other in zip(parts, every[case], strict=True))


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4), st.integers(1, 4))
def test_the_memory_that_is_announced_is_the_memory_that_is_taken(shapes, heads):
    cases = {str(i): shape for i, shape in enumerate(shapes)}
    averages = PredictionAverages(0.9, cases, heads)
    for case, shape in cases.items():
        averages.update(case, whole(shape), torch.rand((heads, *shape)))
    tensors = [tensor for stored in averages.state_dict().values() for tensor in stored.values()]
    saved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert saved == checkpoint_bytes(cases, heads)
    voxels = sum(changed.numel() * changed.element_size() for *_, changed in averages.changes().values())
    assert saved + voxels == memory_bytes(cases, heads)


def a_batch(seed: int, flat: bool, patches: int, heads: int) -> tuple[dict[str, Any], list[str], Tensor, Tensor]:
    """Shapes of three cases, and a batch of patches of them: turned, scaled, partly outside, partly no number."""
    generator = seeded(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731 (one line)
    shapes = {case: (draw(1, 5), draw(1, 7), draw(1, 7)) for case in "abc"}
    patch = (draw(1, 6), draw(1, 6)) if flat else (draw(1, 4), draw(1, 4), draw(1, 4))
    cases, coordinates = [], []
    for _ in range(patches):
        cases.append("abc"[draw(0, 2)])
        grid = whole((1, *patch) if flat else patch).flatten(1)
        if draw(0, 3):
            turn = torch.randn((3, 3), generator=generator) / 2
            grid = turn @ grid + torch.rand((3, 1), generator=generator) * torch.tensor(shapes[cases[-1]])[:, None]
        if flat:
            grid[0] = draw(0, shapes[cases[-1]][0] - 1)
        # Some beyond the border, whose value they get; some nowhere.
        nowhere = torch.rand(grid.shape[1], generator=generator) < 0.2
        coordinates.append(torch.where(nowhere, torch.nan, grid).reshape(3, *patch))
    predicted = torch.rand((patches, heads, *patch), generator=generator)
    bad = torch.rand(predicted.shape, generator=generator)
    predicted[bad < 0.04], predicted[bad < 0.02] = torch.nan, torch.inf
    return shapes, cases, torch.stack(coordinates), predicted


def compare_with_slow(fast: PredictionAverages, slow: SlowAverages, cases, coordinates, predicted) -> None:
    """Patch by patch: update, then read."""
    found, known = (part.cpu() for part in fast.update_and_read(cases, coordinates, predicted))
    for case, place, prediction, mine, has_average in zip(cases, coordinates, predicted, found, known, strict=True):
        slow.update(case, place, prediction)
        sums, weight = slow.read(case, place)
        # Whether there is one may be a matter of rounding only at the threshold itself.
        clear = (weight - 1e-3).abs() > 1e-5
        assert torch.equal(has_average[clear], (weight > 1e-3)[clear])
        expected = torch.where(weight > 1e-3, sums / weight, sums)
        # Half precision may round another way; of two such sums and weights where the weight is small, the ratio more.
        torch.testing.assert_close(mine * weight, expected * weight, atol=2e-3, rtol=0)
        assert not mine[:, place.isnan().any(0)].any()
    state = fast.state_dict()
    assert set(state) == {case for case, weights in slow.weights.items() if weights.any()}
    for case, stored in state.items():
        for kind, expected in (("sums", slow.sums[case]), ("weights", slow.weights[case])):
            torch.testing.assert_close(stored[kind], expected, atol=1e-3, rtol=0)


batches = {"flat": st.booleans(), "patches": st.integers(1, 7), "heads": st.integers(1, 3)}


@settings(max_examples=40)
@given(seeds, st.sampled_from([0.0, 0.5, 0.9]), *batches.values())
def test_a_batch_is_what_its_patches_are_one_after_the_other(seed, momentum, flat, patches, heads):
    shapes, cases, coordinates, predicted = a_batch(seed, flat, patches, heads)
    fast, slow = PredictionAverages(momentum, shapes, heads), SlowAverages(momentum, shapes, heads)
    for turn in range(2):
        order = seeded(seed + turn).initial_seed() % patches  # the second batch begins with another patch
        rolled = [cases[(i + order) % patches] for i in range(patches)]
        compare_with_slow(fast, slow, rolled, coordinates.roll(-order, 0), predicted.roll(-order, 0))


def test_a_second_patch_of_a_case_reads_what_the_first_wrote():
    averages = PredictionAverages(0.5, {"a": SHAPE, "b": SHAPE}, 1)
    predicted = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1, 1, 1).expand(3, 1, *SHAPE)
    found, known = averages.update_and_read(["a", "b", "a"], torch.stack([whole()] * 3), predicted)
    assert known.all()
    # Of the second, its own 0 counts twice as much as the 1 of before.
    torch.testing.assert_close(found.amax((1, 2, 3, 4)), torch.tensor([1.0, 0.0, 1 / 3]), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.amin((1, 2, 3, 4)), torch.tensor([1.0, 0.0, 1 / 3]), atol=2e-3, rtol=0)


@settings(max_examples=20)
@given(seeds)
def test_a_checkpoint_of_an_older_version_still_loads(seed):
    """It holds two tensors a case, each in C order in memory of its own."""
    shapes, cases, coordinates, predicted = a_batch(seed, flat=False, patches=5, heads=2)
    slow = SlowAverages(0.9, shapes, 2)
    for case, place, prediction in zip(cases, coordinates, predicted, strict=True):
        slow.update(case, place, prediction)
    seen = [case for case in shapes if slow.weights[case].any()]
    old = {case: {"sums": slow.sums[case].clone(), "weights": slow.weights[case].clone()} for case in seen}
    averages = PredictionAverages(0.9, shapes, 2)
    for case, shape in shapes.items():
        averages.update(case, whole(shape), torch.ones((2, *shape)))  # goes, as the checkpoint replaces it
    averages.load_state_dict(dict(old))
    assert not any(averages.read(case, whole(shapes[case]))[1].any() for case in shapes.keys() - old.keys())
    assert averages.changes() == {}
    assert averages.state_dict().keys() == old.keys()
    for case, stored in averages.state_dict().items():
        assert all(torch.equal(stored[kind], old[case][kind]) for kind in ("sums", "weights"))
    compare_with_slow(averages, slow, cases, coordinates, predicted)


def test_a_checkpoint_holds_the_cases_that_were_seen_and_no_others(tmp_path):
    """Tensors that share memory are saved with all of it."""
    shapes = {str(i): (20, 20, 20) for i in range(50)}
    averages = PredictionAverages(0.9, shapes, 2)
    averages.update("7", whole((20, 20, 20)), torch.rand((2, 20, 20, 20)))
    torch.save(averages.state_dict(), tmp_path / "state.pth")
    one = checkpoint_bytes({"7": shapes["7"]}, 2)
    assert one < (tmp_path / "state.pth").stat().st_size < 1.1 * one
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    assert {kind: tensor.shape for kind, tensor in state["7"].items()} == {
        "sums": (2, 20, 20, 20), "weights": (20, 20, 20)
    }  # fmt: skip
    # What ranks send each other is pickled without torch.save's care for memory that is shared.
    assert len(pickle.dumps(averages.changes())) < 1.1 * memory_bytes({"7": shapes["7"]}, 2)


def test_a_case_takes_memory_from_its_first_update_on():
    """In a process of its own: what tests before have freed would hide it."""
    program = """
import resource, torch
from nnunet_ima.averages import PredictionAverages
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
whole = torch.zeros((3, 1, 64, 64))
PredictionAverages(0.9, {"0": (1, 64, 64)}, 3).update_and_read(["0"], whole[None], whole[None])
before = peak()
averages = PredictionAverages(0.9, {str(i): (64, 256, 256) for i in range(64)}, 3)
averages.update_and_read(["5"], whole[None], whole[None])
print(peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(ran.stdout) * 1024 < 0.1 * memory_bytes({str(i): (64, 256, 256) for i in range(64)}, 3)


@pytest.mark.parametrize(
    ("device", "needed", "place"),
    [("cuda", 25, "cuda"), ("cuda", 26, "cpu"), ("cpu", 1, "cpu"), ("mps", 1, "cpu")],
)
def test_averages_lie_on_a_gpu_if_they_leave_most_of_its_memory(device, needed, place):
    assert place_of_averages(needed, torch.device(device), 100).type == place


@needs_gpu
@settings(max_examples=20)
@given(seeds, *batches.values())
def test_on_a_gpu_averages_are_the_same(seed, flat, patches, heads):
    shapes, cases, coordinates, predicted = a_batch(seed, flat, patches, heads)
    there = PredictionAverages(0.9, shapes, heads, torch.device("cuda"))
    slow = SlowAverages(0.9, shapes, heads)
    compare_with_slow(there, slow, cases, coordinates, predicted)
    assert {tensor.device.type for stored in there.state_dict().values() for tensor in stored.values()} <= {"cpu"}
    merge_all([there, PredictionAverages(0.9, shapes, heads, torch.device("cuda"))])
    there.load_state_dict(there.state_dict())
    compare_with_slow(there, slow, cases, coordinates, predicted.cuda().cpu())


# ---- through nnU-Net's own augmentation


@pytest.fixture(scope="module", params=["2d_tiny", "3d_tiny", "3d_tiny dummy 2d"])
def loader(request, project) -> nnUNetDataLoader:
    """nnU-Net's training loader, with every spatial augmentation at every draw."""
    configuration, _, dummy = request.param.partition(" ")
    trainer = make_trainer(project, nnUNetTrainerTE, configuration)
    if dummy:
        configure = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size

        def with_dummy():
            rotation, _, size, axes = configure()
            return rotation, True, np.array([trainer.configuration_manager.patch_size[0], *size[1:]]), axes

        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size = with_dummy
    with quiet():
        trainer.initialize()
        train, _ = trainer.get_dataloaders()
    found = train.data_loader
    assert type(found) is CoordinateDataLoader
    spatial = [t for t in found.transforms.transforms if type(t).__name__ == "SpatialTransform"]
    assert len(spatial) == 1
    spatial[0].p_rotation = spatial[0].p_scaling = 1.0
    return found


def test_coordinates_follow_crop_rotation_scaling_and_mirroring_to_the_voxel(loader):
    """What the coordinates point at is what the augmentation shows: an image of known values, compared voxel by voxel.

    The images are linear in the coordinates, which interpolation keeps exactly; they differ from case to case.
    """
    kinds = {"SpatialTransform", "MirrorTransform", "Convert3DTo2DTransform", "Convert2DTo3DTransform"}
    kinds |= {"RemoveLabelTansform", "DownsampleSegForDSTransform"}
    kept, loader.transforms.transforms = (
        loader.transforms.transforms,
        [t for t in loader.transforms.transforms if type(t).__name__ in kinds],
    )
    weights = torch.tensor([100.0, 10.0, 1.0])
    load = loader._data.load_case

    def painted(case):
        data, *rest = load(case)
        values = (weights[:, None, None, None] * whole(data.shape[1:])).sum(0) + 1000 * loader.indices.index(case)
        return values[None].numpy(), *rest

    loader._data.load_case = painted
    try:
        compared = 0
        for _ in range(8):
            batch = next(loader)
            for image, coordinates, case in zip(batch["data"], batch["coordinates"], batch["keys"], strict=True):
                highest = torch.tensor(load(case)[0].shape[1:]) - 1.0
                # Nearer to the border than a voxel's centre the image is interpolated with the padding around it.
                inside = ((coordinates >= 0) & (coordinates.movedim(0, -1) <= highest).movedim(-1, 0)).all(0)
                expected = torch.einsum("c,c...->...", weights, coordinates) + 1000 * loader.indices.index(case)
                torch.testing.assert_close(image[0][inside], expected[inside], rtol=1e-4, atol=0.05)
                compared += int(inside.sum())
        assert compared > 1000
    finally:
        loader.transforms.transforms = kept
        del loader._data.load_case


def test_an_average_of_the_true_segmentation_reads_as_the_augmented_one(loader):
    """TE's whole way, with nnU-Net's complete augmentation: store, augment, read, compare with the target."""
    shapes = {case: loader._data.load_case(case)[0].shape[1:] for case in loader.indices}
    averages = PredictionAverages(0.9, shapes, 3)
    for case in loader.indices:
        truth = torch.from_numpy(np.asarray(loader._data.load_case(case)[1][0])).long().clamp_min(0)
        averages.update(case, whole(truth.shape), torch.nn.functional.one_hot(truth, 3).movedim(-1, 0).float())
    agree = total = 0
    for _ in range(4):
        batch = next(loader)
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        for segmentation, coordinates, case in zip(target, batch["coordinates"], batch["keys"], strict=True):
            average, known = averages.read(case, coordinates)
            clear = known[0] & (average.amax(0) > 0.75)  # not on a border between labels, which interpolation blurs
            agree += int((average.argmax(0) == segmentation[0])[clear].sum())
            total += int(clear.sum())
    assert total > 1000
    assert agree / total > 0.995


@settings(max_examples=5)
@given(seeds)
def test_what_was_written_through_an_augmentation_is_read_where_it_belongs(loader, seed):
    """Predictions made on augmented patches end up at the voxels of the case that they show."""
    shapes = {case: loader._data.load_case(case)[0].shape[1:] for case in loader.indices}
    averages = PredictionAverages(0.5, shapes, 1)
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net's loaders draw from it)
    torch.manual_seed(seed)
    for _ in range(3):
        batch = next(loader)
        for coordinates, case in zip(batch["coordinates"], batch["keys"], strict=True):
            # The "prediction" says on which line of the case a voxel lies.
            averages.update(case, coordinates, coordinates[2:3].nan_to_num() / 100)
    for case in set(batch["keys"]):
        found, known = averages.read(case, whole(shapes[case]))
        lines = whole(shapes[case])[2] / 100
        assert known.any()
        assert (found[0] - lines)[known[0]].abs().max() < 0.0075  # three quarters of a voxel: nearest, and half floats
