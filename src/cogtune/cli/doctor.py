"""``cogtune doctor``: report what this machine has, what is missing, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments

_ABOUT = """\
Look at this machine: versions, cards, memory, disk, hubs; what is wrong, and the command that repairs it.

Asks the model hubs for one page each to see whether they answer; --offline leaves that out. Exit code 2 when something
has to be repaired before training can work, 0 otherwise."""


@dataclass(frozen=True)
class _Flags:
    offline: bool = flag(False, "Do not try the hubs.")
    json: bool = flag(False, "Print everything as JSON.")


def _doctor(flags: _Flags, line: Arguments) -> int:
    from cogtune.doctor import report
    from cogtune.doctor.checks import check
    from cogtune.doctor.facts import read_facts

    facts = read_facts(network=not flags.offline, folder=Path.cwd())
    findings = check(facts)
    if flags.json:
        import json as writer

        print(writer.dumps(report.to_dict(facts, findings), indent=1, ensure_ascii=False))
    else:
        print("\n".join(report.lines(facts, findings)))
    return 2 if any(finding.level == "error" for finding in findings) else 0


COMMANDS = (
    Command(
        name="doctor",
        summary="What this machine has, what is missing, and the fix.",
        about=_ABOUT,
        examples=("cogtune doctor", "cogtune doctor --offline --json"),
        run=_doctor,
        flags=_Flags,
        needs_model=False,
    ),
)
