"""``cogtune chat``: talk to a model."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogtune.cli import answering

if TYPE_CHECKING:
    from cogtune.generate.loading import ModelChoice

_HELP = """Talk to a model, with or without an adapter, about a picture or about none.

  cogtune chat --model BASE --adapter OUT/adapter --image photo.jpg

Inside: /image PATH shows a picture, /clear forgets everything, /quit ends. Ctrl-C stops an answer.
With piped input every line is a question or a command, and standard output holds the answers alone."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", help=_HELP, short_help="Talk to a model.")(_chat)


def _chat(
    model: answering.Model = None,
    adapter: answering.Adapter = None,
    last: Annotated[bool, typer.Option("--last", help="The result of the last training on this machine.")] = False,
    image: Annotated[Path | None, typer.Option("--image", help="A picture to start with.", metavar="PATH")] = None,
    query: Annotated[str | None, typer.Option("--query", help="Ask this one question and end.")] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest token. Default: the checkpoint's own way (sampling).")
    ] = False,
    temperature: answering.Temperature = None,
    top_p: answering.TopP = None,
    top_k: answering.TopK = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Make sampling repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")] = 2048,
    max_input_len: answering.MaxInputLen = None,
    template: answering.Template = None,
    dtype: answering.Dtype = "auto",
    rope_precision: answering.RopePrecision = "checkpoint",
    device: answering.Device = "auto",
    tensor: answering.Tensor = 1,
    experts: answering.Experts = "none",
    tower: answering.Tower = "none",
    glu_adapter: answering.GluAdapter = "none",
    head: answering.Head = "none",
    embedding: answering.Embedding = "device",
) -> None:
    from cogtune.generate.decoding import Decoding

    decoding = Decoding(max_new_tokens)
    # contradictions are errors before minutes of loading
    answering.changed(decoding, greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k)

    import torch

    from cogtune.generate.chat import Chat, run_chat
    from cogtune.generate.loading import ModelChoice, follow, load_generator, resolve
    from cogtune.processing.image import read_image

    quantization = answering.quantisation(experts, tower, glu_adapter, head, embedding)
    choice = ModelChoice(model, adapter, template, dtype, rope_precision, device, tensor, quantization)
    resolved = resolve(_last(choice) if last else choice)
    if follow(resolved):
        return
    if image is not None:
        read_image(image.expanduser())  # a wrong path is an error before minutes of loading
    with contextlib.redirect_stdout(sys.stderr):  # some libraries log to stdout when first imported
        generator = load_generator(resolved, answering.note)
    decoding = answering.changed(
        Decoding.from_checkpoint(generator.published, max_new_tokens),
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    if seed is not None:
        torch.manual_seed(seed)
    chat = Chat(generator, decoding, max_input_len=max_input_len)
    if image is not None:
        answering.note(chat.show(image))
    if query is not None:
        chat.ask(query, _write, answering.note)
        _write("\n")
        generator.close()
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on every system
            importlib.import_module("readline")  # line editing for input(), by being imported
        answering.note("ask a question; /help lists the commands")
    run_chat(chat, _read_line, _write, answering.note)
    generator.close()


def _last(choice: ModelChoice) -> ModelChoice:
    """The last training's model and adapter, where the flags name none."""
    from cogtune.generate.last_run import read_last_run
    from cogtune.generate.loading import ModelChoice

    if choice.adapter is not None:
        return choice
    run = read_last_run()
    answering.note(f"the last training: {run.output}")
    same_base = choice.model is None
    return ModelChoice(
        choice.model or run.model,
        Path(run.adapter),
        choice.template or run.template,
        choice.dtype,
        run.rope_precision if same_base and choice.rope_precision == "checkpoint" else choice.rope_precision,
        choice.device,
        choice.tensor,
        choice.quantization,
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_line() -> str | None:
    """The next line of input; None at its end. A terminal gets a prompt and line editing."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        # bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if line else None
    try:
        return input("> ")
    except EOFError:
        answering.note("")
        return None
