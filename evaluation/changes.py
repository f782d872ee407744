"""What differs between a run and its baseline besides the figures: nobody shall blame the model for another attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_ima.evaluation.baseline import Baseline, same_samples
from nnunet_ima.evaluation.identity import differences

# Where summary.json and baselines keep them.
FILES = {"weights": "sha256", "plans.json": "plans.json", "dataset.json": "dataset.json"}
NAMES = ("trainer", "plans", "configuration", "fold", "checkpoint")
# Enough to see whether two are the same.
DIGITS = 12
SAME = "the same"


def what_changed(now: Baseline, before: Baseline) -> dict[str, str]:
    """By subject: ``the same``, what differs, or that it is not known, as older versions did not note it."""
    ours, theirs = now.about, before.about
    found = {name: _said(_digits(theirs, key), _digits(ours, key)) for name, key in FILES.items()}
    if same_model(now, before):
        found["weights"] += f" (sha256 {_digits(ours, 'sha256')}): the model is unchanged"
    found["names"] = _said(*({name: about["model"].get(name) for name in NAMES} for about in (theirs, ours)))
    found["training"] = _said(theirs.get("training"), ours.get("training"))
    found["normalisation"] = _said(theirs.get("normalisation"), ours.get("normalisation"))
    found["attacks"] = _said(theirs.get("attacks"), ours.get("attacks"))
    found["seed"] = _said(theirs["seed"], ours["seed"])
    found["samples"] = SAME if same_samples(now, before) else f"{_samples(before)} there, {_samples(now)} here"
    every = dict.fromkeys([*theirs["versions"], *ours["versions"]], "not noted")
    found["versions"] = _said(*({**every, **about["versions"]} for about in (theirs, ours)))
    return found


def same_model(now: Baseline, before: Baseline) -> bool:
    """Whether it is known to be the very same: weights, plans and description of the data."""
    ours, theirs = ([about["model"].get(key) for key in FILES.values()] for about in (now.about, before.about))
    return None not in ours and ours == theirs


def other_attack(now: Baseline, before: Baseline, attack: str) -> list[str]:
    """How the attack of that name differs from the baseline's; empty too if one of the two does not tell."""
    ours, theirs = (about.get("attacks", {}).get(attack) for about in (now.about, before.about))
    return [] if ours is None or theirs is None else differences(theirs, ours)


def _said(there: Any, here: Any) -> str:
    if there is None or here is None:
        which = " and ".join(name for name, value in (("the baseline", there), ("this run", here)) if value is None)
        return f"not known of {which}"
    return "; ".join(text.removeprefix(": ") for text in differences(there, here)) or SAME


def _digits(about: Mapping[str, Any], key: str) -> str | None:
    whole = about["model"].get(key)
    return None if whole is None else str(whole)[:DIGITS]


def _samples(baseline: Baseline) -> str:
    return f"{len(baseline.samples)} of {len({case for case, _ in baseline.samples})} cases"
