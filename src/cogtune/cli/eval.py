"""``cogtune eval``: how good the answers are, and whether that could be chance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.answering import MODEL_KEYS, names_of, note
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.cli.progress import ProgressLine
from cogtune.language import tr

_OUTPUT = Path("cogtune-eval")


@dataclass(frozen=True)
class _Flags:
    against: tuple[str, ...] = flag(
        (), "What to compare with: base (the model without its adapter), an adapter, a model or a .jsonl file.",
        "WHAT",
    )  # fmt: skip
    metrics: tuple[str, ...] = flag((), "Metrics, joined by commas; the first one decides the verdict.", "NAMES")
    control: tuple[str, ...] = flag(
        (), "Ask again with every picture blanked, or swapped with another record's: is it used at all?", "KIND",
        choices=("blank", "swap"),
    )  # fmt: skip
    choices: tuple[str, ...] = flag(
        (), "Possible answers, joined by commas: the likeliest by its tokens' probability is the answer.", "NAMES"
    )
    predictions: Path | None = flag(None, "Evaluate this file of `cogtune predict` instead of a model.", "FILE")
    output: Path = flag(_OUTPUT, "Folder for answers and results.", "DIR")
    json: bool = flag(False, "Print the result as JSON on standard output.")


def _eval(flags: _Flags, line: Arguments) -> None:
    from cogtune.configuration.load import load_answer_config

    config = load_answer_config(line.config, line.overrides)

    from cogtune.evaluate.run import Request, run

    metrics, choices = names_of(flags.metrics), names_of(flags.choices)
    request = Request(flags.against, metrics, flags.control, choices, flags.predictions, flags.output)
    found = run(config, request, note if flags.json else print, ProgressLine)
    if flags.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False, indent=1))
        return
    print()
    print("\n".join(found.lines()))
    print(tr("written to {output}", output=flags.output))


COMMANDS = (
    Command(
        name="eval",
        summary="Measure answers, and compare models.",
        about="""\
Ask a model every question of a data set, greedily and each once, and compare its answers with the right ones.

--against base, another adapter, model or predictions file: the difference, its 95 % interval (pictures are resampled),
and the smallest difference that this data could have shown. Without --data, the pictures that the adapter's training
kept for validation are asked. Metrics are chosen by what the right answers are; `--metrics` names others: exact, vqa,
anls, numeric (or numeric:0.01), token_f1, iou, box_accuracy, rouge_l, bleu, cider, meteor, cer, wer.

The output folder gets eval.json, records.jsonl (every answer with its scores) and answers/, the predictions files. Run
again with the same arguments, an interrupted evaluation continues.""",
        examples=(
            "cogtune eval --adapter OUT --data DIR --against base",
            "cogtune eval --adapter OUT --against OTHER --metrics rouge_l,cider",
            "cogtune eval --predictions answers.jsonl --against other.jsonl",
            "cogtune eval --adapter OUT --data DIR --control blank --json",
            "cogtune eval --adapter OUT --data DIR --choices yes,no",
        ),
        run=_eval,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="answer",
        counted=(
            *(key for key in MODEL_KEYS if key != "parallel.tensor"),
            "generate.max_new_tokens",
            "generate.max_input_len",
            "generate.greedy",
            "generate.batch_size",
            "generate.own_history",
            "data.",
        ),
        strict=True,
        most_used=(
            "model.path",
            "generate.adapter",
            "data.path",
            "generate.device",
            "generate.max_new_tokens",
            "generate.batch_size",
        ),
    ),
)
