"""``cogtune predict``: answer a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.answering import DECODING_KEYS, MODEL_KEYS, load, note
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.cli.progress import ProgressLine
from cogtune.errors import ConfigError
from cogtune.language import tr

_ABOUT = """\
Answer every question of a data set: JSON lines in the data's order.

Each line is {"id", "image", "turn", "question", "answer", "reference"}. Run again with the same arguments, it
continues after the last complete line. answers.jsonl.meta.json says how the file was made."""


@dataclass(frozen=True)
class _Flags:
    output: Path = flag(help="The .jsonl file to write.", metavar="FILE")


def _predict(flags: _Flags, line: Arguments) -> None:
    from cogtune.configuration.load import load_answer_config

    config = load_answer_config(line.config, line.overrides)
    if not config.data.path:
        raise ConfigError(tr("no data is named"), hint=tr("give --data DIR"), code="config-missing")

    from cogtune.data.records import iter_questions
    from cogtune.data.sources import read_sources
    from cogtune.generate.answer_settings import answer_settings
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.loading import dismiss, follow, resolve
    from cogtune.generate.predict import PredictOptions, Predictor
    from cogtune.generate.predictions_file import PredictionFile
    from cogtune.system.locks import lock_beside

    section = config.generate
    decoding = Decoding.from_section(section)
    options = PredictOptions(section.batch_size, section.own_history, section.max_input_len, section.seed or 0)
    resolved = resolve(config)
    config = resolved.config
    if follow(resolved):
        return
    with lock_beside(flags.output, tr("choose another --output"), note) as lock:
        examples, report = read_sources(config.data, open_questions=True)
        print("\n".join(report.lines()))
        questions = list(iter_questions(examples))
        settings = answer_settings(resolved, decoding, options, report.fingerprint, report.exif)
        file = PredictionFile(flags.output, settings, questions, lock)
        if file.next == len(questions):
            print(tr("{output}: complete, {done} answers; nothing to do", output=flags.output, done=len(file.done)))
            dismiss(resolved)
            return
        if file.done:
            print(tr("{output}: continuing after {done} answers", output=flags.output, done=len(file.done)))
        generator = load(resolved)
        progress = ProgressLine("questions")
        done = Predictor(generator, questions, file, config.data, decoding, options, progress).run()
        generator.close()
        print("\n".join([*done.lines(), tr("written to {output}", output=flags.output)]))


COMMANDS = (
    Command(
        name="predict",
        summary="Answer a data set.",
        about=_ABOUT,
        examples=(
            "cogtune predict --adapter OUT --data DIR --output answers.jsonl",
            "cogtune predict --model BASE --data test.json --data.image_root pictures --output answers.jsonl",
            "cogtune predict run.yaml --adapter OUT --data test --output answers.jsonl --batch-size 16",
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
