"""The case level: a perturbed volume through nnU-Net's own sliding-window prediction, scored as nnU-Net scores."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.cases import Case, ValidationCases
from nnunet_ima.evaluation.metrics import CaseScore, Segmentation, score_case
from nnunet_ima.evaluation.sliding_window import make_predictor
from nnunet_ima.evaluation.tile_merge import TileMerge
from nnunet_ima.overlap import Place


class CaseLevel:
    """Predict and score whole cases with a trained model."""

    def __init__(self, cases: ValidationCases, device: torch.device) -> None:
        self._cases = cases
        self._model = cases.model
        self._predictor = make_predictor(cases.model, device)

    def score(self, case: Case, image: Tensor) -> CaseScore:
        """Score the prediction for ``image`` (C, Z, Y, X), padded as ``case.image``."""
        return self.score_segmentation(case, self._predict(case, image))

    def merge(self, case: Case, tiles: Sequence[tuple[Place, Tensor]]) -> Tensor:
        """Put perturbed tiles (C, *patch) into one volume (C, Z, Y, X).

        Tiles without foreground stay clean; see :class:`~nnunet_ima.evaluation.tile_merge.TileMerge`.
        """
        if not tiles:
            return case.image
        merge = TileMerge(case.image, [place for place, _ in tiles], self._model.configuration.patch_size)
        stacked = torch.stack([tile for _, tile in tiles])
        return merge(stacked[:, :, None] if self._cases.is_2d else stacked)

    def predict_scan(
        self, image: np.ndarray[Any, Any], properties: dict[str, Any]
    ) -> tuple[Segmentation, np.ndarray[Any, Any]]:
        """What ``nnUNetv2_predict`` makes of a raw scan (C, Z, Y, X), and the preprocessed scan its network sees."""
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
        return np.asarray(segmentation), np.asarray(data)

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
