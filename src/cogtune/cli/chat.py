"""``cogtune chat``: talk to a model."""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.answering import DECODING_KEYS, MODEL_KEYS, load, note, tell_unused_guesses
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.language import tr
from cogtune.system.terminal import visible

if TYPE_CHECKING:
    from cogtune.configuration.answer_config import AnswerConfig
    from cogtune.generate.chat import Chat

_ABOUT = """\
Talk to a model, with or without an adapter, about a picture or about none.

Inside: /image PATH shows a picture, /clear forgets everything, /quit ends. Ctrl-C stops an answer.
With piped input every line is a question or a command, and standard output holds the answers alone."""


@dataclass(frozen=True)
class _Flags:
    last: bool = flag(False, "The result of the last training on this machine.")
    image: Path | None = flag(None, "A picture to start with.", "PATH")
    query: str | None = flag(None, "Ask this one question and end.", "TEXT")


def _chat(flags: _Flags, line: Arguments) -> None:
    from cogtune.configuration.load import load_answer_config

    config = load_answer_config(line.config, line.overrides)
    if flags.last:
        config = _last(config)
    if line.config is not None and config.generate.adapter is None:
        note(tr("{config} names no adapter: the base model answers alone (--adapter DIR)", config=line.config))

    import torch

    from cogtune.generate.chat import Chat
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.loading import check_shown, follow
    from cogtune.generate.resolve import resolve

    resolved = resolve(config)
    section, data = resolved.config.generate, resolved.config.data
    if follow(resolved):
        return
    if flags.image is not None:  # report a wrong path before loading, which takes minutes
        check_shown(resolved, flags.image.expanduser())
    generator = load(resolved)
    decoding = Decoding.from_section(section, max_new_tokens=2048, published=generator.published)
    tell_unused_guesses(section, decoding)
    if section.seed is not None:
        torch.manual_seed(section.seed)
    chat = Chat(
        generator,
        decoding,
        max_input_len=section.max_input_len,
        max_pixels=data.max_pixels,
        exif=data.exif,
        bit_depth=data.bit_depth,
    )
    if flags.image is not None:
        note(chat.show(flags.image))
    _talk(chat, flags.query)
    generator.close()


def _talk(chat: Chat, query: str | None) -> None:
    """Ask ``query``, or questions that are typed until the end of input."""
    from cogtune.generate.chat import run_chat

    if query is not None:
        chat.ask(query, _write, note)
        _write("\n")
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not available on every system
            importlib.import_module("readline")  # importing it enables line editing for input()
        note(tr("ask a question; /help lists the commands"))
    run_chat(chat, _read_line, _write, note)


def _last(config: AnswerConfig) -> AnswerConfig:
    """Use the last training's model and adapter if the flags name none."""
    from cogtune.configuration.load import explicit_values, with_values
    from cogtune.generate.last_run import read_last_run

    if config.generate.adapter is not None:
        return config
    run = read_last_run()
    note(tr("the last training: {output}", output=run.output))
    values = {"generate.adapter": run.adapter, "model.path": run.model, "model.template": run.template}
    if config.model.path is None:
        values["model.rope_precision"] = run.rope_precision
    given = explicit_values(config)
    return with_values(config, {key: value for key, value in values.items() if key not in given})


def _write(text: str) -> None:
    sys.stdout.write(visible(text))  # an answer's carriage return as well
    sys.stdout.flush()


def _read_line() -> str | None:
    """Return the next line of input, None at its end. On a terminal with a prompt and line editing."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        # bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer accepts
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if line else None
    try:
        return input("> ")
    except EOFError:
        note("")
        return None


COMMANDS = (
    Command(
        name="chat",
        summary="Talk to a model.",
        about=_ABOUT,
        examples=(
            "cogtune chat --last --image photo.jpg",
            "cogtune chat --adapter OUT --image photo.jpg --query 'What is this?'",
            "cogtune chat --model BASE --adapter OUT --quant.experts nf4 --quant.tower nf4",
            "cogtune chat --model BASE --device cuda:0,cuda:1 --temperature 0.5",
        ),
        run=_chat,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="answer",
        counted=(*MODEL_KEYS, *DECODING_KEYS, "data.exif", "data.bit_depth", "data.max_pixels"),
        strict=True,
        most_used=(
            "model.path",
            "generate.adapter",
            "generate.device",
            "quant.experts",
            "generate.greedy",
            "generate.temperature",
            "generate.max_new_tokens",
        ),
    ),
)
