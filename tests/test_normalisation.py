"""What a run notes of how its scans were normalised, and the words for the unit of a level."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from nnunet_ima.evaluation.normalisation import in_words, normalisation_of, scale_of
from nnunet_ima.evaluation.protocols import Protocol

INTENSITIES = {"mean": 99.5, "std": 39.5, "median": 101.0, "percentile_00_5": -17.0, "percentile_99_5": 201.0}


def a_model(*schemes: str, masks: bool = False) -> SimpleNamespace:
    """With what is read of a model."""
    every = {str(number): INTENSITIES for number in range(len(schemes))}
    return SimpleNamespace(
        channels=len(schemes),
        configuration=SimpleNamespace(normalization_schemes=list(schemes), use_mask_for_norm=[masks] * len(schemes)),
        plans=SimpleNamespace(foreground_intensity_properties_per_channel=every),
    )


@pytest.mark.parametrize(
    ("schemes", "scale"),
    [
        (("ZScoreNormalization",), "z-scores"),
        (("ZScoreNormalization", "ZScoreNormalization"), "z-scores"),
        (("CTNormalization",), "units of the normalised scan (CTNormalization)"),
        (("ZScoreNormalization", "NoNormalization", "NoNormalization"),
         "units of the normalised scan (ZScoreNormalization, NoNormalization)"),
    ],
)  # fmt: skip
def test_a_unit_is_z_scores_only_if_that_is_so_in_all_channels(schemes, scale):
    assert scale_of(normalisation_of(a_model(*schemes))) == scale
    assert Protocol("sound", "l2").unit_in(scale) == f"{scale}, L2 norm over the patch"
    assert Protocol("paper", "linf").unit_in(scale) == scale
    assert Protocol("paper", "l2").range_in(scale) == f"[0, 1] on {scale}"
    for text in (Protocol("sound", "linf").unit_in(scale), Protocol("sound", "l2").range_in(scale)):
        assert "intensity range, per channel" in text


def test_what_the_training_cases_decide_is_noted_where_a_scheme_uses_it():
    noted = normalisation_of(a_model("ZScoreNormalization", "CTNormalization", "OfAnotherPackage"))
    used = {name: value for name, value in INTENSITIES.items() if name != "median"}
    assert noted["intensities"] == {"1": used, "2": used}
    assert json.loads(json.dumps(noted)) == noted
    assert in_words(noted) == (
        "ZScoreNormalization, CTNormalization (mean 99.5, std 39.5), OfAnotherPackage (mean 99.5, std 39.5)"
    )
    masked = normalisation_of(a_model("ZScoreNormalization", masks=True))
    assert masked == {
        "channels": 1, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]
    }  # fmt: skip
    assert in_words(masked) == "ZScoreNormalization (nonzero region)"
