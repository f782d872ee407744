"""The case level: a perturbed volume through nnU-Net's own sliding-window prediction, scored as nnU-Net scores."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.cases import Case, Place, ValidationCases
from nnunet_ima.evaluation.metrics import CaseScore, Segmentation, score_case


class CaseLevel:
    """Predict and score whole cases with a trained model."""

    def __init__(self, cases: ValidationCases, device: torch.device) -> None:
        self._cases = cases
        self._model = cases.model
        with contextlib.redirect_stdout(io.StringIO()):
            self._predictor = nnUNetPredictor(
                perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
            )
            self._predictor.manual_initialization(
                self._model.network,
                self._model.plans,
                self._model.configuration,
                None,
                self._model.dataset_json,
                self._model.trainer,
                self._model.mirroring_axes,
            )

    def score(self, case: Case, image: Tensor) -> CaseScore:
        """Score the prediction for ``image`` (C, Z, Y, X), padded as ``case.image``."""
        return self.score_segmentation(case, self._predict(case, image))

    def merge(self, case: Case, tiles: Sequence[tuple[Place, Tensor]]) -> Tensor:
        """Put perturbed tiles (C, *patch) into one volume (C, Z, Y, X).

        Where tiles overlap, their perturbations are averaged with nnU-Net's own Gaussian weights, as it averages
        predictions: the range is kept, and an L2 norm over a tile can only come out smaller than the tiles' largest
        by averaging, or larger where neighbours add to it. Tiles without foreground stay clean.
        """
        weight = compute_gaussian(
            tuple(self._model.configuration.patch_size), value_scaling_factor=1, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        total, weights = torch.zeros_like(case.image), torch.zeros_like(case.image[:1])
        for place, tile in tiles:
            difference = tile - self._cases.patch(case.image, place)
            self._cases.put_patch(total, place, difference * weight)
            self._cases.put_patch(weights, place, weight[None])
        return case.image + torch.where(weights > 0, total / weights.clamp_min(1e-12), torch.zeros_like(total))

    def predict_scan(self, image: np.ndarray[Any, Any], properties: dict[str, Any]) -> Segmentation:
        """What ``nnUNetv2_predict`` makes of a raw scan (C, Z, Y, X), preprocessing included."""
        model = self._model
        with contextlib.redirect_stdout(io.StringIO()):
            preprocessor = model.configuration.preprocessor_class(verbose=False)
            data, _, found = preprocessor.run_case_npy(
                image, None, dict(properties), model.plans, model.configuration, model.dataset_json
            )
            logits = self._predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(data)))
            segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.cpu(), model.plans, model.configuration, model.label_manager, found
            )
        return np.asarray(segmentation)

    def score_segmentation(self, case: Case, segmentation: Segmentation) -> CaseScore:
        """Score a segmentation (Z, Y, X) in the original geometry."""
        reference, spacing = self._reference(case)
        return score_case(segmentation, reference, self._model.foreground, self._model.labels.ignore_label, spacing)

    def _predict(self, case: Case, image: Tensor) -> Segmentation:
        model = self._model
        inside = (slice(None), *case.unpad)
        unpadded = image[inside]
        with contextlib.redirect_stdout(io.StringIO()):
            logits = self._predictor.predict_sliding_window_return_logits(unpadded)
            segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.cpu(), model.plans, model.configuration, model.label_manager, case.properties
            )
        return np.asarray(segmentation)

    def _reference(self, case: Case) -> tuple[Segmentation, Sequence[float]]:
        file = self._cases.base / "gt_segmentations" / (case.name + self._model.dataset_json["file_ending"])
        if not file.is_file():
            raise UserError(f"The reference segmentation {file} is missing; preprocess the dataset again.")
        try:
            reference, _ = self._model.plans.image_reader_writer_class().read_seg(str(file))
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            raise UserError(
                f"The reference segmentation {file} cannot be read; preprocess the dataset again."
            ) from error
        # nnU-Net keeps the spacing in the order of the array's axes.
        return np.asarray(reference[0]), [float(value) for value in case.properties["spacing"]]
