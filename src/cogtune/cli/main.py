"""The command ``cogtune``: one short module per command, and one place that turns errors into exit codes.

Nothing here imports torch, transformers or pydantic, so that help is fast.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import cogtune
from cogtune.cli.command import Command
from cogtune.distributed import environment
from cogtune.errors import CogtuneError, InputError, check_language, render
from cogtune.language import english, phrase, tr
from cogtune.system import files, terminal
from cogtune.system.allocator import prepare_allocator
from cogtune.system.file_errors import system_reason
from cogtune.system.names import is_unicode

COMMANDS = {
    "doctor": "doctor",
    "download": "download",
    "init": "init",
    "plan": "plan",
    "train": "train",
    "chat": "chat",
    "predict": "predict",
    "eval": "eval",
    "report": "report",
    "runs": "report",
    "compare": "report",
    "serve": "serve",
    "web": "web",
    "merge": "merge",
    "export": "export",
    "data check": "data_check",
    "data preview": "data_preview",
    "data convert": "data_convert",
    "data cache": "data_cache",
    "demo": "demo",
    "bench train": "bench",
    "bench sweep": "bench",
    "bench fit": "bench",
    "bench decode": "bench",
    "bench fill": "bench",
    "bench captions": "bench",
    "bench loader": "bench",
    "bench load": "bench",
    "bench make-checkpoint": "bench",
}
"""Every command in the order of the help, with the module of this package that lists it in ``COMMANDS``."""

GROUPS = {"data": phrase("Look at data sets and prepare them."), "bench": phrase("Measure this machine.")}
"""The first words of two-word commands."""

_MEANT = {
    "finetune": "train", "fine-tune": "train", "sft": "train", "fit": "train", "run": "train", "infer": "predict",
    "inference": "predict", "generate": "predict", "answer": "predict", "ask": "chat", "talk": "chat", "cli": "chat",
    "check": "data check", "validate": "data check", "preview": "data preview", "convert": "data convert",
    "evaluate": "eval", "score": "eval",
    "cache": "data cache", "benchmark": "bench", "estimate": "plan", "memory": "plan", "config": "init", "new": "init",
}  # fmt: skip
"""Other tools' names for commands."""

_BUG_REPORT = phrase("this is a bug in cogtune; please report it with the lines above")


def find_command(name: str) -> Command:
    """Import and return the command ``name``."""
    found: tuple[Command, ...] = importlib.import_module(f"cogtune.cli.{COMMANDS[name]}").COMMANDS
    return next(command for command in found if command.name == name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: run the command line and return the exit code."""
    prepare_allocator()
    # its import warns, on some CPUs, that a package of kernels from a hub is not there: nothing here needs it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and environment.is_local_rank_flag(given[0]):
        given.pop(0)  # `deepspeed --module cogtune ...` passes it here and in the environment, which is what we read
    return guarded(lambda: dispatch(given))


def dispatch(words: list[str]) -> int:
    """Run the command that ``words`` start with, or print the help they ask for.

    Raises:
        InputError: no such command; and whatever the command raises.
    """
    from cogtune.cli import help

    _require_unicode([*words, os.getcwd()])
    asked = [word for word in words if word in ("--help", "-h")]
    first = words[0] if words else "--help"
    if first == "help":
        return dispatch([*words[1:], "--help"])
    if first == "--version":
        print(f"cogtune {cogtune.__version__}")
        return 0
    if first in ("--help", "-h"):
        print("\n".join(help.overview(map(find_command, COMMANDS), GROUPS.items())))
        return 0
    if first in GROUPS and (len(words) == 1 or words[1].startswith("-")):
        inside = [find_command(name) for name in COMMANDS if name.startswith(f"{first} ")]
        print("\n".join(help.group_help(first, GROUPS[first], inside)))
        return 0
    length = 2 if first in GROUPS else 1
    name = " ".join(words[:length])
    if name not in COMMANDS:
        raise _unknown(name)
    command = find_command(name)
    if asked:
        print("\n".join(help.command_help(command)))
        return 0
    if command.needs_model:
        from cogtune.system.libraries import refuse_broken

        refuse_broken()
    return command(words[length:])


def _require_unicode(texts: Sequence[str]) -> None:
    """Refuse a path that cannot be written into JSON, YAML or an adapter's card.

    Raises:
        InputError: one of ``texts`` is not UTF-8.
    """
    wrong = next((text for text in texts if not is_unicode(text)), None)
    if wrong is not None:
        raise InputError(
            tr("{name}: this name is not UTF-8; cogtune writes paths into files that have to be", name=wrong),
            hint=tr(
                "rename the file or folder in UTF-8: `convmv -f gbk -t utf-8 --notest NAME` does, for a Chinese one"
            ),
            code="name-encoding",
        )


def _unknown(name: str) -> InputError:
    """Return the error for an unknown command."""
    if name.startswith("-"):
        return InputError(
            tr("No such flag `{name}` before a command", name=name),
            hint=tr("`cogtune --help` lists both"),
            code="usage",
        )
    near = difflib.get_close_matches(name, [*COMMANDS, *GROUPS], n=1, cutoff=0.7)
    meant = _MEANT.get(name, near[0] if near else None)
    hint = tr("`cogtune --help` lists the commands")
    return InputError(
        tr("No such command `{name}`", name=name),
        hint=tr("did you mean `cogtune {meant}`? {hint}", meant=meant, hint=hint) if meant else hint,
        code="usage",
    )


def guarded(call: Callable[[], object]) -> int:
    """Run ``call`` as a command: print its errors to stderr and return the exit code for them.

    The exit code is ``call``'s result if that is an int, else 0. A process of a distributed run exits here directly:
    tearing down torch's process group can hang or abort after everything was saved. So does a rank under torchrun that
    could not reach the others: gloo's threads can keep it alive for ever.
    """
    with terminal.protected():
        return _guarded(call)


def _guarded(call: Callable[[], object]) -> int:
    code = _run(call)
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if joined or (distributed is not None and environment.is_launched_by_torchrun()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(call: Callable[[], object]) -> int:
    try:
        check_language()
        with nullcontext() if _shows_chinese() else english():
            result = call()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CogtuneError as error:
        if error.code == "stopped":  # every rank stops; rank 0 reports it
            is_main = environment.is_main()
            return _complain(str(error), error.exit_code) if is_main else error.exit_code
        told = _report_to_launcher(error.render(), error.code == "peer-lost")
        return error.exit_code if told else _complain(error.render(), error.exit_code)
    except KeyboardInterrupt:
        return _complain(tr("stopped by Ctrl-C"), 130)
    except BrokenPipeError:
        # the reader of our output is gone (`| head`), and the interpreter must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        reason = system_reason(error)
        if reason is not None:  # of this machine and not of this program
            text = render("file-access", *reason)
            return 1 if _report_to_launcher(text) else _complain(text, 1)
        traceback.print_exc()
        text = render("bug", f"{type(error).__name__}: {error}", tr(_BUG_REPORT))
        return 1 if _report_to_launcher(text) else _complain(text, 1)


def _shows_chinese() -> bool:
    """Return whether standard output can hold Chinese; a Latin terminal would get escapes or nothing."""
    try:
        "中文".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _report_to_launcher(text: str, consequence: bool = False) -> bool:
    """Write ``text`` where torchrun looks for a rank's error, in its format. True: our own launcher will print it.

    torchrun takes the earliest error as the cause, so a mere ``consequence`` of another rank's failure gets a later
    time.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    stamp = str(int(time.time()) + (60 if consequence else 0))
    content = {"message": {"message": text, "extraInfo": {"py_callstack": "", "timestamp": stamp}}}
    try:
        files.write_json(Path(path), content)  # the rank can be killed here, and torchrun cannot read half a file
    except OSError:
        return False
    return "COGTUNE_LAUNCHED" in os.environ


def _complain(text: str, code: int) -> int:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
