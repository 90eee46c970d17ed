"""Flags that the commands which answer questions share, and how they show what they do."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cogtune.configuration.quantization import QuantSection
    from cogtune.generate.decoding import Decoding

_MODEL, _WORDING, _DECODING = "Model", "Prompt", "Decoding"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--model.path",
        help="Base model: folder or hub id. Default: the one the adapter names.",
        metavar="BASE",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", help="Adapter folder, or the output folder of a training. Default: none.", metavar="DIR"),
]
Template = Annotated[
    str | None,
    typer.Option("--model.template", help="chat, vqa or base. Default: the checkpoint's own.", metavar="NAME"),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--model.dtype",
        help="bfloat16, float16 or float32. auto: bfloat16 on a GPU (float16 on an older one), float32 on a CPU.",
        metavar="NAME",
    ),
]
RopePrecision = Annotated[
    str, typer.Option("--model.rope_precision", help="checkpoint or float32, as in training.", metavar="NAME")
]
Experts = Annotated[
    str, typer.Option("--quant.experts", help="none, nf4, int8 or fp8, as in training.", metavar="FORMAT")
]
Tower = Annotated[str, typer.Option("--quant.tower", help="none, nf4, int8 or fp8, as in training.", metavar="FORMAT")]
GluAdapter = Annotated[str, typer.Option("--quant.glu_adapter", help="none or int8.", metavar="FORMAT")]
Head = Annotated[str, typer.Option("--quant.head", help="none or int8.", metavar="FORMAT")]
Embedding = Annotated[str, typer.Option("--quant.embedding", help="device, or host: in host memory.", metavar="PLACE")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, ... auto: the first GPU, or the CPU. Layers are spread over several: cuda:0,cuda:1, "
        "or all; with cpu as the last, those that do not fit wait in host memory.",
        metavar="NAME",
    ),
]
Tensor = Annotated[
    int,
    typer.Option(
        "--parallel.tensor",
        min=1,
        max=8,
        help="Processes that hold the model together, one GPU each; started by torchrun --nproc-per-node N.",
        metavar="N",
    ),
]
MaxInputLen = Annotated[
    int | None,
    typer.Option(
        "--max-input-len",
        min=1,
        help="Most tokens of the prompt's text; the oldest turns go first. Default: what the model's context leaves.",
    ),
]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Sample, this evenly (1: as the model says).")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Sample from the likeliest tokens that hold this probability.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from this many likeliest tokens. 0: no limit.")]


def quantisation(experts: str, tower: str, glu_adapter: str, head: str, embedding: str) -> QuantSection:
    """The ``quant`` section of the flags above; raises ConfigError as in training."""
    from cogtune.configuration.load import load_config

    parts = {"experts": experts, "tower": tower, "glu_adapter": glu_adapter, "head": head, "embedding": embedding}
    needed = {"model.path": "-", "data.path": "-", "train.output": "-"}
    return load_config(None, needed | {f"quant.{name}": form for name, form in parts.items()}).quant


def changed(
    decoding: Decoding, *, greedy: bool, temperature: float | None, top_p: float | None, top_k: int | None
) -> Decoding:
    """``decoding`` with the flags above."""
    return decoding.changed(greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k)


def note(text: str) -> None:
    """Something to know, beside the answers."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A line on stderr: rewritten in a terminal, one every half minute elsewhere."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` are finished, with what was finished before this start."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if done < total and now - self._last < (0.2 if self._terminal else 30):
            return
        self._last = now
        speed = (done - self._first) / max(now - self._start, 1e-9)
        left = f", {_duration((total - done) / speed)} left" if speed and done < total else ""
        text = f"{done}/{total} {self._unit}, {speed:.2f}/s{left}"
        if self._terminal:
            end = "\n" if done == total else ""
            print(f"\r{text:<70}", end=end, file=sys.stderr, flush=True)
        else:
            note(text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
