"""Format the doctor's findings as text, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cogtune.doctor.checks import Diagnosis
from cogtune.doctor.facts import GIB, Facts
from cogtune.language import phrase, tr

_LEVELS = {"error": phrase("error"), "warning": phrase("warning"), "note": phrase("note")}


def lines(facts: Facts, findings: list[Diagnosis]) -> list[str]:
    """Return a few lines about the machine, then each finding with its fix."""
    text = [*_machine(facts), ""]
    for finding in findings:
        level = tr(_LEVELS[finding.level])
        text.append(tr("{level}[{code}]: {found}", level=level, code=finding.code, found=finding.found))
        text.append(tr("  fix: {fix}", fix=finding.fix))
    if not any(finding.level != "note" for finding in findings):
        text.append(tr("everything looks right"))
    return text


def to_dict(facts: Facts, findings: list[Diagnosis]) -> dict[str, Any]:
    """Return the content of ``--json``."""
    return {"machine": asdict(facts), "findings": [asdict(finding) for finding in findings]}


def _machine(facts: Facts) -> list[str]:
    versions = facts.versions
    shown = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    text = [
        tr(
            "Python {str} on {system}; {shown}",
            str=".".join(map(str, facts.python)),
            system=facts.system,
            shown=", ".join(shown),
        )
    ]
    for index, card in enumerate(facts.gpus):
        text.append(
            tr(
                "card {index}: {name}, {free:.1f} of {total:.1f} GiB free",
                index=index,
                name=card.name,
                free=card.free / GIB,
                total=card.total / GIB,
            )
        )
    if not facts.gpus:
        text.append(tr("no GPU in use: CPU"))
    if facts.memory is not None and facts.memory_available is not None:
        text.append(
            tr(
                "host memory: {memory_available:.0f} of {memory:.0f} GiB available",
                memory_available=facts.memory_available / GIB,
                memory=facts.memory / GIB,
            )
        )
    text += [
        tr("disk: {free:.0f} GiB free at {place}", free=free / GIB, place=place)
        for place, free in facts.disk_free.items()
    ]
    text += [
        tr("{url}: answers", url=url) if answers else tr("{url}: no answer", url=url)
        for url, answers in facts.reachable.items()
    ]
    return text
