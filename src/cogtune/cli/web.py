"""``cogtune web``: a page in the browser."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.cli.answering import DECODING_KEYS, MODEL_KEYS, load, note
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
from cogtune.errors import AdapterError, ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from PIL import Image

    from cogtune.configuration.answer_config import AnswerConfig
    from cogtune.generate.generator import Generator
    from cogtune.generate.resolve import Resolved
    from cogtune.web.page import PageOptions

_EXAMPLES = 12
_ABOUT = """\
A page in the browser: drop a picture (or a clip), ask, and watch the answer come; the adapter and the base side by
side; closed questions with their probabilities; in English and Chinese. Nothing is fetched from outside.

--data shows pictures and questions of a data set as examples. Beyond this machine (--host) a key is required: one a
line in --api-key-file, or in COGTUNE_API_KEY; the browser asks for it as a password."""


@dataclass(frozen=True)
class _Flags:
    adapter: tuple[str, ...] = flag(
        (), "Adapter folder, or a training's output folder; several with names, NAME=DIR each.", "[NAME=]DIR"
    )
    host: str = flag("127.0.0.1", "Address to listen on.", "HOST")
    port: int = flag(7860, "Port to listen on.", "N", least=0)
    api_key_file: Path | None = flag(None, "File of API keys, one a line.", "PATH")
    name: str | None = flag(None, "The model's name on the page; by default its folder's.", "TEXT")
    slots: int = flag(8, "Answers computed at once.", "N", least=1)
    max_waiting: int = flag(64, "Questions that may wait; further ones are refused.", "N", least=1)
    timeout: float = flag(120.0, "Most seconds for an answer.", "N", least=0.1)
    max_upload: str = flag("32MiB", "Largest file that is taken.", "SIZE")
    max_request_pixels: int = flag(40_000_000, "Most pixels of a picture.", "N", least=1)


def _web(flags: _Flags, line: Arguments) -> None:
    from cogtune.configuration.load import load_answer_config

    alone, named = named_adapters(flags.adapter)
    config = load_answer_config(line.config, line.overrides | alone)
    keys = keys_of(flags.api_key_file)
    require_packages("web", "web", ("gradio",))
    require_key(flags.host, keys)
    require_free(flags.host, flags.port)
    most = bytes_of("--max-upload", flags.max_upload)
    if config.parallel.tensor > 1:
        raise ConfigError(
            tr("the page answers with a model on one device, not with --parallel.tensor"), code="config-combination"
        )
    examples = _examples(config)

    with tempfile.TemporaryDirectory(prefix="cogtune-web-") as folder:
        # read when gradio is first imported: what is uploaded goes there, and nobody is told that the page is used
        os.environ.update({"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"})
        resolved, generator, sides = _sides(flags, config, named)
        options = _options(flags, resolved, generator, sides, _copied(examples, Path(folder)))

        import uvicorn

        from cogtune.web.app import make_app

        app = make_app(options, keys, most, flags.max_waiting, flags.slots)
        note(tr("the page is at http://{host}:{port}", host=flags.host, port=flags.port))
        if not keys:
            note(tr("no API key is asked for: only this machine reaches it"))
        allow_connections()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what follows is done after either signal
        uvicorn.run(app, host=flags.host, port=flags.port, log_level="warning", timeout_graceful_shutdown=5)
        generator.close()


def _sides(
    flags: _Flags, config: AnswerConfig, named: Mapping[str, Path]
) -> tuple[Resolved, Generator, dict[str, Generator]]:
    """Load the model; return it, and the base and its adapters by name, the base first.

    One adapter is put beside its base too; if it is of a kind that cannot be, it answers alone, and a note says so.
    """
    from cogtune.adapters.adapter_folder import find_adapter, find_base
    from cogtune.generate.resolve import resolve

    given = config.generate.adapter
    rows = flags.slots
    if given is not None:
        folder = find_adapter(given)
        plain = config.model_copy(update={"generate": config.generate.model_copy(update={"adapter": None})})
        if plain.model.path is None:
            plain = plain.model_copy(update={"model": plain.model.model_copy(update={"path": find_base(folder)})})
        try:
            return _stacked(flags, resolve(plain, rows=rows, adapters={_name_of(Path(given)): folder}))
        except AdapterError as error:
            if error.code != "adapter-stack":
                raise
            note(tr("the base is not shown beside it: {reason}", reason=error.message))
            resolved = _limited(flags, resolve(config, rows=rows))
            generator = load(resolved)
            return resolved, generator, {_name_of(Path(given)): generator}
    return _stacked(flags, resolve(config, rows=rows, adapters=named))


def _limited(flags: _Flags, resolved: Resolved) -> Resolved:
    """Return ``resolved`` with the limits of the page."""
    config = resolved.config
    data = config.data.model_copy(update={"max_pixels": min(flags.max_request_pixels, config.data.max_pixels)})
    generate = config.generate.model_copy(update={"batch_size": flags.slots})
    return replace(resolved, config=config.model_copy(update={"data": data, "generate": generate}))


def _stacked(flags: _Flags, resolved: Resolved) -> tuple[Resolved, Generator, dict[str, Generator]]:
    resolved = _limited(flags, resolved)
    generator = load(resolved)
    base = flags.name or Path(resolved.model).expanduser().resolve().name
    names = () if generator.adapters is None else generator.adapters.names
    if base in names:
        base = tr("{name} (base)", name=base)
    sides = {base: generator.with_adapter(None) if names else generator}
    return resolved, generator, sides | {name: generator.with_adapter(name) for name in names}


def _name_of(folder: Path) -> str:
    """Return the name of an adapter on the page: its folder's, or that of the run which ``adapter`` is in."""
    folder = folder.expanduser().resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def _options(
    flags: _Flags,
    resolved: Resolved,
    generator: Generator,
    sides: dict[str, Generator],
    examples: list[tuple[Path, str]],
) -> PageOptions:
    from cogtune.generate.decoding import Decoding
    from cogtune.web.page import PageOptions

    config, names = resolved.config, list(sides)
    return PageOptions(
        title=flags.name or names[-1],
        sides=sides,
        beside=(names[-1], names[0] if len(names) > 1 else None),
        see=_eyes(generator, config),
        clips=generator.processor.config.numbered_images,
        decoding=Decoding.from_section(config.generate, max_new_tokens=512, published=generator.published),
        most_tokens=generator.processor.config.most_tokens,
        seconds=flags.timeout,
        examples=examples,
    )


def _eyes(generator: Generator, config: AnswerConfig) -> Any:
    """Return a function from a file to the pictures that the model is shown of it."""
    from PIL import Image

    from cogtune.processing.clip import decode, is_clip, read_clip, refuse_clip, refuse_picture
    from cogtune.processing.image import read_image

    data, processor = config.data, generator.processor

    def see(path: Path) -> list[Image.Image]:
        if not processor.config.numbered_images:
            refuse_clip(path)
            return [read_image(path, max_pixels=data.max_pixels, exif=data.exif, bit_depth=data.bit_depth)]
        if not is_clip(path):
            refuse_picture(path)
        frames = read_clip(path, processor.sampling, max_pixels=data.max_pixels).frames
        return [Image.fromarray(frame) for frame in decode(frames)]

    return see


def _examples(config: AnswerConfig) -> list[tuple[Path, str]]:
    """Return pictures or clips of the data with their first question, spread over it; none without ``--data``."""
    if not config.data.path:
        return []
    from cogtune.checkpoint.model_files import reading_rules
    from cogtune.data.records import file_of
    from cogtune.data.sources import read_sources

    rules = {} if config.model.path is None else reading_rules(config.model.path)
    found, _ = read_sources(config.data, open_questions=True, **rules)
    shown = [one for one in found if one.images]
    step = max(1, len(shown) // _EXAMPLES)
    return [(file_of(one.images[0]), one.conversations[0].turns[0].question) for one in shown[::step][:_EXAMPLES]]


def _copied(examples: list[tuple[Path, str]], folder: Path) -> list[tuple[Path, str]]:
    """Copy the examples to where the page may send files from."""
    found = []
    for number, (path, question) in enumerate(examples):
        own = folder / "examples" / str(number) / path.name
        own.parent.mkdir(parents=True)
        shutil.copyfile(path, own)
        found.append((own, question))
    return found


COMMANDS = (
    Command(
        name="web",
        summary="A page in the browser: chat, models side by side.",
        about=_ABOUT,
        examples=(
            "cogtune web --adapter OUT",
            "cogtune web --adapter OUT --data DIR",
            "cogtune web --model BASE --adapter cats=OUT1 --adapter dogs=OUT2",
            "cogtune web --adapter OUT --host 0.0.0.0 --api-key-file keys.txt",
        ),
        run=_web,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="answer",
        counted=(*MODEL_KEYS, *DECODING_KEYS, "data."),
        strict=True,
        most_used=("model.path", "data.path", "generate.device", "quant.experts", "generate.max_new_tokens"),
    ),
)
