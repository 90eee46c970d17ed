"""The folder that is given away: the adapter's files, a model card written from the run, and the base's licences.

Nothing of the machine that trained it is in there: paths are left out, and the base is known by its name and its
fingerprint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.adapters.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, find_adapter, read_adapter
from cogtune.adapters.model_card import CARD_NAME, Results, is_own_card, write_card
from cogtune.adapters.provenance import Provenance, read_provenance, write_provenance
from cogtune.errors import OutputFolderError
from cogtune.evaluate.report.chart import Frame, Line, line_chart
from cogtune.evaluate.report.load import read_result
from cogtune.evaluate.result import RESULT_FILE
from cogtune.evaluate.run_folder import RunFolder, is_run, read_run
from cogtune.language import english, tr
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.locks import lock_beside
from cogtune.system.terminal import typed

CURVES_NAME = "curves.svg"
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "MODEL_LICENSE", "NOTICE", "USE_POLICY.md")
_COLOURS = ("#1f6feb", "#d1242f")


@dataclass(frozen=True)
class ExportReport:
    """Result of an export. ``notes``: sentences for the user about what is not in the folder, and why."""

    folder: Path
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...]


def export_adapter(adapter: str | Path, output: str | Path) -> ExportReport:
    """Write an adapter as a folder to give away: weights, settings, a model card with results, licences.

    Example:
        >>> report = cogtune.export_adapter("output", "to-share")
        >>> print(report.files)
        >>> print(report.notes)

    Args:
        adapter: an adapter folder, or a training's output, whose curves and ``eval`` results then are on the card.
        output: the new folder; it must not exist.

    Raises:
        AdapterError: there is no adapter, or it is damaged.
        OutputFolderError, DiskFullError: ``output`` exists or cannot be written; nothing is left behind.
    """
    source, output = find_adapter(adapter), Path(output)
    read_adapter(source)
    _require_new(output)
    run = next((read_run(place) for place in (Path(adapter), source.parent) if is_run(place)), None)
    with lock_beside(output, tr("choose another --output")), explained(output):
        _require_new(output)
        with files.growing_folder(output, durable=True) as folder:
            notes = _fill(folder, source, run)
    names = tuple(sorted(path.name for path in output.iterdir()))
    return ExportReport(output, names, sum((output / name).stat().st_size for name in names), tuple(notes))


def _fill(folder: Path, source: Path, run: RunFolder | None) -> list[str]:
    notes = []
    shutil.copyfile(source / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    provenance = read_provenance(source)
    _write_config(source, folder, provenance)
    if provenance is not None:
        base = {key: value for key, value in provenance.base.items() if key != "path"}
        write_provenance(folder, replace(provenance, base=base))
        notes += _copy_licences(provenance.base.get("path"), folder)
    else:
        notes.append(tr("the adapter has no cogtune.json: its card says nothing about its training"))
    notes += _card(folder, source, provenance, run)
    return notes


def _write_config(source: Path, folder: Path, provenance: Provenance | None) -> None:
    """Write PEFT's configuration with the base's name in place of its path on this machine."""
    config = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    named = config.get("base_model_name_or_path")
    hub = None if provenance is None else provenance.base.get("hub")
    if hub is not None:
        config["base_model_name_or_path"] = hub
    elif named and Path(named).is_absolute():
        config["base_model_name_or_path"] = Path(named).name
    files.write_json(folder / CONFIG_NAME, config, indent=2)


def _copy_licences(base: str | None, folder: Path) -> list[str]:
    """Copy the licences of a base that is on this machine."""
    found = [] if base is None else [name for name in _LICENCES if (Path(base) / name).is_file()]
    for name in found:
        shutil.copyfile(Path(base or "") / name, folder / name)
    if found:
        return []
    return [tr("no licence file was found beside the base; add those that your base came with")]


def _card(folder: Path, source: Path, provenance: Provenance | None, run: RunFolder | None) -> list[str]:
    own = source / CARD_NAME
    if own.is_file() and not is_own_card(own):
        shutil.copyfile(own, folder / CARD_NAME)
        return [tr("{name} is yours and was taken as it is, without results and curves", name=CARD_NAME)]
    if provenance is None:
        return []
    notes = [] if run else [tr("this is not a training's output folder: its card has no curves and no results")]
    shared = replace(provenance, base={key: value for key, value in provenance.base.items() if key != "path"})
    if "hub" not in shared.base and (path := provenance.base.get("path")):
        shared = replace(shared, base={**shared.base, "path": Path(path).name})
    steps, losses = _losses(run)
    results = _results(folder, run)
    if run is not None and not results.table:
        notes.append(
            tr(
                "there is no evaluation in {folder}: its card says nothing about answers; `cogtune eval --data ..."
                " --adapter {run} --against base --output {folder}` makes one",
                folder=typed(run.path / "eval"),
                run=typed(run.path),
            )
        )
    with english():
        write_card(folder, shared, losses, steps, results)
    return notes


def _losses(run: RunFolder | None) -> tuple[int, dict[str, float | None]]:
    if run is None:
        return 0, {}
    lines = {kind: [line for line in run.lines(kind) if isinstance(line.get("loss"), float)]
             for kind in ("train", "validation")}  # fmt: skip
    last = {kind: found[-1]["loss"] if found else None for kind, found in lines.items()}
    best = min((line["loss"] for line in lines["validation"]), default=None)
    result = run.result or {}
    steps = int(result.get("best_step") or result.get("step") or run.steps)
    return steps, {"training, last": last["train"], "validation, last": last["validation"], "validation, best": best}


def _results(folder: Path, run: RunFolder | None) -> Results:
    """Return what the run's evaluation says, and draw its curves into the folder."""
    if run is None:
        return Results()
    drawn = _draw(run)
    if drawn:
        files.write_text(folder / CURVES_NAME, drawn)
    data = {"fingerprint": str(run.data["fingerprint"])} if run.data.get("fingerprint") else {}
    curves = CURVES_NAME if drawn else None
    if not (run.path / "eval" / RESULT_FILE).is_file():
        return Results(curves=curves, data=data)
    result, _ = read_result(run.path / "eval")
    return Results(tuple(result["verdict"]["en"]), tuple(_rows(result)), curves, data)


def _rows(result: Mapping[str, Any]) -> list[Sequence[str]]:
    models = [model["name"] for model in result["models"]]
    rows: list[Sequence[str]] = [("metric", *models)]
    for metric in result["metrics"]:
        cells = [
            "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value[key] for key in ("value", "low", "high")))
            for value in metric["values"]
        ]
        rows.append((metric["name"], *cells))
    return rows


def _draw(run: RunFolder) -> str | None:
    lines = []
    for colour, kind in zip(_COLOURS, ("train", "validation"), strict=True):
        points = [(line["step"], line["loss"]) for line in run.lines(kind) if isinstance(line.get("loss"), float)]
        if len(points) > 1:
            lines.append(Line(kind, "line", points, colour=colour, dots=len(points) <= 24))
    if not lines:
        return None
    frame = Frame("loss by step", title="loss, nats per label", below="step", top=36, right=90)
    drawn = line_chart(lines, frame, log=all(y > 0 for line in lines for _, y in line.points), named=True)
    return drawn.replace(">", '><rect width="100%" height="100%" fill="#fff"/>', 1)  # legible on a dark page


def require_exported(folder: Path) -> None:
    """Check that a folder holds no path of this machine, so that it may be uploaded as it is.

    Raises:
        OutputFolderError: it is not an exported one.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    provenance = read_provenance(folder)
    local = Path(str(config.get("base_model_name_or_path") or "")).is_absolute()
    if local or (provenance is not None and "path" in provenance.base):
        raise OutputFolderError(
            tr("{folder}: not an exported folder: its files name paths of this machine", folder=folder),
            hint=tr("add --output DIR: the exported copy is what is uploaded"),
        )


def _require_new(output: Path) -> None:
    if output.exists():
        raise OutputFolderError(
            tr("{output}: exists already", output=output), hint=tr("choose another --output; nothing is overwritten")
        )
