"""The sliding window that gradients go through is nnU-Net's, tile by tile and mirror image by mirror image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_evaluate import untrained_model

from nnunet_ima.evaluation.cases import ValidationCases
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.sliding_window import SlidingWindow, make_predictor

CPU = torch.device("cpu")


def with_patch(model: TrainedModel, patch_size: list[int]) -> TrainedModel:
    """The same network on other tiles: smaller ones overlap, larger ones need padding."""
    model.configuration.configuration["patch_size"] = patch_size
    return model


def regions(content: dict) -> None:
    content["labels"] = {"background": 0, "whole": [1, 2], "anterior": 1}
    content["regions_class_order"] = [2, 1]


@pytest.fixture(params=["2d", "2d overlapping", "2d padded", "2d regions", "3d", "3d overlapping", "3d padded"])
def model(request, project, results, nnunet_finds_our_trainers) -> TrainedModel:
    dimensions, _, kind = request.param.partition(" ")
    trained = request.getfixturevalue(f"std_{dimensions}")
    folder: Path = untrained_model(project, regions) if kind == "regions" else trained
    model = load_model(folder, 0, "checkpoint_final.pth", CPU)
    patches = {
        "2d overlapping": [16, 24],
        "2d padded": [64, 72],
        "3d overlapping": [16, 16, 24],
        "3d padded": [40, 32, 24],
    }
    return with_patch(model, patches[request.param]) if request.param in patches else model


@pytest.mark.parametrize("mirroring", [False, True])
def test_its_logits_are_those_of_nnunets_predictor(model, mirroring, monkeypatch):
    cases = ValidationCases(model)
    case = cases.load(cases.names[0])
    unpadded = case.image[(slice(None), *case.unpad)]
    # In single precision, which is what can be compared; below, as it is.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "half", torch.float32)
        exact = make_predictor(model, CPU, mirroring).predict_sliding_window_return_logits(unpadded)
    assert exact.dtype == torch.float32
    rounded = make_predictor(model, CPU, mirroring).predict_sliding_window_return_logits(unpadded)
    assert rounded.dtype == torch.float16
    for chunk in (1, 3):
        window = SlidingWindow(model, CPU, chunk, mirroring)
        with torch.no_grad():
            found = window(case.image)[(slice(None), *case.unpad)]
        scale = float(exact.abs().max())
        assert float((found - exact).abs().max()) < 1e-5 * scale
        seen = window.weights(window.places(case.image.shape[1:]), case.image.shape[1:])[(slice(None), *case.unpad)]
        # Half precision holds 1e-5 to three digits, and 1e-7 to none.
        assert float(((found - rounded).abs() * (seen > 1e-3)).max()) < 1e-2 * scale
        assert float((found - rounded).abs().max()) < 0.6
        assert float((found.argmax(0) != rounded.argmax(0)).float().mean()) < 1e-3


def test_a_mirrored_window_is_another_than_a_plain_one(model):
    assert model.mirroring_axes
    image = ValidationCases(model).load(ValidationCases(model).names[0]).image
    with torch.no_grad():
        plain, mirrored = (SlidingWindow(model, CPU, 2, mirroring)(image) for mirroring in (False, True))
    assert float((plain - mirrored).abs().max()) > 1e-3 * float(plain.abs().max())
