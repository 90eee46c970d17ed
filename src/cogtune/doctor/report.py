"""Format the doctor's findings as text, in the language of the error messages, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cogtune.doctor.checks import Diagnosis
from cogtune.doctor.facts import GIB, Facts
from cogtune.errors import catalogue
from cogtune.language import language, phrase, tr

_WORDS = {
    "en": {
        "error": "error",
        "warning": "warning",
        "note": "note",
        "fix": "fix",
        "fine": phrase("everything looks right"),
    },
    "zh": {"error": "错误", "warning": "警告", "note": "提示", "fix": "处理", "fine": "一切正常"},
}


def lines(facts: Facts, findings: list[Diagnosis]) -> list[str]:
    """Yield a few lines about the machine, then each finding with its fix."""
    words = _WORDS[language()]
    text = [*_machine(facts), ""]
    for finding in findings:
        head = f"{words[finding.level]}[{finding.code}]"
        if language() == "zh":
            text.append(f"{head}：{catalogue()[finding.code].cause_zh}（{finding.found}）")
        else:
            text.append(f"{head}: {finding.found}")
        text.append(f"  {words['fix']}: {finding.fix}")
    if not any(finding.level != "note" for finding in findings):
        text.append(words["fine"])
    return text


def to_dict(facts: Facts, findings: list[Diagnosis]) -> dict[str, Any]:
    """Return the content of ``--json``."""
    return {"machine": asdict(facts), "findings": [asdict(finding) for finding in findings]}


def _machine(facts: Facts) -> list[str]:
    versions = facts.versions
    shown = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    text = [f"Python {'.'.join(map(str, facts.python))} on {facts.system}; {', '.join(shown)}"]
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
    text += [f"{url}: {('answers' if answers else tr('no answer'))}" for url, answers in facts.reachable.items()]
    return text
