"""``cogtune bench``: measurements on the hardware at hand, one subcommand per question."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.bench.report import Results
    from cogtune.configuration.run_config import RunConfig

_TRAIN = """\
Measure training steps: the real loop, on rows of a known shape.

Without --model, random weights of the published sizes are made on the device. Any configuration key is a flag.
--variant NAME key=value ... is one row of the table; its keys may also be preset and features. The variant called
baseline is our own implementation of the published step: rows padded to the script's budget, explicit masked attention,
tokens gathered and scattered by masks, float32 logits everywhere, every layer recomputed, the tower in every step.

Presets: s400, sft311k-multi, vqa10, vqa1, caption, clip24, clip24x10, text-only, 512+512, or a shape such as text=600
or questions=5."""
_SWEEP = """\
Measure how cost grows with a setting. NAME is memory (batch x text, compared with the plan), text, batch, questions
or rank. Each point is compared with the straight line between its neighbours."""
_FIT = """\
Measure the GPU memory of each setting, loading included: each row runs twenty steps in its own process, with the
allocator capped at 11, 15 or 23 GiB for a card of 12, 16 or 24 GB.

Further keys, such as --train.compile false, apply to every row that trains."""
_DECODE = "Measure an answer: memory, the time for picture and prompt, tokens a second."
_FILL = "Measure how fast the feature cache fills, decoding and writing included."
_CAPTIONS = """\
Measure captioning clips with a video model: clips a minute from files and with frames given, decoding alone on all
cores, and the published way: one clip at a time through generate(), eager. Random weights unless --model names some."""
_LOADER = """\
Measure whether data workers keep up: pictures of 1344 pixels are decoded, and features read, while samples are taken
at a steady rate. Needs no GPU."""
_LOAD = """\
Measure loading, each mode in its own process: time compared with a plain read of the same bytes, host memory, GPU
memory."""
_MAKE = """\
Write a random checkpoint in the published layout: 39 GB in 8 shards with index, configuration and a byte tokenizer.
Its answers are meaningless; its sizes, names and files are those of the published one."""


_CAP = "Let the GPU's allocator have no more than this."


@dataclass(frozen=True)
class _Tiny:
    tiny: bool = flag(False, "A model of 200,000 parameters instead of the full size.")
    json: Path | None = flag(None, "Write all numbers here, after every row.", "FILE")


@dataclass(frozen=True)
class _Steps(_Tiny):
    steps: int = flag(10, "Measured steps.", "N", least=1)
    warmup: int = flag(3, "Steps before the measured ones.", "N", least=1)
    preset: str = flag("s400", "Shape of the rows.", "NAME")
    breakdown: bool = flag(False, "Also profile: where a step's time goes.")


@dataclass(frozen=True)
class _TrainFlags(_Steps):
    features: str = flag("live", "cached: the tower's output is given; live: it runs.", "KIND")
    variant: tuple[str, ...] = flag((), "NAME key=value ...: a row of the table.", "TEXT")
    rounds: int = flag(1, "Times to go through all variants.", "N", least=1)
    cap: str | None = flag(None, _CAP, "SIZE")


@dataclass(frozen=True)
class _SweepFlags(_Tiny):
    steps: int = flag(3, "Measured steps.", "N", least=1)
    warmup: int = flag(2, "Steps before the measured ones.", "N", least=1)


@dataclass(frozen=True)
class _FitFlags(_Tiny):
    rows: str = flag("", "Names joined by commas, or by + to run at once; all without it.", "NAMES")


@dataclass(frozen=True)
class _DecodeFlags(_Tiny):
    context: int = flag(2400, "Positions of picture and prompt.", "N")
    tokens: int = flag(64, "Length of the answer.", "N", least=8)
    rows: str = flag("1", "How many answers at once, several joined by commas.", "N,N")
    with_adapter: bool = flag(False, "With an adapter of the lora section.")
    cap: str | None = flag(None, _CAP, "SIZE")


@dataclass(frozen=True)
class _FillFlags(_Tiny):
    pictures: int = flag(32, "Pictures to compute.", "N", least=1)
    cap: str | None = flag(None, _CAP, "SIZE")
    side: int = flag(1344, "Their size in pixels.", "N", least=8)


@dataclass(frozen=True)
class _CaptionsFlags(_Tiny):
    clips: int = flag(64, "Clips to caption.", "N", least=2)
    tokens: int = flag(200, "Length of a caption.", "N", least=2)
    slots: int = flag(32, "How many captions at once.", "N", least=1)
    size: str = flag("720x480", "Their size in pixels.", "WxH")
    seconds: int = flag(25, "Their length; a frame a second is seen, at most 24.", "N", least=1)


@dataclass(frozen=True)
class _LoaderFlags(_Tiny):
    rate: float = flag(20.0, "Samples a second to take.", "N", least=0.1)
    seconds: float = flag(10.0, "For how long.", "N", least=0.1)
    pictures: int = flag(64, "Different pictures.", "N", least=1)
    side: int = flag(1344, "Their size in pixels.", "N", least=8)


@dataclass(frozen=True)
class _LoadFlags:
    model: str = flag(help="Checkpoint folder.", metavar="BASE", also=("model.path",))
    modes: str = flag("", "Names joined by commas; all without it.", "NAMES")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...", "NAME")
    json: Path | None = flag(None, "Write all numbers here, after every row.", "FILE")


@dataclass(frozen=True)
class _MakeFlags:
    preset: str = flag(
        "full",
        "full (39 GB), video (25 GB), first (35 GB), tiny, tiny-video or tiny-first (400 kB).",
        "NAME",
        choices=("full", "video", "first", "tiny", "tiny-video", "tiny-first"),
    )
    device: str = flag("auto", "Where values are made. auto: the GPU, if there is one.", "NAME")
    seed: int = flag(0, "Of the values.", "N", least=0)


def _train(flags: _TrainFlags, line: Arguments) -> None:
    _cap(flags.cap)
    _measure(list(flags.variant), flags, line, features=flags.features, rounds=flags.rounds)


def _cap(size: str | None) -> None:
    if size is not None:
        from cogtune.bench.clock import cap_memory

        cap_memory(size)


def _sweep(flags: _SweepFlags, line: Arguments) -> None:
    from cogtune.bench.sweeps import SERIES, against_plan, check_series, sweep_variants

    (name,) = line.places
    texts = sweep_variants(name, tiny=flags.tiny)
    steps = _Steps(tiny=flags.tiny, json=flags.json, steps=flags.steps, warmup=flags.warmup)
    results = _measure(texts, steps, line, features="cached", kind=f"sweep-{name}")
    print(against_plan(results.rows))
    if name in SERIES:
        print(check_series(name, results))


def _fit(flags: _FitFlags, line: Arguments) -> None:
    from cogtune.bench.card_memory import run_rows
    from cogtune.bench.report import Results

    overrides = dict(line.overrides)
    model = (overrides.pop("model", None) or overrides.pop("model.path", None) or _random(flags.tiny))[0]
    if not model:
        raise ConfigError(
            tr("bench fit loads a checkpoint in every row, and none is named"),
            hint=tr("--model DIR; `cogtune bench make-checkpoint DIR` writes a random one of the published size"),
            code="config-missing",
        )
    extra = [word for key, values in overrides.items() for value in values for word in (f"--{key}", value)]
    run_rows(
        [name for name in flags.rows.split(",") if name],
        Results("fit", _command(), flags.json),
        model=model,
        extra=extra,
        capped=not flags.tiny,
    )


def _random(tiny: bool) -> list[str]:
    return ["random-tiny" if tiny else ""]


def _decode(flags: _DecodeFlags, line: Arguments) -> None:
    from cogtune.bench.decoding import measure_decoding

    counts = [int(count) for count in flags.rows.split(",") if count.strip().isdigit() and int(count) > 0]
    if len(counts) != len(flags.rows.split(",")):
        raise ConfigError(
            tr("--rows is {rows}; it is whole numbers above 0, such as 1,8,32", rows=flags.rows), code="config-value"
        )
    own = _own(flags)
    adapter = own.pop("with_adapter")
    _cap(own.pop("cap"))
    measure_decoding(
        _config(line, flags.tiny), _results("decode", flags.json), **(own | {"rows": counts}), adapter=adapter
    )


def _fill(flags: _FillFlags, line: Arguments) -> None:
    from cogtune.bench.filling import measure_filling

    own = _own(flags)
    _cap(own.pop("cap"))
    measure_filling(_config(line, flags.tiny), _results("fill", flags.json), **own)


def _captions(flags: _CaptionsFlags, line: Arguments) -> None:
    from cogtune.bench.captioning import measure_captioning
    from cogtune.bench.variants import parse_variants

    width, times, height = flags.size.partition("x")
    if not (times and width.isdigit() and height.isdigit() and int(width) % 2 == int(height) % 2 == 0):
        raise ConfigError(
            tr("--size is {size}; it is two even numbers, such as 720x480", size=flags.size), code="config-value"
        )
    overrides = ({"model.path": ["random-tiny-video"]} if flags.tiny else {"model.path": ["random-video"]}) | {
        ("model.path" if key == "model" else key): values for key, values in line.overrides.items()
    }
    config = parse_variants([], {**overrides, "lora.targets": ["experts"]}, preset="s400", cached=False)[0].config
    own = _own(flags) | {"size": (int(width), int(height))}
    measure_captioning(config, _results("captions", flags.json), **own)


def _loader(flags: _LoaderFlags, line: Arguments) -> None:
    from cogtune.bench.data_loading import measure_loader

    measure_loader(_config(line, flags.tiny), _results("loader", flags.json), **_own(flags))


def _load(flags: _LoadFlags, line: Arguments) -> None:
    from cogtune.bench.model_loading import run_modes
    from cogtune.generate.devices import choose_device

    names = [name for name in flags.modes.split(",") if name]
    device = str(choose_device(flags.device))
    run_modes(names, _results("load", flags.json), model=flags.model, device=device)


def _make_checkpoint(flags: _MakeFlags, line: Arguments) -> None:
    from cogtune.bench.checkpoint import make_checkpoint
    from cogtune.generate.devices import choose_device

    folder = Path(line.places[0])
    made = make_checkpoint(
        folder,
        preset=flags.preset,
        device=choose_device(flags.device),
        seed=flags.seed,
        progress=lambda text: print(text, flush=True),
    )
    speed = made.bytes / 1e9 / made.seconds
    print(
        tr(
            "{folder}: {tensors} tensors in {shards} shards, {bytes:,} bytes, {seconds:.1f} s, {speed:.2f} GB/s",
            folder=folder,
            tensors=made.tensors,
            shards=made.shards,
            bytes=made.bytes,
            seconds=made.seconds,
            speed=speed,
        )
    )


def _overrides(line: Arguments, tiny: bool) -> dict[str, list[str]]:
    """Return the keys that were typed, with ``tiny`` as a model of its own."""
    return ({"model.path": ["random-tiny"]} if tiny else {}) | line.overrides


def _config(line: Arguments, tiny: bool) -> RunConfig:
    from cogtune.bench.variants import parse_variants

    return parse_variants([], _overrides(line, tiny), preset="s400", cached=False)[0].config


def _own(flags: _Tiny) -> dict[str, Any]:
    """Return the flags that only this subcommand has, which are its measurement's arguments."""
    return {name: value for name, value in vars(flags).items() if name not in ("tiny", "json")}


def _results(kind: str, json: Path | None) -> Results:
    from cogtune.bench.report import Results

    return Results(kind, _command(), json)


def _measure(
    texts: list[str],
    flags: _Steps,
    line: Arguments,
    *,
    features: str = "live",
    rounds: int = 1,
    kind: str = "train",
) -> Results:
    from cogtune.bench.train import measure
    from cogtune.bench.variants import parse_variants
    from cogtune.distributed.environment import is_main

    cached = features == "cached"
    variants = parse_variants(texts, _overrides(line, flags.tiny), preset=flags.preset, cached=cached)
    results = _results(kind, flags.json)
    measure(variants, results, warm=flags.warmup, steps=flags.steps, rounds=rounds, breakdown=flags.breakdown)
    if is_main():
        print(results.line())
    return results


def _command() -> str:
    """Return the command line without its result file; see `shown_command`."""
    from cogtune.bench.report import shown_command

    return shown_command(["cogtune", *sys.argv[1:]])


def _takes_keys(
    name: str,
    summary: str,
    about: str,
    run: Callable[[Any, Arguments], None],
    flags: type[_Tiny],
    *examples: str,
    places: tuple[str, ...] = (),
) -> Command:
    """Return a command of this group that also accepts configuration keys as flags."""
    return Command(
        name=f"bench {name}",
        summary=summary,
        about=about,
        examples=examples,
        run=run,
        flags=flags,
        places=places,
        keys="run",
        keys_explained=False,
    )


COMMANDS = (
    _takes_keys("train", "Training steps, variants side by side.", _TRAIN, _train, _TrainFlags,
                "cogtune bench train --preset s400 --features cached",
                'cogtune bench train --variant baseline --variant "cached features=cached" --rounds 2'),
    _takes_keys("sweep", "What a growing setting costs.", _SWEEP, _sweep, _SweepFlags,
                "cogtune bench sweep text --json text.json",
                "cogtune bench sweep memory --model BASE --quant.experts nf4", places=("NAME",)),
    _takes_keys("fit", "What each setting needs of a card.", _FIT, _fit, _FitFlags,
                "cogtune bench fit --model BASE --rows nf4-cached-r8,bf16-cached-r8 --json fit.json"),
    _takes_keys("decode", "Memory and speed of an answer.", _DECODE, _decode, _DecodeFlags,
                "cogtune bench decode --model BASE --rows 1,8,32"),
    _takes_keys("fill", "Filling the feature cache.", _FILL, _fill, _FillFlags,
                "cogtune bench fill --pictures 32 --data.cache_batch 2"),
    _takes_keys("captions", "Captioning clips, beside one at a time.", _CAPTIONS, _captions, _CaptionsFlags,
                "cogtune bench captions --clips 64 --slots 32"),
    _takes_keys("loader", "Does preparing rows keep up?", _LOADER, _loader, _LoaderFlags,
                "cogtune bench loader --rate 20"),
    Command(name="bench load", summary="Loading a checkpoint.", about=_LOAD, run=_load, flags=_LoadFlags,
            examples=("cogtune bench load --model BASE --modes bf16,nf4 --json load.json",)),
    Command(name="bench make-checkpoint", summary="Write a random checkpoint.", about=_MAKE, run=_make_checkpoint,
            flags=_MakeFlags, places=("DIR",), examples=("cogtune bench make-checkpoint BASE",)),
)  # fmt: skip
