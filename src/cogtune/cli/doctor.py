"""``cogtune doctor``: what this machine has, what is missing, and the exact fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_HELP = """Look at this machine: versions, cards, memory, disk, hubs; what is wrong, and the command that repairs it.

  cogtune doctor

Asks the model hubs for one page each to see whether they answer; --offline leaves that out. Exit code 2 when something
has to be repaired before training can work, 0 otherwise."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor", help=_HELP, short_help="What this machine has, what is missing, and the fix.")(_doctor)


def _doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try the hubs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    from cogtune.doctor import report
    from cogtune.doctor.checks import check
    from cogtune.doctor.facts import read_facts

    facts = read_facts(network=not offline, folder=Path.cwd())
    findings = check(facts)
    if json:
        import json as writer

        print(writer.dumps(report.to_dict(facts, findings), indent=1, ensure_ascii=False))
    else:
        print("\n".join(report.lines(facts, findings)))
    return 2 if any(finding.level == "error" for finding in findings) else 0
