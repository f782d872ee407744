"""The result of ``speed.py`` as Markdown: ratios, never seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speed_clock import PARTS
from speed_models import DIMENSIONS


def table(result: Mapping[str, Any]) -> str:
    """All parts of all dimensions."""
    blocks: list[str] = []
    writers = {"memory": _memory, "attacks": _attacks, "savings": _savings}
    writers = {"trainers": _trainers, "hardened": _trainers, **writers}
    for dimension in DIMENSIONS:
        for part, write in writers.items():
            if part in result.get(dimension, {}):
                found = result[dimension][part]
                blocks.append(f"## {dimension.upper()}, {part}\n\n{_conditions(found['conditions'])}\n\n{write(found)}")
    return "\n\n".join(blocks) + "\n"


def _conditions(conditions: Mapping[str, Any]) -> str:
    hardware, versions = conditions["hardware"], conditions["versions"]
    company = "" if hardware["alone"] else f" **Other processes ran beside it (load {hardware['load_average']}).**"
    return (
        f"`{conditions['command']}`, {conditions['date']}, {hardware['device']}, {hardware['threads']} thread(s) on "
        f"{hardware['cores']} cores, torch {versions['torch']}, nnU-Net {versions['nnunetv2']}.{company}"
    )


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _ratio(found: Mapping[str, float | None]) -> str:
    """Median, and the interval if there were enough values for one."""
    if found["low"] is None or found["high"] is None:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _trainers(found: Mapping[str, Any]) -> str:
    network = found["network"]
    text = (
        f"Features {network['features'][0]} to {max(network['features'])}, batch {network['batch']}, patch "
        f"{' × '.join(map(str, network['patch']))}. Seconds in stock steps: median and its 95 % interval.\n\n"
    )
    compiled = any("ratio_to_compiled" in row for row in found["rows"].values())
    parts = _rows(
        ["step of", "seconds", *(["in compiled ones"] if compiled else []), "forward passes a sample", *PARTS],
        [
            [
                name,
                _ratio(row["ratio"]),
                *([_ratio(row["ratio_to_compiled"])] if compiled else []),
                f"{row['passes_per_sample']:.1f}",
                *(f"{row['parts'][part]:.2f}" for part in PARTS),
            ]
            for name, row in found["rows"].items()
        ],
    )
    loading = ", ".join(f"{name} {_ratio(value)}" for name, value in found["loading"].items())
    shares = ", ".join(f"{key} {100 * value:.0f} %" for key, value in found["rows"]["IMA"]["shares"].items())
    agreed = found["agreement"]
    return (
        f"{text}{parts}\n\nLoading and augmenting a batch, by one process, in stock steps: {loading}. IMA's samples: "
        f"{shares}. The straightforward step and IMA's, in double precision: {agreed['attacked']} samples perturbed, "
        f"{agreed['crossed']} crossed, the same; images {agreed['images']:.0e} apart, margins {agreed['margins']:.0e}, "
        f"loss {agreed['loss']:.0e}, gradient {agreed['gradient']:.0e}."
    )


def _memory(found: Mapping[str, Any]) -> str:
    rows = [[name, "not measured" if mib is None else f"{mib:.0f}"] for name, mib in found["mib"].items()]
    cuda = found["conditions"]["command"].endswith("cuda") or "-device cuda" in found["conditions"]["command"]
    what = "most that PyTorch reserved" if cuda else "rise of the process's resident memory over what it held before"
    return _rows(["step of", f"MiB: {what}"], rows)


def _attacks(found: Mapping[str, Any]) -> str:
    text = f"{found['level']}, {found['samples']} validation samples, one run each; seconds in straightforward PGD-40s."
    memory = any("mib" in row for row in found["rows"])
    header = ["model", "attack", "seconds", "forward passes", "backward passes", "mean Dice left (%)"]
    rows = [
        [
            row["model"],
            row["attack"],
            f"{row['ratio']:.2f}",
            f"{row['forward_passes']:.0f}",
            f"{row['backward_passes']:.0f}",
            "" if row["adi"] is None else f"{100 * row['adi']:.1f}",
            *([f"{row['mib']:.0f}" if "mib" in row else ""] if memory else []),
        ]
        for row in found["rows"]
    ]
    return f"{text}\n\n{_rows(header + (['MiB'] if memory else []), rows)}"


def _savings(found: Mapping[str, Any]) -> str:
    text = "Loss, distance and margins are those that the inner attack finds, as a share of what it finds as it is."
    header = ["change", "predicted", "step, of IMA's", "stock steps", "passes", "loss", "distance", "new margins"]
    rows = [
        [
            row["change"],
            row["predicted"] or "",
            f"{100 * row['share_of_ima']:.0f} %",
            _ratio(row["ratio"]),
            f"{row['passes_per_sample']:.1f}",
            *(f"{100 * row[key]:.2f} %" for key in ("loss", "distance", "margin")),
        ]
        for row in found["rows"]
    ]
    left_out = [f"{name} ({reason})" for name, reason in found.get("left_out", {}).items()]
    ending = f"\n\nNot measured here: {'; '.join(left_out)}." if left_out else ""
    return f"{text}\n\n{_rows(header, rows)}{ending}"
