"""In which unit a network's input is, and so ε, a level and a margin."""

from __future__ import annotations

from collections.abc import Sequence

Z_SCORE = "ZScoreNormalization"
Z_SCORES = "z-scores"
NORMALISED = "units of the normalised scan"


def unit_of(schemes: Sequence[str]) -> str:
    """The unit in words: z-scores if nnU-Net's plans ask for that in all channels, else with the schemes' names.

    Args:
        schemes: nnU-Net's ``normalization_schemes``, one a channel.
    """
    names = list(dict.fromkeys(schemes))
    return Z_SCORES if names == [Z_SCORE] else f"{NORMALISED} ({', '.join(names)})"


def short(unit: str) -> str:
    """Without the names in brackets: for the heading of a column, or a colour bar."""
    return unit.partition(" (")[0]
