"""``cogtune predict``: answer a data set."""

from __future__ import annotations

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
    from cogtune.data.report import DataReport
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.loading import Resolved
    from cogtune.generate.predict import PredictOptions
    from cogtune.generate.predictions_file import AnswerSettings

_ABOUT = """\
Answer every question of a data set: JSON lines in the data's order.

Each line is {"id", "image", "turn", "question", "answer", "reference"}. Run again with the same arguments, it goes on
behind the last whole line. answers.jsonl.meta.json says what made the file."""


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
        file = PredictionFile(flags.output, _settings(resolved, decoding, options, report), questions, lock)
        if file.next == len(questions):
            print(tr("{output}: complete, {done} answers; nothing to do", output=flags.output, done=len(file.done)))
            dismiss(resolved)
            return
        if file.done:
            print(tr("{output}: continuing behind {done} answers", output=flags.output, done=len(file.done)))
        generator = load(resolved)
        progress = ProgressLine("questions")
        done = Predictor(generator, questions, file, config.data, decoding, options, progress).run()
        generator.close()
        print("\n".join([*done.lines(), tr("written to {output}", output=flags.output)]))


def _settings(resolved: Resolved, decoding: Decoding, options: PredictOptions, report: DataReport) -> AnswerSettings:
    """Return what decides the answers, under the names of the flags."""
    from cogtune.checkpoint.fingerprint import adapter_fingerprint, model_fingerprint
    from cogtune.generate.predictions_file import AnswerSettings

    config = resolved.config
    sampled: dict[str, int] = {"seed": options.seed} if decoding.sample else {}
    if decoding.sample and (resolved.tensor > 1 or resolved.others):
        sampled["batch-size"] = options.batch_size  # a model that is spread over devices samples per batch, not per row
    decides = {
        "model": model_fingerprint(resolved.model),
        "adapter": None if resolved.adapter is None else adapter_fingerprint(resolved.adapter),
        "data": report.fingerprint,
        "model.template": config.model.template,
        "model.dtype": resolved.dtype_name,
        "model.rope_precision": config.model.rope_precision,
        "own-history": options.own_history,
        "max-input-len": options.max_input_len,
        **{name.replace("_", "-"): value for name, value in decoding.to_dict().items()},
        **sampled,
    }
    decides |= {f"quant.{part}": form for part, form in config.quant.formats.items() if form != "none"}
    if report.exif != "ignore":
        decides["data.exif"] = report.exif
    adapter = None if resolved.adapter is None else str(resolved.adapter)
    data = [str(folder.path) for folder in config.data.path]
    return AnswerSettings(
        decides, {"model": resolved.model, "adapter": adapter, "data": data, "device": str(resolved.device)}
    )


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
