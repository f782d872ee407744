"""The trainers inside nnU-Net: stock steps where nothing is perturbed, margins that survive, checkpoints that load."""

from __future__ import annotations

import copy
import errno
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunet_project import SETTINGS, make_trainer, quiet, read, weights_of
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ima.attacks.bpgd import generate_adversarial
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.environment import trainers_folder
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.margins import updated_margins
from nnunet_ima.settings import KEY
from nnunet_ima.tiles import count_tiles, tile_grid
from nnunet_ima.trainers.nnUNetTrainerAdversarial import nnUNetTrainerAdversarial
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD

STOCK_LOGS = {
    "mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs",
    "epoch_start_timestamps", "epoch_end_timestamps",
}  # fmt: skip
IMA_LOGS = {
    "clean_losses", "perturbed_losses", "correct_share", "crossed_share", "margin_mean", "margin_10", "margin_50",
    "margin_90", "passes_per_sample", "visits_mean", "robust_dice",
}  # fmt: skip


def started(project: Any, kind: type[nnUNetTrainer], configuration: str, weights: Any = None, **settings: Any) -> Any:
    """A trainer right before its first epoch."""
    trainer = make_trainer(project, kind, configuration, **settings)
    with quiet():
        trainer.initialize()
        if weights is not None:
            trainer.network.load_state_dict(weights)
        trainer.on_train_start()
    trainer.network.train()
    return trainer


def leave_as_sentence(information: pytest.ExceptionInfo[SystemExit]) -> str:
    """The one line with which nnUNetv2_train ends; a string as exit code means status 1."""
    sentence = information.value.code
    assert isinstance(sentence, str)
    assert sentence
    assert "\n" not in sentence
    return sentence


# ---- nnU-Net's own step


@pytest.mark.parametrize("kind", [nnUNetTrainerIMA, nnUNetTrainerSTD])
def test_without_perturbation_a_step_is_stock_nnunets(project, results, configuration, start, kind):
    settings = {"epsilon": 0.0} if kind is nnUNetTrainerIMA else {}
    ours = started(project, kind, configuration, start, **settings)
    stock = started(project, nnUNetTrainer, configuration, start)
    stock.initial_lr = ours.initial_lr
    for _ in range(2):
        batch = next(ours.dataloader_train)
        losses = [trainer.train_step(copy.deepcopy(batch))["loss"] for trainer in (ours, stock)]
        assert losses[0] == losses[1]
    moved = False
    for name, value in stock.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], value), name
        moved = moved or not torch.equal(value, start[name])
    assert moved


def test_with_perturbation_a_step_is_another_one(project, results, configuration, start):
    ours, stock = (started(project, kind, configuration, start) for kind in (nnUNetTrainerIMA, nnUNetTrainer))
    batch = foreground_batch(ours)
    losses = [float(trainer.train_step(copy.deepcopy(batch))["loss"]) for trainer in (ours, stock)]
    # The perturbed half of the loss is above the clean one.
    assert losses[0] > losses[1]


def foreground_batch(trainer: Any) -> dict[str, Any]:
    """A batch whose every sample holds foreground."""
    loader = trainer.dataloader_train.data_loader
    kept, loader.get_do_oversample = loader.get_do_oversample, lambda _: True
    try:
        return next(trainer.dataloader_train)
    finally:
        loader.get_do_oversample = kept


# ---- margins


def test_the_four_cases_of_algorithm_1():
    """Expand; keep (crossed, but correct at the end); shrink to the mean; keep (wrong, but no crossing found)."""
    margins, distance = torch.tensor([4.0, 4.0, 4.0, 4.0]), torch.tensor([4.0, 3.0, 1.0, 4.0])
    correct, crossed = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert updated_margins(margins, distance, correct, crossed, 1.5).tolist() == [5.5, 4.0, 2.5, 4.0]


def test_margins_stay_in_bounds_and_only_those_of_drawn_samples_move(project, results, configuration, start):
    trainer = started(project, nnUNetTrainerIMA, configuration, start, epsilon=2.5, delta_epsilon=1.0)
    moved = 0
    for _ in range(4):
        batch = foreground_batch(trainer)
        drawn = set(trainer.samples_of(batch))
        before, visits = dict(trainer.margins._margins), dict(trainer.margins._visits)
        counts = trainer.train_step(batch)["counts"][0]
        after = trainer.margins._margins
        assert all(0 <= margin <= 2.5 for margin in after.values())
        changed = {sample for sample in after if after[sample] != before.get(sample)}
        assert changed <= drawn
        assert {s for s in after if trainer.margins._visits[s] != visits.get(s, 0)} <= drawn
        assert set(after) - set(before) <= drawn
        assert counts["samples"] == len(batch["keys"])
        assert 0 <= counts["crossed"] <= counts["perturbed"] <= counts["correct"] <= counts["foreground"]
        moved += counts["perturbed"]
    assert moved > 0
    assert sum(trainer.margins._visits.values()) == pytest.approx(4 * trainer.batch_size, abs=4)


def test_a_sample_without_foreground_has_no_margin_and_costs_one_pass(project, results, start, configuration):
    """Where nothing is to be found and nothing was found the sample is correct, but it has no boundary to go to."""
    trainer = started(project, nnUNetTrainerIMA, configuration, start)
    with torch.no_grad():
        for layer in trainer.network.decoder.seg_layers:
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    batch = next(trainer.dataloader_train)
    for target in batch["target"]:
        target.zero_()
    counts = trainer.train_step(batch)["counts"][0]
    assert counts["foreground"] == counts["perturbed"] == len(trainer.margins) == 0
    assert counts["forward_passes"] == len(batch["keys"])


def test_a_margin_goes_to_the_sample_that_earned_it(project, results, start, configuration):
    trainer = started(project, nnUNetTrainerIMA, configuration, start)
    for only in range(trainer.batch_size):
        trainer.start_method(100)
        batch = foreground_batch(trainer)
        for target in batch["target"]:
            target[[i for i in range(len(target)) if i != only]] = 0
        trainer.train_step(batch)
        assert set(trainer.margins._margins) == {trainer.samples_of(batch)[only]}


def test_a_wrong_sample_is_not_perturbed_and_keeps_its_margin(project, results, start, configuration):
    trainer = started(project, nnUNetTrainerIMA, configuration, start, dice_threshold=0.999)
    batch = foreground_batch(trainer)
    counts = trainer.train_step(batch)["counts"][0]
    assert counts["perturbed"] == 0
    assert counts["forward_passes"] == len(batch["keys"])
    assert set(trainer.margins.all_margins().tolist()) == {1.0}


def test_the_tiles_of_a_batch_are_where_its_patches_were_taken(project, results, configuration):
    """Brute force: an un-augmented patch is looked for in its case, then the nearest tile's centre is taken."""
    trainer = make_trainer(project, nnUNetTrainerIMA, configuration)
    with quiet():
        trainer.initialize()
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    assert isinstance(trainer.dataloader_train, SingleThreadedAugmenter)
    loader = trainer.dataloader_train.data_loader
    loader.transforms = None
    noted: list[tuple[list[int], list[int]]] = []
    original = loader.get_bbox

    def watched(*args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        noted.append(original(*args, **kwargs))
        return noted[-1]

    loader.get_bbox = watched
    patch = trainer.configuration_manager.patch_size
    sizes = np.array([1] * (3 - len(patch)) + list(patch))
    for _ in range(3):
        noted.clear()
        batch = loader.generate_train_batch()
        for i, (case, tile) in enumerate(trainer.samples_of(batch)):
            image = np.asarray(loader._data.load_case(case)[0][:])[0]
            centre = (np.array(noted[i][0]) + np.array(noted[i][1])) / 2
            # What the loader cut out is what stands there in the case.
            shown = batch["data"][i, 0].numpy().reshape(np.subtract(noted[i][1], noted[i][0]))
            inside = tuple(slice(max(lo, 0), min(hi, n)) for lo, hi, n in zip(*noted[i], image.shape, strict=True))
            within = tuple(slice(s.start - lo, s.stop - lo) for s, lo in zip(inside, noted[i][0], strict=True))
            np.testing.assert_array_equal(shown[within], image[inside])
            corners = list(np.ndindex(*(len(axis) for axis in tile_grid(image.shape, patch))))
            grid = tile_grid(image.shape, patch)
            centres = np.array([[grid[a][c] for a, c in enumerate(corner)] for corner in corners]) + sizes / 2
            assert tile == int(((centres - centre) ** 2).sum(1).argmin())
            if len(patch) == 2 and all(np.less_equal(image.shape[1:], patch)):
                assert tile == noted[i][0][0]


def test_nnunets_own_worker_processes_say_the_tiles_too(project, results, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make_trainer(project, nnUNetTrainerIMA)
    with quiet():
        trainer.initialize()
        train, validation = trainer.get_dataloaders()
        try:
            batches = [next(train) for _ in range(8)]
            assert "tiles" not in next(validation)
        finally:
            train._finish()
            validation._finish()
    for batch in batches:
        patch = trainer.configuration_manager.patch_size
        shapes = [train.generator._data.load_case(case)[0].shape[1:] for case in batch["keys"]]
        assert len(batch["tiles"]) == trainer.batch_size
        assert all(0 <= tile < count_tiles(shape, patch) for tile, shape in zip(batch["tiles"], shapes, strict=True))
        assert len(set(batch["tiles"])) > 1


# ---- threat model


def test_patches_may_use_their_own_range_and_a_cascades_extra_channels_stay(project, results, start, configuration):
    trainer = started(project, nnUNetTrainerIMA, configuration, start)
    axes = tuple(trainer.configuration_manager.patch_size)
    images = torch.randn((2, 3, *axes), generator=torch.Generator().manual_seed(0))
    images[:, 1:] = (images[:, 1:] > 0.5).float()  # two one-hot channels of the previous stage
    threat = trainer.patch_threat(images, torch.tensor([5.0, 7.0]))
    low, high = (bound.expand_as(images) for bound in threat.bounds(images))
    assert torch.equal(low[:, 1:], images[:, 1:])
    assert torch.equal(high[:, 1:], images[:, 1:])
    for sample in range(2):
        assert float(low[sample, 0].min()) == float(low[sample, 0].max()) == float(images[sample, 0].min())
        assert float(high[sample, 0].min()) == float(high[sample, 0].max()) == float(images[sample, 0].max())
    moved = threat.project(images + torch.randn(images.shape), images)
    assert torch.equal(moved[:, 1:], images[:, 1:])
    assert not torch.equal(moved[:, 0], images[:, 0])


# ---- a whole training


@pytest.fixture(params=["ima_2d", "ima_3d"])
def finished(request) -> nnUNetTrainerIMA:
    return request.getfixturevalue(request.param)


def test_every_log_has_one_value_an_epoch(finished):
    logs = finished.logger.get_checkpoint()
    assert logs.keys() == STOCK_LOGS | IMA_LOGS
    assert {name: len(values) for name, values in logs.items()} == dict.fromkeys(logs, 2)
    for name in IMA_LOGS:
        # The robust Dice is measured every few epochs, and at the end.
        measured = logs[name][-1:] if name == "robust_dice" else logs[name]
        assert all(math.isfinite(value) for value in measured), name
    for name in ("correct_share", "crossed_share"):
        assert all(0 <= value <= 1 for value in logs[name])
    for name in ("margin_mean", "margin_10", "margin_50", "margin_90"):
        assert all(0 <= value <= SETTINGS["epsilon"] for value in logs[name])
    assert all(low <= high for low, high in zip(logs["margin_10"], logs["margin_90"], strict=True))
    assert all(value >= 1 for value in logs["passes_per_sample"])


def test_some_margins_moved(finished):
    assert len(finished.margins) > 0
    assert set(finished.margins.all_margins().tolist()) != {SETTINGS["delta_epsilon"]}
    assert [sum(histogram) for histogram in finished.histograms][-1] == len(finished.margins)


def test_the_log_says_what_was_trained_and_how(finished):
    (log,) = Path(finished.output_folder).glob("training_log_*.txt")
    text = log.read_text(encoding="utf-8")
    assert "nnUNetTrainerIMA: " in text
    assert "training samples in" in text
    for name, value in SETTINGS.items():
        assert f"  {name} " in text
        assert f"{value}  (user)" in text
    for name in IMA_LOGS - {"robust_dice"}:
        assert f"{name} " in text
    assert re.search(r"Robust Dice [01]\.\d{4}, geometric mean with the pseudo Dice [01]\.\d{4}", text)


@pytest.mark.parametrize(
    ("scheme", "unit"), [("ZScoreNormalization", "z-scores"), ("CTNormalization", "units of the normalised scan")]
)
def test_margins_are_drawn_in_the_unit_of_the_networks_input(project, results, monkeypatch, scheme, unit):
    drawn = []
    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerIMA.draw_margins", lambda *asked: drawn.append(asked[2]))
    trainer = make_trainer(project, nnUNetTrainerIMA, "2d_tiny", num_epochs=1, norm="linf", epsilon=0.1)
    trainer.configuration_manager.configuration["normalization_schemes"] = [scheme]
    with quiet():
        trainer.run_training()
    assert drawn == [f"Linf, {unit}"]


@pytest.mark.parametrize("random_start", [True, False])
def test_the_inner_attack_starts_at_noise_of_the_margins_size_or_at_the_sample(
    project, results, monkeypatch, random_start
):
    """With noise, as in the earlier version's Eq. 1; without, as the final version's Algorithm 2 is printed."""
    started_at: list[torch.Tensor] = []
    inner = generate_adversarial

    def noted(*asked: Any, **more: Any) -> Any:
        threat, images, start = asked[2:5]
        radius = threat.radius(images).flatten()
        wanted = torch.minimum((radius - 0.5).clamp_min(0.5), radius) if random_start else torch.zeros_like(radius)
        # The patch's range may cut some of it off.
        assert ((start - images).flatten(1).norm(dim=1) <= wanted * (1 + 1e-5)).all()
        started_at.append((start - images).flatten(1).norm(dim=1) / radius)
        return inner(*asked, **more)

    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerIMA.generate_adversarial", noted)
    trainer = started(
        project, nnUNetTrainerIMA, "2d_tiny", epsilon=6.0, delta_epsilon=0.5, dice_threshold=0.0, robust_every=0,
        random_start=random_start,
    )  # fmt: skip
    with quiet():
        for _ in range(3):
            trainer.train_step(next(trainer.dataloader_train))
    share = torch.cat(started_at)
    assert len(share)
    assert bool((share > 0).all()) is random_start


@pytest.mark.parametrize("picture", ["progress.png", "margins.png"])
def test_the_pictures_are_drawn(finished, picture):
    pixels = plt.imread(Path(finished.output_folder) / picture)[::20, ::20, :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    if picture == "progress.png":
        # nnU-Net's three panels are 54 inches high for 30 of width; each two of ours add 9.
        height, width = pixels.shape[:2]
        rows = (len(finished.all_panels) + 1) // 2
        assert height / width == pytest.approx((54 + 9 * rows) / 30, rel=0.05)
        assert len(np.unique(pixels[height // 2 :].reshape(-1, 3), axis=0)) > 10


def test_the_settings_and_debug_information_lie_beside_the_model(finished):
    folder = Path(finished.output_folder)
    described = read(folder / "nnunet_ima_settings.json")
    assert described["trainer"] == "nnUNetTrainerIMA"
    assert described["settings"]["epsilon"] == SETTINGS["epsilon"]
    assert described["origins"]["epsilon"] == "user"
    assert described["origins"]["beta"] == "default"
    assert json.loads((folder / "debug.json").read_text(encoding="utf-8"))
    assert not [file for file in folder.rglob("*") if file.name.endswith(".tmp")]
    assert {"checkpoint_best.pth", "checkpoint_final.pth"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "checkpoint_latest.pth").exists()


# ---- checkpoints


def copied(trainer: Any, results: Path, kind: str = "") -> Path:
    """The finished training's folder in another results folder; returns its final checkpoint."""
    source = Path(trainer.output_folder)
    model = source.parent.name if not kind else kind + source.parent.name.removeprefix(type(trainer).__name__)
    target = results / source.parent.parent.name / model / source.name
    target.mkdir(parents=True)
    (target / "checkpoint_final.pth").write_bytes((source / "checkpoint_final.pth").read_bytes())
    return target / "checkpoint_final.pth"


def test_a_training_continues_with_the_margins_of_its_checkpoint(project, results, finished):
    checkpoint = copied(finished, results)
    again = make_trainer(project, nnUNetTrainerIMA, finished.configuration_name, resume=True, num_epochs=3)
    with quiet():
        again.load_checkpoint(str(checkpoint))
        again.on_train_start()
    assert again.current_epoch == 2
    assert again.margins._margins == pytest.approx(finished.margins._margins)
    assert again.margins._visits == finished.margins._visits
    assert again.histograms == finished.histograms
    assert KEY not in again.my_init_kwargs
    assert "IMA continues with the margins of" in Path(again.log_file).read_text(encoding="utf-8")
    # One more epoch: every log goes on by one value.
    with quiet():
        again.run_training()
    assert {len(values) for values in again.logger.get_checkpoint().values()} == {3}
    assert len(again.histograms) == 3
    assert sum(again.margins._visits.values()) > sum(finished.margins._visits.values())


def test_nothing_of_ours_stays_in_the_init_arguments(finished):
    assert KEY not in finished.my_init_kwargs
    assert set(finished.my_init_kwargs) == {"plans", "configuration", "fold", "dataset_json", "device"}
    checkpoint = torch.load(
        Path(finished.output_folder) / "checkpoint_final.pth", map_location="cpu", weights_only=False
    )
    assert checkpoint["init_args"][KEY]["trainer"] == "nnUNetTrainerIMA"
    assert checkpoint["init_args"][KEY]["settings"]["epsilon"] == SETTINGS["epsilon"]


def test_stock_nnunet_predicts_with_our_model(project, finished, monkeypatch, capsys):
    assert main(["trainers"]) == 0
    folder = capsys.readouterr().out.strip()
    assert Path(folder) == trainers_folder()
    monkeypatch.setenv("nnUNet_extTrainer", folder)
    with quiet():
        found = recursive_find_trainer_class_by_name("nnUNetTrainerIMA")
        assert found.__name__ == "nnUNetTrainerIMA"
        assert issubclass(found, nnUNetTrainer)
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(Path(finished.output_folder).parent), (0,))
        shape = (1, 30, 50, 40)
        logits = predictor.predict_logits_from_preprocessed_data(torch.randn(shape))
    assert logits.shape == (3, *shape[1:])
    for name, value in predictor.list_of_parameters[0].items():
        assert torch.equal(value, finished.network.state_dict()[name])


def test_our_evaluation_reads_the_checkpoint_without_running_code(project, finished):
    model = load_model(Path(finished.output_folder).parent, 0, "checkpoint_final.pth", torch.device("cpu"))
    assert model.trainer == "nnUNetTrainerIMA"


@pytest.mark.parametrize("writer", ["stock", "nnUNetTrainerSTD"])
def test_a_checkpoint_without_margins_is_refused_for_continuing_but_not_for_validation(
    project, results, std_2d, stock_2d, writer
):
    folder = stock_2d if writer == "stock" else std_2d
    checkpoint = str(folder / "fold_0" / "checkpoint_final.pth")
    trainer = make_trainer(project, nnUNetTrainerIMA, resume=True, num_epochs=3)
    with quiet():
        trainer.load_checkpoint(checkpoint)  # all that --val does before it predicts
    for name, value in weights_of(Path(checkpoint)).items():
        assert torch.equal(trainer.network.state_dict()[name], value)
    with pytest.raises(SystemExit) as left, quiet():
        trainer.run_training()
    sentence = leave_as_sentence(left)
    assert "-pretrained_weights" in sentence
    assert checkpoint in sentence


@pytest.mark.parametrize("kind", [nnUNetTrainerIMA, nnUNetTrainerSTD])
def test_a_training_may_start_from_a_whole_network_output_layers_included(project, results, stock_2d, kind):
    file = stock_2d / "fold_0" / "checkpoint_final.pth"
    trainer = started(project, kind, "2d_tiny", start_from=str(file))
    weights = weights_of(file)
    assert any(".seg_layers." in name for name in weights)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    with quiet():
        trainer.train_step(next(trainer.dataloader_train))
    assert any(not torch.equal(value, weights[name]) for name, value in trainer.network.state_dict().items())


def test_a_training_that_continues_does_not_start_anew(project, results, ima_2d, stock_2d):
    checkpoint = copied(ima_2d, results)
    start = str(stock_2d / "fold_0" / "checkpoint_final.pth")
    trainer = make_trainer(project, nnUNetTrainerIMA, resume=True, num_epochs=3, start_from=start)
    with quiet():
        trainer.load_checkpoint(str(checkpoint))
        trainer.on_train_start()
    for name, value in weights_of(checkpoint).items():
        assert torch.equal(trainer.network.state_dict()[name], value), name


def _relabelled(checkpoint: dict[str, Any]) -> None:
    checkpoint["init_args"]["dataset_json"]["labels"] = {"background": 0, "posterior": 1, "anterior": 2}


def _other_network(checkpoint: dict[str, Any]) -> None:
    checkpoint["network_weights"].popitem()


def _no_network(checkpoint: dict[str, Any]) -> None:
    del checkpoint["network_weights"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "no file"),
        (_relabelled, "-pretrained_weights"),
        (_other_network, "another network"),
        (_no_network, "no checkpoint"),
    ],
)
def test_a_start_that_does_not_fit_ends_with_a_sentence(project, results, stock_2d, tmp_path, change, said):
    file = tmp_path / "start.pth"
    if change is not None:
        checkpoint = torch.load(stock_2d / "fold_0" / "checkpoint_final.pth", weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, file)
    trainer = make_trainer(project, nnUNetTrainerIMA, start_from=str(file))
    with pytest.raises(SystemExit) as left, quiet():
        trainer.run_training()
    sentence = leave_as_sentence(left)
    assert said in sentence
    assert str(file) in sentence


def test_margins_of_another_norm_are_refused(project, results, ima_2d):
    checkpoint = copied(ima_2d, results)
    trainer = make_trainer(project, nnUNetTrainerIMA, resume=True, num_epochs=3, norm="linf", epsilon=0.1)
    with quiet():
        trainer.load_checkpoint(str(checkpoint))
    with pytest.raises(SystemExit) as left, quiet():
        trainer.run_training()
    assert "norm" in leave_as_sentence(left)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.5, 0.98, 0.9999])
def test_a_truncated_checkpoint_ends_with_a_sentence(project, results, ima_2d, kept):
    checkpoint = copied(ima_2d, results)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(kept * len(content))])
    trainer = make_trainer(project, nnUNetTrainerIMA, resume=True)
    with pytest.raises(SystemExit) as left, quiet():
        trainer.load_checkpoint(str(checkpoint))
    assert str(checkpoint) in leave_as_sentence(left)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"{}", b"\x80\x02N.", b"\x80\x02}q\x00.", b"cos\nnothing\n."])
def test_a_file_that_is_no_checkpoint_ends_with_a_sentence(project, results, ima_2d, content):
    checkpoint = copied(ima_2d, results)
    checkpoint.write_bytes(content)
    trainer = make_trainer(project, nnUNetTrainerIMA, resume=True)
    with pytest.raises(SystemExit) as left, quiet():
        trainer.load_checkpoint(str(checkpoint))
    assert str(checkpoint) in leave_as_sentence(left)


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "No space")]
)
def test_a_full_disk_keeps_the_older_checkpoint(project, results, ima_2d, monkeypatch, error):
    checkpoint = copied(ima_2d, results)
    before = checkpoint.read_bytes()
    trainer = make_trainer(project, nnUNetTrainerIMA, resume=True, num_epochs=3)
    with quiet():
        trainer.load_checkpoint(str(checkpoint))
        trainer.on_train_start()

    def half(_: object, file: str, *__: object, **___: object) -> None:
        Path(file).write_bytes(before[:1000])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit) as left, quiet():
        trainer.save_checkpoint(str(checkpoint))
    sentence = leave_as_sentence(left)
    assert str(checkpoint) in sentence
    assert "--c" in sentence
    assert checkpoint.read_bytes() == before
    assert [file for file in checkpoint.parent.iterdir() if file.suffix == ".tmp"] == []
    assert KEY not in trainer.my_init_kwargs


def test_disabled_checkpointing_writes_none(project, results):
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny")
    trainer.disable_checkpointing = True
    with quiet():
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert list(Path(trainer.output_folder).glob("*.pth")) == []


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": "15"}, "epsilon"),
        ({"epsilom": 15}, "epsilom"),
        ({"delta_epsilon": 0}, "delta_epsilon"),
        ({"norm": "l1"}, "norm"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"bisections": 0}, "bisections"),
        ({"boundary_search": "middle"}, "boundary_search"),
        ({"dice_threshold": 1}, "dice_threshold"),
        ({"dice_reduction": "median"}, "dice_reduction"),
        ({"beta": 1.1}, "beta"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"initial_lr": True}, "initial_lr"),
        ({"save_every": None}, "save_every"),
    ],
)
def test_a_bad_setting_ends_with_a_sentence_before_anything_is_written(project, results, settings, named):
    with pytest.raises(SystemExit) as left:
        make_trainer(project, nnUNetTrainerIMA, **settings)
    sentence = leave_as_sentence(left)
    assert named in sentence
    assert "nnUNetPlansTiny.json" in sentence
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("table", [5, [], "epsilon", None])
def test_settings_that_are_no_table_are_refused(project, results, table):
    plans = project.plans()
    plans["configurations"]["2d_tiny"][KEY] = table
    plans["continue_training"] = False
    with pytest.raises(SystemExit) as left, quiet():
        nnUNetTrainerIMA(plans, "2d_tiny", 0, read(project.preprocessed / "dataset.json"), torch.device("cpu"))
    assert "must be a table of settings" in leave_as_sentence(left)
    assert list(results.iterdir()) == []


def test_an_unknown_configuration_ends_with_a_sentence(project, results):
    plans = {**project.plans(), "continue_training": False}
    with pytest.raises(SystemExit) as left, quiet():
        nnUNetTrainerIMA(plans, "4d", 0, read(project.preprocessed / "dataset.json"), torch.device("cpu"))
    assert "2d_tiny" in leave_as_sentence(left)
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scan_with_nan_is_named(project, results, bad):
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny")
    before = copy.deepcopy(trainer.network.state_dict())
    batch = next(trainer.dataloader_train)
    batch["keys"] = [f"case_{i}" for i in range(len(batch["keys"]))]
    batch["data"][2, 0, 5, 5] = bad
    with pytest.raises(SystemExit) as left:
        trainer.train_step(batch)
    sentence = leave_as_sentence(left)
    assert "case_2" in sentence
    assert "case_1" not in sentence
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_base_class_says_at_once_that_it_is_not_for_training(project, results):
    with pytest.raises(SystemExit, match="use -tr nnUNetTrainerIMA"):
        started(project, nnUNetTrainerAdversarial, "2d_tiny")
