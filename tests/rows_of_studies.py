"""Results of a study as ``benchmarks/paper_scale.py`` writes them, of figures that a test chooses."""

from __future__ import annotations

from typing import Any

ATTACK, NOISE = "autoattack:version=fast", "white-noise"
LEVELS = {
    "sound_l2": ("5", "10", "15"), "sound_linf": ("2/255",), "paper_l2": ("5", "15", "25"),
    "paper_linf": ("2/255", "4/255", "8/255", "16/255", "32/255"),
}  # fmt: skip


def an_evaluation(name: str, clean: float, attacked: list[float], trusted: bool = True) -> dict[str, Any]:
    """Noise takes nothing."""
    found = [
        {"attack": attack, "level": level, "tvdi": value if attack == ATTACK else clean, "adi": 0.1}
        for attack in (NOISE, ATTACK)
        for level, value in zip(LEVELS[name], attacked, strict=True)
    ]
    clamp = {"tvdi": clean - 0.01, "adi": 0.1} if name.startswith("paper") else None
    clean_figures = {"tvdi": clean, "adi": 0.2}
    return {
        "samples": 200, "seed": 0, "samples_seed": 3, "trusted": trusted, "clean": clean_figures, "clamp_only": clamp,
        "results": found,
    }  # fmt: skip


def a_row(method: str, repetition: int, training: dict[str, Any] | None = None, **evaluations: Any) -> dict[str, Any]:
    return {
        "method": method, "repetition": repetition, "settings": {"num_epochs": 22}, "training": training,
        "evaluations": {name: evaluations.get(name) for name in LEVELS},
    }  # fmt: skip


def a_result(rows: list[dict[str, Any]], dataset: str = "Hippocampus") -> dict[str, Any]:
    return {
        "scale": "small", "dataset": dataset, "network": {"name": "2d_small", "features": 16}, "rows": rows,
        "parts": [{"command": "python benchmarks/paper_scale.py", "date": "2026-11-26"}],
    }  # fmt: skip
