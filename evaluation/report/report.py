"""Put a report together: the page, and its tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from nnunet_ima import __version__
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.report import sentences
from nnunet_ima.evaluation.report.attacks_run import attacks_of
from nnunet_ima.evaluation.report.drawings import drawings_of
from nnunet_ima.evaluation.report.figures import Setting, colours_of, settings_of
from nnunet_ima.evaluation.report.long_csv import as_csv
from nnunet_ima.evaluation.report.pictures import both_sides, perturbation
from nnunet_ima.evaluation.report.repeat import command_of_run, settings_of_run
from nnunet_ima.evaluation.report.tables import (
    Table,
    as_latex,
    as_markdown,
    case_table,
    class_spread_table,
    class_table,
    difference_table,
    end_to_end_table,
    further_table,
    published_tables,
    robustness_table,
)
from nnunet_ima.evaluation.report.trainings import trainings_of
from nnunet_ima.evaluation.results import UNTOUCHED, Key, Results, read_results
from nnunet_ima.files import write_text

WORST_SHOWN = 2


def write_report(
    folders: Sequence[Path], output: Path, names: Sequence[str] | None = None, note: str = "", caveat: str = ""
) -> Path:
    """Write report.html and, beside it, tables.csv, tables.md and tables.tex.

    Args:
        folders: of finished evaluations, of one or several models, norms and protocols.
        output: a folder; it is made.
        names: one for each folder, for people; the same name for runs of the same model. By default the trainers'.
        note: what the reader ought to know about the models, shown after what the figures say.
        caveat: a sentence that is to be read before them.

    Returns:
        The page.

    Raises:
        UserError: a folder holds no finished evaluation, or the names do not fit.
    """
    if names is not None and len(names) != len(folders):
        raise UserError(f"There are {len(folders)} runs but {len(names)} names; give one name for each run.")
    runs = _read(folders, names)
    settings = settings_of(runs)
    for setting in settings:
        _refuse_twice(setting)
    tables = [table for setting in settings for table in _tables(setting)]
    page = _page(runs, settings, note, caveat)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "tables.csv", as_csv(settings))
    write_text(output / "tables.md", "\n".join(as_markdown(table) for table in tables))
    write_text(output / "tables.tex", "\n".join(as_latex(table) for table in tables))
    write_text(output / "report.html", page)
    return output / "report.html"


def _read(folders: Sequence[Path], names: Sequence[str] | None) -> list[Results]:
    runs = [read_results(folder) for folder in folders]
    titles = _titles(runs) if names is None else [" ".join(name.split()) for name in names]
    weights: dict[str, str] = {}
    for run, title in zip(runs, titles, strict=True):
        if weights.setdefault(title, run.summary["model"]["sha256"]) != run.summary["model"]["sha256"]:
            raise UserError(
                f"Two models are both called {title}, one of them in {run.folder}; tell them apart with --names."
            )
    return [replace(run, title=title) for run, title in zip(runs, titles, strict=True)]


def _titles(runs: Sequence[Results]) -> list[str]:
    """As short as tells the models apart."""
    models = [run.summary["model"] for run in runs]
    ways = [[_trained_by(run) for run in runs]]
    for more in (("configuration",), ("plans", "fold"), ("dataset", "checkpoint")):
        ways.append([" ".join([title, *(str(model[key]) for key in more)])
                     for title, model in zip(ways[-1], models, strict=True)])  # fmt: skip
    different = {model["sha256"] for model in models}
    told = (titles for titles in ways if len(set(titles)) >= len(different))
    return next(told, ways[-1])


def _trained_by(run: Results) -> str:
    """The trainer, in short; of an exported model the one that it had before.

    A checkpoint of nnU-Net's own trainer may be stock or exported. Where nothing was noted, its name is that of the
    trainer, as in the model folder's name, which claims nothing.
    """
    trainer = _trainer(run)
    short = trainer.removeprefix("nnUNetTrainer") or trainer
    return f"{short} exported" if run.summary.get("exported_from") else short


def _trainer(run: Results) -> str:
    return str((run.summary.get("exported_from") or run.summary["model"])["trainer"])


def _refuse_twice(setting: Setting) -> None:
    titles = [run.title for run in setting.runs]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise UserError(
            f"Two runs of {setting.name} are both called {twice[0]}; give the same run once, or tell them apart with "
            f"--names."
        )


def _tables(setting: Setting) -> list[Table]:
    made = [
        robustness_table(setting),
        difference_table(setting),
        *published_tables(setting),
        class_table(setting),
        class_spread_table(setting),
        further_table(setting),
        end_to_end_table(setting),
        case_table(setting),
    ]
    return [table for table in made if table is not None]


def _page(runs: Sequence[Results], settings: Sequence[Setting], note: str, caveat: str = "") -> str:
    environment = Environment(
        loader=PackageLoader("nnunet_ima.evaluation.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    colours = colours_of(runs)
    sections = [
        {
            "name": setting.name,
            "setting": setting,
            "headline": sentences.headline(setting),
            "evidence": sentences.evidence(setting),
            "price": sentences.price(setting),
            "left_out": sentences.left_out(setting),
            "models": [
                {"title": run.title, "colour": colours[run.title], "sentence": sentences.about(setting, run)}
                for run in setting.runs
            ],
            "drawings": drawings_of(setting, colours),
            "tables": _tables(setting),
            "drawn": _drawn(setting),
            "worst": _worst(setting),
        }
        for setting in settings
    ]
    return environment.get_template("page.html").render(
        sections=sections,
        warnings=list(dict.fromkeys([
            *(text for run in runs for text in sentences.warnings(run)),
            *(text for setting in settings for text in sentences.unit_warning(setting)),
        ])),
        checks=[_checks(setting, run) for setting in settings for run in setting.runs],
        attacks=attacks_of(runs),
        trainings=trainings_of(_trainer(run) for run in runs),
        protocols={setting.protocol for setting in settings},
        whole_cases=any(run.cases.get(UNTOUCHED) for run in runs),
        corrected=any(setting.correction for setting in settings),
        few=any(setting.few_cases for setting in settings),
        end_to_end=any("end_to_end" in run.summary for run in runs),
        details=[{"title": run.title, "name": setting.name, "command": command_of_run(run),
                  "text": json.dumps(settings_of_run(run), indent=2)}
                 for setting in settings for run in setting.runs],
        threshold=100 * float(runs[0].summary["criterion"]["dice_threshold"]),
        note=note,
        caveat=caveat,
        dates=_first_and_last([run.summary.get("date") for run in runs]),
        version=__version__,
    )  # fmt: skip


def _first_and_last(dates: Sequence[str | None]) -> list[str]:
    """Of ISO dates; one if they are the same, none if an older run does not tell its own."""
    known = sorted({date for date in dates if date is not None})
    return [] if None in dates else [*known[:1], *known[1:][-1:]]


def _checks(setting: Setting, run: Results) -> dict[str, Any]:
    found = run.summary["trust"]
    return {
        "title": run.title,
        "name": f"{setting.norm_name}, {setting.protocol}",
        "items": found,
        "items_made": len(found),
        "items_failed": sum(not item["passed"] for item in found),
    }


def _drawn(setting: Setting) -> list[list[dict[str, Any]]]:
    """Samples that all models were attacked on, nobody's choice: of each, what became of it in each model."""
    level = setting.telling_level
    # Runs of before there were dates kept only what lost most: a lot that is there is so for that.
    if level is None or not all("date" in run.summary for run in setting.runs):
        return []
    keys = [setting.worst(run, level) for run in setting.runs]
    found = [{(one.case, one.tile): one for one in run.drawn(key)} for run, key in zip(setting.runs, keys, strict=True)]
    rows = [
        [examples[sample] for examples in found] for sample in found[0] if all(sample in examples for examples in found)
    ]
    # Plans with other spacings number other patches the same.
    same = [row for row in rows if all(np.array_equal(example.target, row[0].target) for example in row)]
    return [
        [_shown(setting, run, key, level, example) for run, key, example in zip(setting.runs, keys, row, strict=True)]
        for row in same
    ]


def _worst(setting: Setting) -> list[dict[str, Any]]:
    level = setting.telling_level
    if level is None:
        return []
    return [
        _shown(setting, run, setting.worst(run, level), level, example)
        for run in setting.runs
        for example in run.worst(setting.worst(run, level))[:WORST_SHOWN]
    ]


def _shown(setting: Setting, run: Results, key: Key, level: str, example: Example) -> dict[str, Any]:
    before, after = both_sides(example)
    added, most = perturbation(example)
    return {
        "model": run.title, "title": example.title, "condition": f"{key[0]} at {setting.norm_name} {level}",
        "before": before, "after": after, "added": added, "most": most, "scale": setting.scale,
        "dice_before": 100 * example.dice_before, "dice_after": 100 * example.dice_after,
    }  # fmt: skip
