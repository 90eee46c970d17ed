"""The command ``cogtune``: one short file per command, and one place that turns errors into exit codes.

Nothing here imports torch, transformers or pydantic: help has to answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

import cogtune
from cogtune.distributed import environment
from cogtune.errors import CogtuneError, language, render
from cogtune.system import files
from cogtune.system.allocator import prepare_allocator

COMMANDS = ("doctor", "download", "init", "plan", "train", "chat", "predict", "merge", "data", "demo", "bench")
"""Modules of this package, in the order of the help; each has ``register(app)``."""

WITHOUT_MODEL = ("doctor", "download", "plan")
"""Commands that work, and are wanted, where a library is broken."""

_BUG_REPORT = "this is a bug in cogtune; please report it with the lines above"
# typer brings its own click since 0.27, so its classes are reached through the public one
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cogtune {cogtune.__version__}")
        raise typer.Exit


def _start(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune CogVLM2 with LoRA and run the result: one GPU, many, or a laptop's CPU."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
    elif ctx.invoked_subcommand not in WITHOUT_MODEL:
        from cogtune.system.libraries import refuse_broken

        refuse_broken()


def make_app(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """The application with every command registered."""
    app = typer.Typer(
        name="cogtune",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(
        invoke_without_command=True,
        epilog="`cogtune COMMAND --help` explains one. Exit codes: 0 done, 1 the run failed, 2 the input is wrong.",
    )(_start)
    for name in commands:
        importlib.import_module(f"cogtune.cli.{name}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: run the command line and return its exit code."""
    prepare_allocator()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and environment.is_local_rank_flag(given[0]):
        given.pop(0)  # `deepspeed --module cogtune ...` says it here as well as in the environment, which we read
    return guarded(lambda: make_app()(given, prog_name="cogtune", standalone_mode=False))


def guarded(call: Callable[[], object]) -> int:
    """Run ``call`` as a command: its errors as text on stderr, and the exit code they stand for.

    An int that ``call`` returns is its exit code; anything else is 0. A process that trained together with others ends
    here: torch's teardown of a process group can hang or abort after everything is done and saved. So does one of
    torchrun's ranks that could not meet the others: gloo's threads were seen to keep such a process for ever.
    """
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
        language()
        result = call()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CogtuneError as error:
        if error.code == "stopped":  # every rank of a run stops alike; rank 0 says it
            is_main = environment.is_main()
            return _complain(error.render(), error.exit_code) if is_main else error.exit_code
        told = _report_to_launcher(error.render(), error.code == "peer-lost")
        return error.exit_code if told else _complain(error.render(), error.exit_code)
    except _UsageError as error:
        return _complain(_usage_text(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped by Ctrl-C", 130)
    except BrokenPipeError:
        # whoever read our output has gone (`| head`): nothing to tell, and the interpreter must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        traceback.print_exc()
        text = render("bug", f"{type(error).__name__}: {error}", _BUG_REPORT)
        return 1 if _report_to_launcher(text) else _complain(text, 1)


def _report_to_launcher(text: str, consequence: bool = False) -> bool:
    """Leave ``text`` where torchrun looks for a rank's error, in its format; True: our own launcher will print it.

    torchrun takes the earliest error for the cause, so a mere ``consequence`` of another rank's end is dated later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    stamp = str(int(time.time()) + (60 if consequence else 0))
    content = {"message": {"message": text, "extraInfo": {"py_callstack": "", "timestamp": stamp}}}
    try:
        files.write_json(Path(path), content)  # a rank may be killed here, and torchrun cannot read half a file
    except OSError:
        return False
    return "COGTUNE_LAUNCHED" in os.environ


def _usage_text(error: Exception) -> str:
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    hint = f"`{context.command_path} --help` lists the options" if context is not None else None
    return render("usage", message, hint)


def _complain(text: str, code: int) -> int:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
