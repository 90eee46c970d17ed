"""``cogtune predict``: answer a data set."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogtune.cli import answering

if TYPE_CHECKING:
    from cogtune.configuration.run_config import DataSection
    from cogtune.data.report import DataReport
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.loading import Resolved
    from cogtune.generate.predict import PredictOptions
    from cogtune.generate.predictions_file import Settings

_HELP = """Answer every question of a data set: JSON lines in the data's order.

  cogtune predict --model BASE --adapter OUT/adapter --data DIR --output answers.jsonl

Each line is {"id", "image", "turn", "question", "answer", "reference"}. Run again with the same arguments, it goes on
behind the last whole line. answers.jsonl.meta.json says what made the file."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict", help=_HELP, short_help="Answer a data set.")(_predict)


def _predict(
    data: Annotated[
        list[str],
        typer.Option("--data", "--data.path", help="Data folder or file; may be repeated.", metavar="DIR"),
    ],
    output: Annotated[Path, typer.Option("--output", help="The .jsonl file to write.", metavar="FILE")],
    model: answering.Model = None,
    adapter: answering.Adapter = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered at once.")] = 8,
    own_history: Annotated[
        bool,
        typer.Option("--own-history", help="Put the model's own earlier answers before a question, not the data's."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")] = 512,
    max_input_len: answering.MaxInputLen = None,
    temperature: answering.Temperature = None,
    top_p: answering.TopP = None,
    top_k: answering.TopK = None,
    seed: Annotated[int, typer.Option("--seed", help="For sampling; without sampling flags it is greedy.")] = 0,
    labels: Annotated[
        str, typer.Option("--data.labels", help="labels, labels_en or labels_zh. auto: the only one there is.")
    ] = "auto",
    caption_question: Annotated[
        str | None, typer.Option("--data.caption_question", help="The question put before captions.")
    ] = None,
    on_bad: Annotated[
        str, typer.Option("--data.on_bad", help="error, or skip: leave out and count what cannot be read.")
    ] = "error",
    max_bad_share: Annotated[
        float | None, typer.Option("--data.max_bad_share", help="With skip: the share that still stops. Default: 0.1.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option("--data.max_pixels", help="Larger pictures are refused.")] = None,
    data_format: Annotated[
        str, typer.Option("--data.format", help="As in training. auto: told from the files.")
    ] = "auto",
    data_split: Annotated[str | None, typer.Option("--data.split", help="Split of a Hugging Face data set.")] = None,
    image_root: Annotated[
        list[str] | None, typer.Option("--data.image_root", help="Folder of the pictures; may be repeated.")
    ] = None,
    extract_dir: Annotated[
        str | None, typer.Option("--data.extract_dir", help="Where pictures inside the data are written.")
    ] = None,
    system: Annotated[str, typer.Option("--data.system", help="error, or prepend: system messages.")] = "error",
    exif: Annotated[str, typer.Option("--data.exif", help="ignore, or apply: turn pictures upright.")] = "ignore",
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
    keys = {
        "data.path": data,
        "data.labels": labels,
        "data.caption_question": caption_question,
        "data.on_bad": on_bad,
        "data.max_bad_share": None if max_bad_share is None else str(max_bad_share),
        "data.max_pixels": None if max_pixels is None else str(max_pixels),
        "data.format": data_format,
        "data.split": data_split,
        "data.image_root": image_root,
        "data.extract_dir": extract_dir,
        "data.system": system,
        "data.exif": exif,
    }
    section = _data_section(keys, output)

    from cogtune.data.records import iter_questions
    from cogtune.data.sources import read_sources
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.loading import ModelChoice, dismiss, follow, load_generator, resolve
    from cogtune.generate.predict import PredictOptions, Predictor
    from cogtune.generate.predictions_file import PredictionFile

    decoding = answering.changed(
        Decoding(max_new_tokens), greedy=False, temperature=temperature, top_p=top_p, top_k=top_k
    )
    options = PredictOptions(batch_size, own_history, max_input_len, seed)
    quantization = answering.quantisation(experts, tower, glu_adapter, head, embedding)
    resolved = resolve(ModelChoice(model, adapter, template, dtype, rope_precision, device, tensor, quantization))
    if follow(resolved):
        return
    pictures, report = read_sources(section)
    print("\n".join(report.lines()))
    questions = list(iter_questions(pictures))
    settings = _settings(resolved, decoding, options, report, data)
    file = PredictionFile(output, settings, questions)
    if file.next == len(questions):
        print(f"{output}: complete, {len(file.done)} answers; nothing to do")
        dismiss(resolved)
        return
    if file.done:
        print(f"{output}: continuing behind {len(file.done)} answers")
    with contextlib.redirect_stdout(sys.stderr):  # some libraries log to stdout when first imported
        generator = load_generator(resolved, answering.note)
    progress = answering.Progress("questions")
    done = Predictor(generator, questions, file, section, decoding, options, progress).run()
    generator.close()
    print("\n".join([*done.lines(), f"written to {output}"]))


def _data_section(keys: dict[str, str | list[str] | None], output: Path) -> DataSection:
    """The data keys, checked by the same code and with the same errors as in training."""
    from cogtune.configuration.load import load_config

    given = {name: value for name, value in keys.items() if value is not None}
    config = load_config(None, {**given, "model.path": "-", "train.output": str(output)})
    return config.data


def _settings(
    resolved: Resolved, decoding: Decoding, options: PredictOptions, report: DataReport, paths: list[str]
) -> Settings:
    """What decides the answers, under the names of the flags."""
    from cogtune.checkpoint.fingerprint import adapter_fingerprint, model_fingerprint
    from cogtune.generate.predictions_file import Settings

    sampled = {"seed": options.seed, "batch-size": options.batch_size} if decoding.sample else {}
    decides = {
        "model": model_fingerprint(resolved.model),
        "adapter": None if resolved.adapter is None else adapter_fingerprint(resolved.adapter),
        "data": report.fingerprint,
        "model.template": resolved.template,
        "model.dtype": resolved.dtype_name,
        "model.rope_precision": resolved.rope_precision,
        "own-history": options.own_history,
        "max-input-len": options.max_input_len,
        **{name.replace("_", "-"): value for name, value in decoding.to_dict().items()},
        **sampled,
    }
    decides |= {f"quant.{part}": form for part, form in resolved.quantization.formats.items() if form != "none"}
    if report.exif != "ignore":
        decides["data.exif"] = report.exif
    adapter = None if resolved.adapter is None else str(resolved.adapter)
    return Settings(
        decides, {"model": resolved.model, "adapter": adapter, "data": paths, "device": str(resolved.device)}
    )
