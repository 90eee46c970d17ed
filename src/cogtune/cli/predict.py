"""``cogtune predict``: answer a data set."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.answering import DECODING_KEYS, MODEL_KEYS, load, note
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.cli.progress import ProgressLine
from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.data.records import Question
    from cogtune.generate.loading import Resolved
    from cogtune.generate.predictions_file import PredictionFile

_ABOUT = """\
Answer every question of a data set: JSON lines in the data's order.

Each line is {"id", "image", "turn", "question", "answer", "reference"}; a video model's has "video" for "image". Run
again with the same arguments, it continues after the last complete line. answers.jsonl.meta.json says how the file was
made.

A folder of pictures or clips without questions is captioned; --question says with what words, and --captions writes
the answers as training data beside the JSON lines."""


@dataclass(frozen=True)
class _Flags:
    output: Path = flag(help="The .jsonl file to write.", metavar="FILE")
    question: str | None = flag(None, "Ask this about every picture or clip, once, whatever the data asks.", "TEXT")
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

    from cogtune.checkpoint.model_files import reading_rules
    from cogtune.cli.shares import run_shares
    from cogtune.data.sources import read_sources
    from cogtune.generate import shares
    from cogtune.generate.answer_settings import answer_settings
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.fit import free_memory
    from cogtune.generate.loading import dismiss, follow, resolve
    from cogtune.generate.predict import PredictOptions, Predictor, iter_asked, longest
    from cogtune.generate.predictions_file import PredictionFile
    from cogtune.system.locks import lock_beside

    section = config.generate
    decoding = Decoding.from_section(section)
    options = PredictOptions(section.batch_size, section.own_history, section.max_input_len, section.seed or 0)
    resolved, asked = resolve(config), config
    config = resolved.config
    if follow(resolved):
        return
    share = None if flags.share is None else shares.parse_share(flags.share)
    if share is not None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as after Ctrl-C, with the answers kept
    output = flags.output if share is None else share.file(flags.output)
    with lock_beside(output, tr("choose another --output"), note) as lock:
        examples, report = read_sources(config.data, open_questions=True, **reading_rules(resolved.model))
        if share is None:
            print("\n".join(report.lines()))
        questions = list(iter_asked(examples if share is None else share.of(examples), flags.question))
        if free_memory(resolved.device) is not None:  # memory depends on the longest question, of all shares alike
            most = longest(iter_asked(examples, flags.question), resolved.model, config, decoding.max_new_tokens)
            resolved = resolve(asked, columns=most)
            config = resolved.config
        settings = answer_settings(resolved, decoding, options, report.fingerprint, report.exif, report.bit_depth)
        if flags.question is not None:
            settings.decides["question"] = flags.question
        if share is not None:
            settings.decides["share"] = flags.share
        file = PredictionFile(output, settings, questions, lock)
        if file.next == len(questions):
            print(tr("{output}: complete, {done} answers; nothing to do", output=output, done=len(file.done)))
            dismiss(resolved)
        elif flags.cards > 1:
            shares.refuse_other_parts(flags.output, flags.cards)
            run_shares(line.words, flags.cards, flags.output, len(questions), ProgressLine(_unit(resolved)))
            count = shares.join(file, questions, flags.cards)
            shares.remove_parts(flags.output, flags.cards)
            print(tr("{count} answers written to {output}", count=count, output=output))
        else:
            if file.done:
                print(tr("{output}: continuing after {done} answers", output=output, done=len(file.done)))
            generator = load(resolved)
            progress = ProgressLine(_unit(resolved))
            done = Predictor(generator, questions, file, config.data, decoding, options, progress).run()
            generator.close()
            print("\n".join([*done.lines(), tr("written to {output}", output=output)]))
        if flags.captions is not None and share is None:
            _write_captions(flags.captions, PredictionFile(output, settings, questions, lock), questions)


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
