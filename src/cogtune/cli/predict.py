"""``cogtune predict``: answer a data set."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogtune.cli.answering import (
    DECODING_KEYS,
    MODEL_KEYS,
    load,
    names_of,
    note,
    require_choices,
    tell_unused_guesses,
)
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.cli.progress import ProgressLine
from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.configuration.answer_config import AnswerConfig
    from cogtune.data.records import Example, ImageRef, Question
    from cogtune.errors import DataError
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.predict import PredictOptions, PredictReport
    from cogtune.generate.predictions_file import PredictionFile
    from cogtune.generate.resolve import Resolved

_ABOUT = """\
Answer every question of a data set: JSON lines in the data's order.

Each line is {"id", "image", "turn", "question", "answer", "reference"}; a video model's has "video" for "image". Run
again with the same arguments, it continues after the last complete line. answers.jsonl.meta.json says how the file was
made. An output that ends in .csv or .parquet is written at the end, from the lines beside it.

--choices yes,no scores these answers to every question instead, all questions on a picture in one forward pass; the
line gets "choices" and "probabilities", and "answer" is the likeliest. With --choices data each record names its own.

A question whose picture cannot be read gets a line with "error" and no answer; --data.on_bad error ends the run there.

A folder of pictures or clips without questions is captioned; --question says with what words, and --captions writes
the answers as training data beside the JSON lines."""
_OWN = "data"


@dataclass(frozen=True)
class _Flags:
    output: Path = flag(help="The .jsonl, .csv or .parquet file to write.", metavar="FILE")
    question: str | None = flag(None, "Ask this about every picture or clip, once, whatever the data asks.", "TEXT")
    choices: tuple[str, ...] = flag(
        (), "Possible answers, joined by commas; or data: those that the records name.", "NAMES"
    )
    captions: Path | None = flag(
        None,
        "Also write the answers as captions: to DIR/labels/*.txt, a prompts.txt, a .jsonl or a .parquet.",
        "PATH",
    )
    cards: int = flag(1, "Cards that share the work, each with the whole model.", "N", least=1)
    share: str | None = flag(None, "Answer a share only, into a file next to --output: process K of N.", "K/N")


def _predict(flags: _Flags, line: Arguments) -> None:
    from cogtune.configuration.load import load_answer_config

    config = load_answer_config(line.config, line.overrides)
    if not config.data.path:
        raise ConfigError(tr("no data is named"), hint=tr("give --data DIR"), code="config-missing")
    choices = names_of(flags.choices)
    if flags.choices and choices != (_OWN,):
        if _OWN in choices:
            raise ConfigError(
                tr("--choices {choices}: data means those that the records name", choices=",".join(choices)),
                hint=tr("--choices data alone; a choice that is this word has to be named in the records"),
                code="config-value",
            )
        require_choices(choices)

    from cogtune.checkpoint.model_files import reading_rules
    from cogtune.data.sources import read_sources
    from cogtune.generate.answer_settings import answer_settings
    from cogtune.generate.asked import longest
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.fit import free_memory
    from cogtune.generate.loading import dismiss, follow
    from cogtune.generate.predict import PredictOptions
    from cogtune.generate.predictions_file import PredictionFile
    from cogtune.generate.predictions_table import lines_file, write_table
    from cogtune.generate.resolve import resolve
    from cogtune.generate.shares import parse_share
    from cogtune.system.locks import lock_beside

    lines = lines_file(flags.output)
    section = config.generate
    decoding = Decoding.from_section(section)
    options = PredictOptions(
        section.batch_size, section.own_history, section.max_input_len, section.seed or 0, _bad(config)
    )
    resolved, asked = resolve(config), config
    config = resolved.config
    _check_devices(resolved, flags.cards, choices)
    if follow(resolved):
        return
    share = None if flags.share is None else parse_share(flags.share)
    if share is not None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as after Ctrl-C, with the answers kept
    output = lines if share is None else share.file(lines)
    with lock_beside(output, tr("choose another --output"), note) as lock:
        examples, report = read_sources(
            config.data,
            open_questions=True,
            choices=choices == (_OWN,),
            keep_unreadable=options.bad == "line",
            **reading_rules(resolved.model),
        )
        asked_of = partial(_asked, flags=flags, choices=choices)
        questions = asked_of(examples if share is None else share.of(examples))
        if share is None:
            print("\n".join(report.lines()))
            _tell_choices(questions, choices)
        if free_memory(resolved.device) is not None:  # memory depends on the longest question, of all shares alike
            most = longest(asked_of(examples), resolved.model, config, decoding.max_new_tokens)
            resolved = resolve(asked, columns=most)
            config = resolved.config
        if share is None:
            tell_unused_guesses(section, decoding, config.generate.batch_size)
        settings = answer_settings(resolved, decoding, options, report.fingerprint, report.exif, report.bit_depth)
        settings.decides.update(_deciding(flags, questions, choices))
        file = PredictionFile(output, settings, questions, lock)
        if file.next == len(questions):
            done = len(file.done)
            print(tr("{output}: complete, {done} answers; nothing to do", output=flags.output, done=done))
            dismiss(resolved)
        elif flags.cards > 1:
            count = _on_cards(flags.cards, line.words, lines, file, questions, resolved)
            print(tr("{count} answers written to {output}", count=count, output=flags.output))
        else:
            found = _here(resolved, questions, file, decoding, options, report.unreadable)
            print("\n".join([*found.lines(), tr("written to {output}", output=flags.output)]))
        if share is None:
            write_table(flags.output, lines)
            if flags.captions is not None:
                _write_captions(flags.captions, PredictionFile(output, settings, questions, lock), questions)


def _check_devices(resolved: Resolved, cards: int, choices: tuple[str, ...]) -> None:
    """Refuse what the model's devices cannot do, before it is loaded."""
    if choices:
        resolved.require_one_place()
    if cards > 1 and resolved.tensor > 1:
        raise ConfigError(
            tr("--cards gives each card the whole model, and --parallel.tensor divides it"),
            hint=tr("leave one of the two out; several launches share the work with --share K/N"),
            code="config-combination",
        )


def _here(
    resolved: Resolved,
    questions: Sequence[Question],
    file: PredictionFile,
    decoding: Decoding,
    options: PredictOptions,
    unreadable: Mapping[tuple[ImageRef, ...], DataError],
) -> PredictReport:
    """Answer in this process."""
    from cogtune.generate.cached_features import open_cached
    from cogtune.generate.predict import Predictor

    if file.done:
        print(tr("{output}: continuing after {done} answers", output=file.path, done=len(file.done)))
    generator = load(resolved)
    progress = ProgressLine(_unit(resolved), len(file.done | file.pending))
    sources = resolved.config.data
    pictures = {image for question in questions for image in question.images}
    cached = open_cached(resolved, pictures)
    if cached is not None:
        there, total = len(cached.digests), len(pictures)
        print(tr("{there} of {total} pictures have features in training's cache", there=there, total=total))
    found = Predictor(generator, questions, file, sources, decoding, options, progress, unreadable, cached).run()
    generator.close()
    return found


def _on_cards(
    cards: int,
    words: Sequence[str],
    lines: Path,
    file: PredictionFile,
    questions: Sequence[Question],
    resolved: Resolved,
) -> int:
    """Answer in one process a card, and join their lines; return the number of answers."""
    from cogtune.cli.shares import run_shares
    from cogtune.generate import shares

    shares.refuse_other_parts(lines, cards)
    run_shares(words, cards, lines, len(questions), ProgressLine(_unit(resolved)))
    count = shares.join(file, questions, cards)
    shares.remove_parts(lines, cards)
    return count


def _bad(config: AnswerConfig) -> Literal["error", "skip", "line"]:
    """What a question that cannot be asked does: a line with an error, unless `data.on_bad` says something."""
    from cogtune.configuration.load import explicit_values

    return config.data.on_bad if "data.on_bad" in explicit_values(config) else "line"


def _asked(examples: Iterable[Example], flags: _Flags, choices: tuple[str, ...]) -> list[Question]:
    """Return the questions, with the choices that all of them have."""
    from cogtune.generate.asked import iter_asked

    questions = list(iter_asked(examples, flags.question))
    return questions if choices in ((), (_OWN,)) else [replace(one, choices=choices) for one in questions]


def _tell_choices(questions: Sequence[Question], choices: tuple[str, ...]) -> None:
    """Say how many questions are closed, and what their probabilities are.

    Raises:
        ConfigError: choices were asked for, and no question has any.
    """
    if not choices:
        return
    closed = sum(bool(one.choices) for one in questions)
    if not closed and questions:
        raise ConfigError(
            tr("--choices data, and no record names its choices"),
            hint=tr('a record names them under "choices", as a list; or give the same for all: --choices yes,no'),
            code="config-value",
        )
    print(
        tr(
            "{closed} of {count} questions are closed: their probabilities are normalised over the choices, and not"
            " calibrated",
            closed=closed,
            count=len(questions),
        )
    )


def _deciding(flags: _Flags, questions: Sequence[Question], choices: tuple[str, ...]) -> dict[str, Any]:
    """Return what decides the answers besides model, data and sampling."""
    found: dict[str, Any] = {}
    if flags.question is not None:
        found["question"] = flags.question
    if flags.share is not None:
        found["share"] = flags.share
    if choices == (_OWN,):
        own = "\n".join(json.dumps(one.choices) for one in questions)
        found["choices"] = hashlib.sha256(own.encode()).hexdigest()
    elif choices:
        found["choices"] = list(choices)
    return found


def _unit(resolved: Resolved) -> str:
    from cogtune.checkpoint.model_files import reading_rules

    return tr("clips") if reading_rules(resolved.model)["clips"] else tr("questions")


def _write_captions(target: Path, file: PredictionFile, questions: Sequence[Question]) -> None:
    from cogtune.generate.captions import captions_of, write_captions

    count = write_captions(target, captions_of(questions, file.done))
    print(tr("{count} captions written to {target}", count=count, target=target))


COMMANDS = (
    Command(
        name="predict",
        summary="Answer a data set.",
        about=_ABOUT,
        examples=(
            "cogtune predict --adapter OUT --data DIR --output answers.jsonl",
            "cogtune predict --model BASE --data test.json --data.image_root pictures --output answers.jsonl",
            "cogtune predict run.yaml --adapter OUT --data test --output answers.jsonl --batch-size 16",
            "cogtune predict --adapter OUT --data DIR --output scores.parquet --choices yes,no",
            "cogtune predict --model cogvlm2-caption --data clips --output out.jsonl --captions clips --cards 8",
        ),
        run=_predict,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="answer",
        counted=(*MODEL_KEYS, *DECODING_KEYS, "generate.batch_size", "generate.own_history", "data."),
        strict=True,
        most_used=(
            "model.path",
            "generate.adapter",
            "data.path",
            "generate.device",
            "quant.experts",
            "generate.max_new_tokens",
            "generate.batch_size",
        ),
    ),
)
