"""``cogtune serve``: an OpenAI-compatible server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.answering import DECODING_KEYS, MODEL_KEYS, load, note, tell_unused_guesses
from cogtune.cli.command import Command, flag
from cogtune.cli.listening import (
    allow_connections,
    bytes_of,
    keys_of,
    named_adapters,
    require_free,
    require_key,
    require_packages,
)
from cogtune.cli.options import Arguments
from cogtune.errors import ConfigError
from cogtune.language import english, tr

if TYPE_CHECKING:
    from cogtune.configuration.answer_config import AnswerConfig
    from cogtune.generate.generator import Generator
    from cogtune.serve.app import ServerOptions

_ABOUT = """\
Answer over HTTP, as OpenAI's API does: /v1/chat/completions (also as a stream), /v1/models, /v1/score for closed
questions, /health, /metrics. Pictures come as data URLs.

Beyond this machine (--host) an API key is required: one a line in --api-key-file, or in COGTUNE_API_KEY.
Ctrl-C or SIGTERM finishes the answers under way and ends."""


@dataclass(frozen=True)
class _Flags:
    adapter: tuple[str, ...] = flag(
        (),
        "Adapter folder, or a training's output folder. Several with names, NAME=DIR each, are served beside the base;"
        " a request names one as its model.",
        "[NAME=]DIR",
    )
    host: str = flag("127.0.0.1", "Address to listen on.", "HOST")
    port: int = flag(8000, "Port to listen on.", "N", least=0)
    api_key_file: Path | None = flag(None, "File of API keys, one a line.", "PATH")
    name: str | None = flag(None, "The model's name for clients; by default its folder's.", "TEXT")
    slots: int = flag(8, "Answers computed at once.", "N", least=1)
    columns: int = flag(4096, "Most tokens of prompt and answer; memory is taken for all slots.", "N", least=64)
    max_waiting: int = flag(64, "Requests that may wait for a slot; further ones are answered 429.", "N", least=0)
    timeout: float = flag(120.0, "Most seconds for a request.", "N", least=0.1)
    max_body: str = flag("32MiB", "Largest request body.", "SIZE")
    max_request_pixels: int = flag(40_000_000, "Most pixels of a request's pictures together.", "N", least=1)
    allow_image_host: tuple[str, ...] = flag((), "Host that pictures may be fetched from.", "HOST")


def _serve(flags: _Flags, line: Arguments) -> None:
    from cogtune.configuration.load import load_answer_config

    alone, named = named_adapters(flags.adapter)
    config = load_answer_config(line.config, line.overrides | alone)
    keys = keys_of(flags.api_key_file)
    _check(config, flags, keys)
    body = bytes_of("--max-body", flags.max_body)

    import uvicorn

    from cogtune.checkpoint.model_files import reading_rules
    from cogtune.generate.engine import InferenceEngine
    from cogtune.generate.resolve import resolve
    from cogtune.processing.clip import require_pyav
    from cogtune.serve.app import make_app

    resolved = resolve(config, rows=flags.slots, columns=flags.columns, adapters=named)
    config = resolved.config
    if resolved.by_layers:
        raise ConfigError(
            tr("serve answers with the language experts on one device, not with quant.stream all or several devices"),
            hint=tr("use quant.stream 0, which streams the vision experts and the tower, or name one --device"),
            code="config-combination",
        )
    if reading_rules(resolved.model)["clips"]:
        require_pyav()
    name = flags.name or Path(resolved.adapter or resolved.model).expanduser().resolve().name
    if name in named:
        raise ConfigError(
            tr("the model and an adapter are both named {name}", name=name),
            hint=tr("give the model another one with --name"),
            code="config-value",
        )
    generator = load(resolved)
    columns = min(flags.columns, generator.processor.config.most_tokens)
    engine = InferenceEngine(
        generator.model,
        generator.processor,
        slots=flags.slots,
        columns=columns,
        adapters=generator.adapters,
        guesses=generator.guesses,
    )
    options = _options(config, flags, keys, generator, name, body)
    tell_unused_guesses(config.generate, options.decoding)
    app = make_app(engine, options)
    note(
        tr(
            "serving {name} on http://{host}:{port}/v1: {slots} answers at once, {columns} tokens each",
            name=name,
            host=flags.host,
            port=flags.port,
            slots=flags.slots,
            columns=columns,
        )
    )
    if not keys:
        note(tr("no API key is asked for: only this machine reaches it"))
    patience = int(flags.timeout)
    allow_connections()
    with english():  # what clients get: its readers are not this machine's
        uvicorn.run(app, host=flags.host, port=flags.port, log_level="warning", timeout_graceful_shutdown=patience)


def _options(
    config: AnswerConfig, flags: _Flags, keys: tuple[str, ...], generator: Generator, name: str, body: int
) -> ServerOptions:
    from cogtune.generate.decoding import Decoding
    from cogtune.serve.app import ServerOptions
    from cogtune.serve.pictures import PictureLimits

    pixels = flags.max_request_pixels
    if config.data.max_pixels is not None:
        pixels = min(pixels, config.data.max_pixels)
    hosts = tuple(host.lower().rstrip(".") for host in flags.allow_image_host)
    return ServerOptions(
        model=name,
        template=config.model.template,
        decoding=Decoding.from_section(config.generate, max_new_tokens=512, published=generator.published),
        most_tokens=flags.columns,
        most_waiting=flags.max_waiting,
        seconds=flags.timeout,
        body_bytes=body,
        keys=keys,
        adapters=() if generator.adapters is None else generator.adapters.names,
        pictures=PictureLimits(
            pixels=pixels, bytes=body, hosts=hosts, exif=config.data.exif, bit_depth=config.data.bit_depth
        ),
    )


def _check(config: AnswerConfig, flags: _Flags, keys: tuple[str, ...]) -> None:
    """Check the settings before loading, which takes minutes."""
    require_packages("serve", "serve", ("fastapi", "uvicorn", "openai", "prometheus_client"))
    if config.parallel.tensor > 1:
        raise ConfigError(
            tr("serve answers with a model on one device, not with --parallel.tensor"),
            hint=tr("start one server a card, behind a load balancer"),
            code="config-combination",
        )
    require_key(flags.host, keys)
    require_free(flags.host, flags.port)


COMMANDS = (
    Command(
        name="serve",
        summary="An OpenAI-compatible server.",
        about=_ABOUT,
        examples=(
            "cogtune serve --model BASE --adapter OUT",
            "cogtune serve --model BASE --adapter cats=OUT1 --adapter dogs=OUT2",
            "cogtune serve --adapter OUT --quant.experts nf4 --slots 4",
            "cogtune serve --adapter OUT --host 0.0.0.0 --api-key-file keys.txt",
        ),
        run=_serve,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="answer",
        counted=(*MODEL_KEYS, *DECODING_KEYS, "data.exif", "data.bit_depth", "data.max_pixels"),
        strict=True,
        most_used=("model.path", "generate.device", "quant.experts", "generate.max_new_tokens"),
    ),
)
