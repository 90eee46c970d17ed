"""The model card of an adapter folder: ``README.md`` with base, licence, data counts, settings, losses and use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogtune.adapters.provenance import Provenance, changed_settings
from cogtune.system import files

CARD_NAME = "README.md"
_MARK = "<!-- Written by cogtune. Without this line the file is yours: cogtune leaves it as it is. -->"
_BLANK, _BLANKS = "[More Information Needed]", 10  # peft's form has over 20 of them
_SHOWN = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
_LICENCE = """\
An adapter is made from its base and stays under the base's licences; add the licence of your data.

- The weights of CogVLM2 are under the CogVLM2 licence, and those with Llama 3 in the name under the Meta Llama 3
  Community License as well. Both files come with the base.
- Meta's licence asks of whoever passes such a model on: a copy of the licence, the words "Built with Meta Llama 3" in a
  prominent place, and a name that begins with "Llama 3".
"""


@dataclass(frozen=True)
class Results:
    """What an evaluation found, and what else a card shows of a run.

    Attributes:
        verdict: sentences.
        table: rows of metrics, the first of them the heads.
        curves: a picture beside the card.
        data: facts of the data, by name.
    """

    verdict: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    curves: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)


def write_card(
    folder: Path,
    provenance: Provenance,
    losses: Mapping[str, float | None],
    step: int,
    results: Results | None = None,
) -> None:
    """Write the card of the adapter in ``folder``, in place of one of cogtune's or of peft's empty form.

    Args:
        losses: mean loss per label in nats, by what it was measured on; None where it was not.
        step: optimiser steps that the adapter was trained for.
        results: of an evaluation, when the adapter is handed on.
    """
    lora = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    files.write_text(folder / CARD_NAME, _card(provenance, lora, losses, step, results or Results()))


def is_own_card(path: Path) -> bool:
    """Whether a card may be replaced: it has cogtune's line, which a user takes out; or it is peft's empty form."""
    try:
        text = path.read_text(encoding="utf-8")
        return _MARK in text or text.count(_BLANK) >= _BLANKS
    except (OSError, UnicodeDecodeError):
        return False


def _card(
    provenance: Provenance, lora: Mapping[str, Any], losses: Mapping[str, float | None], step: int, results: Results
) -> str:
    hub = provenance.base.get("hub")
    path = provenance.base.get("path")
    name = hub or (Path(path).name if path else "the base")
    head = ["---", *([f"base_model: {hub}"] if hub else []), "library_name: peft", "license: other"]
    head += ["pipeline_tag: image-text-to-text", "tags:", "- lora", "- cogtune", "---"]
    kept = {shown: lora.get(key) for key, shown in _SHOWN.items() if lora.get(key)}
    settings = ", ".join(f"{shown} {value}" for shown, value in kept.items())
    counts = "".join(f"| {key.replace('_', ' ')} | {count:,} |\n" for key, count in provenance.data.items())
    counts += "".join(f"| {_cell(key)} | {_code(value)} |\n" for key, value in results.data.items())
    measured = "".join(f"| {what} | {loss:.4f} |\n" for what, loss in losses.items() if loss is not None)
    versions = ", ".join(f"{key} {version}" for key, version in provenance.versions.items())
    fingerprint = provenance.base.get("fingerprint")
    parts = [
        "\n".join(head),
        _MARK,
        f"# LoRA adapter for {_code(name)}",
        f"An adapter for the base model {_code(name)}, trained for {step:,} step{'s' * (step != 1)} with cogtune."
        + (f" The base's fingerprint is {_code(fingerprint)}." if fingerprint else ""),
        "## Use",
        f"```bash\ncogtune chat --model BASE --adapter THIS_FOLDER --image photo.jpg\n```\n\nBASE is the folder of"
        f" {_code(name)}, or its name on the hub. `cogtune.json` holds template, number formats and rules for pictures"
        " of the training, and cogtune follows them. The layout is PEFT's.",
        f"## Training\n\nLoRA: {settings}. Settings of answers, other than the defaults:"
        f" {changed_settings(provenance) or 'none'}.",
        f"| data | count |\n|---|---|\n{counts}".rstrip(),
        *([f"| loss, nats per label | |\n|---|---|\n{measured}".rstrip()] if measured else []),
        *([f"![Loss by step]({results.curves})"] if results.curves else []),
        *_evaluated(results),
        f"Made with {versions}.",
        f"## Licence\n\n{_LICENCE}",
    ]
    return "\n\n".join(parts)


def _evaluated(results: Results) -> list[str]:
    """The results: the verdict, then a row for each metric."""
    if not results.table:
        return []
    head, *rows = results.table
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    said = "\n".join(f"- {_cell(line)}" for line in results.verdict)
    return ["## Results", *([said] if said else []), f"In points, with 95 % intervals:\n\n{table}"]


def _cell(text: str) -> str:
    """A text as Markdown shows it in a table or a line, whatever is in it."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return "".join(f"\\{letter}" if letter in "\\|<>[]`*_" else letter for letter in plain)


def _code(text: str) -> str:
    """A name as Markdown shows it, whatever is in it."""
    return f"`{''.join(letter if letter.isprintable() and letter != '`' else '?' for letter in text)}`"
