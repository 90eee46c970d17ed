"""``cogtune bench``: measurements on the hardware at hand, one subcommand per question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogtune.errors import ConfigError

if TYPE_CHECKING:
    from cogtune.bench.report import Results
    from cogtune.configuration.run_config import RunConfig

_KEYS = {"ignore_unknown_options": True, "allow_extra_args": True}
_Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers here, after every row.", metavar="FILE")]
_Preset = Annotated[str, typer.Option("--preset", help="Shape of the rows: see below.", metavar="NAME")]
_Warmup = Annotated[int, typer.Option("--warmup", min=1, help="Steps before the measured ones.", metavar="N")]
_Steps = Annotated[int, typer.Option("--steps", min=1, help="Measured steps.", metavar="N")]
_Tiny = Annotated[bool, typer.Option("--tiny", help="A model of 200,000 parameters instead of the full size.")]

_TRAIN = """Measure training steps: the real loop, on rows of a known shape.

  cogtune bench train --preset s400 --features cached
  cogtune bench train --variant baseline --variant "cached features=cached" --variant "live train.compile=false"

Without --model, random weights of the published sizes are made on the device. Any configuration key is a flag.
--variant NAME key=value ... is one row of the table; its keys may also be preset and features. The variant called
baseline is a stand-in of the published computation. Presets: s400, sft311k-multi, vqa10, vqa1, caption, text-only,
512+512, or a shape such as text=600 or questions=5."""
_BASELINE = """Measure a stand-in of the published computation: rows padded to the script's budget, explicit masked
attention, tokens gathered and scattered by masks, float32 logits everywhere, every layer recomputed, the tower in every
step.

  cogtune bench baseline"""

_SWEEP = """Measure what grows with a setting: memory (batch x text, beside the planner's word), text, batch,
questions or rank. Each point is held to the straight line between its neighbours.

  cogtune bench sweep text --json text.json
  cogtune bench sweep memory --model BASE --quant.experts nf4"""
_FIT = """Measure what each setting needs of a card, loading included: every row a process of its own, twenty steps, the
allocator capped at 11, 15 or 23 GiB where the row is for a card of 12, 16 or 24 GB.

  cogtune bench fit --model BASE --rows nf4-cached-r8,bf16-cached-r8 --json fit.json

Further keys, such as --train.compile false, hold for every row that trains."""
_DECODE = """Measure an answer: memory, the time for picture and prompt, tokens a second.

  cogtune bench decode --model BASE --rows 1,8,32"""
_FILL = """Measure how fast the feature cache fills, decoding and writing included.

  cogtune bench fill --pictures 32 --data.cache_batch 2"""
_LOADER = """Measure whether preparing rows keeps up: pictures of 1344 pixels decoded, and features read, while samples
are taken at a steady rate. Needs no GPU.

  cogtune bench loader --rate 20"""

_LOAD = """Measure loading, each mode in a process of its own: time beside a plain read of the same bytes, host memory,
GPU memory.

  cogtune bench load --model BASE --modes bf16,nf4 --json load.json"""
_MAKE = """Write a random checkpoint in the published layout: 39 GB in 8 shards with index, configuration and a byte
tokenizer. Its answers mean nothing; its sizes, names and files are those of the published one.

  cogtune bench make-checkpoint BASE"""


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
    for name, text, short, command in (
        ("train", _TRAIN, "Training steps, variants side by side.", _train),
        ("baseline", _BASELINE, "The published computation.", _baseline),
        ("sweep", _SWEEP, "What a growing setting costs.", _sweep),
        ("fit", _FIT, "What each setting needs of a card.", _fit),
        ("decode", _DECODE, "Memory and speed of an answer.", _decode),
        ("fill", _FILL, "Filling the feature cache.", _fill),
        ("loader", _LOADER, "Does preparing rows keep up?", _loader),
    ):
        group.command(name, help=text, short_help=short, context_settings=_KEYS)(command)
    group.command("load", help=_LOAD, short_help="Loading a checkpoint.")(_load)
    group.command("make-checkpoint", help=_MAKE, short_help="Write a random checkpoint.")(_make_checkpoint)
    app.add_typer(group, name="bench", help="Measure this machine.", short_help="Measure this machine.")


def _train(
    ctx: typer.Context,
    preset: _Preset = "s400",
    features: Annotated[
        str, typer.Option("--features", help="cached: the tower's output is given; live: it runs.", metavar="KIND")
    ] = "live",
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="NAME key=value ...; several times.", metavar="TEXT")
    ] = None,
    steps: _Steps = 10,
    warmup: _Warmup = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times to go through all variants.")] = 1,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Also profile: where a step's time goes.")] = False,
    cap: Annotated[
        str | None, typer.Option("--cap", help="Let the GPU's allocator have no more than this.", metavar="SIZE")
    ] = None,
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    if cap is not None:
        from cogtune.bench.clock import cap_memory

        cap_memory(cap)
    _steps_of(ctx, variant or [], preset, features, (warmup, steps, rounds), breakdown, tiny, json)


def _baseline(
    ctx: typer.Context,
    preset: _Preset = "s400",
    steps: _Steps = 5,
    warmup: _Warmup = 2,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Also profile: where a step's time goes.")] = False,
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    _steps_of(ctx, ["baseline"], preset, "live", (warmup, steps, 1), breakdown, tiny, json)


def _sweep(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="memory, text, batch, questions or rank.", metavar="NAME")],
    steps: _Steps = 3,
    warmup: _Warmup = 2,
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    from cogtune.bench.sweeps import SERIES, against_plan, check_series, sweep_variants

    texts = sweep_variants(name, tiny=tiny)
    results = _steps_of(ctx, texts, "s400", "cached", (warmup, steps, 1), False, tiny, json, kind=f"sweep-{name}")
    print(against_plan(results.rows))
    if name in SERIES:
        print(check_series(name, results))


def _fit(
    ctx: typer.Context,
    rows: Annotated[
        str, typer.Option("--rows", help="Names joined by commas, or by + to run at once; all without it.")
    ] = "",
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    from cogtune.bench.card_memory import run_rows
    from cogtune.bench.report import Results
    from cogtune.cli.options import split_arguments
    from cogtune.errors import ConfigError

    overrides = split_arguments(ctx.args).overrides
    model = (overrides.pop("model", None) or overrides.pop("model.path", None) or ["random-tiny" if tiny else ""])[0]
    if not model:
        raise ConfigError(
            "bench fit loads a checkpoint in every row, and none is named",
            hint="--model DIR; `cogtune bench make-checkpoint DIR` writes a random one of the published size",
            code="config-missing",
        )
    extra = [word for key, values in overrides.items() for value in values for word in (f"--{key}", value)]
    run_rows(
        [name for name in rows.split(",") if name],
        Results("fit", _command(), json),
        model=model,
        extra=extra,
        capped=not tiny,
    )


def _decode(
    ctx: typer.Context,
    context: Annotated[int, typer.Option("--context", help="Positions of picture and prompt.", metavar="N")] = 2400,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Length of the answer.", metavar="N")] = 64,
    rows: Annotated[str, typer.Option("--rows", help="How many answers at once, several.", metavar="N,N")] = "1",
    adapter: Annotated[bool, typer.Option("--with-adapter", help="With an adapter of the lora section.")] = False,
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    from cogtune.bench.decoding import measure_decoding

    counts = [int(count) for count in rows.split(",") if count.strip().isdigit() and int(count) > 0]
    if len(counts) != len(rows.split(",")):
        raise ConfigError(f"--rows is {rows}; it is whole numbers above 0, such as 1,8,32", code="config-value")
    measure_decoding(
        _config(ctx, tiny), _results("decode", json), context=context, tokens=tokens, rows=counts, adapter=adapter
    )


def _fill(
    ctx: typer.Context,
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="Pictures to compute.", metavar="N")] = 32,
    side: Annotated[int, typer.Option("--side", min=8, help="Their size in pixels.", metavar="N")] = 1344,
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    from cogtune.bench.filling import measure_filling

    measure_filling(_config(ctx, tiny), _results("fill", json), pictures=pictures, side=side)


def _loader(
    ctx: typer.Context,
    rate: Annotated[float, typer.Option("--rate", min=0.1, help="Samples a second to take.", metavar="N")] = 20.0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="For how long.", metavar="N")] = 10.0,
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="Different pictures.", metavar="N")] = 64,
    side: Annotated[int, typer.Option("--side", min=8, help="Their size in pixels.", metavar="N")] = 1344,
    tiny: _Tiny = False,
    json: _Json = None,
) -> None:
    from cogtune.bench.data_loading import measure_loader

    measure_loader(
        _config(ctx, tiny), _results("loader", json), rate=rate, seconds=seconds, pictures=pictures, side=side
    )


def _load(
    model: Annotated[str, typer.Option("--model", "--model.path", help="Checkpoint folder.", metavar="BASE")],
    modes: Annotated[str, typer.Option("--modes", help="Names joined by commas; all without it.")] = "",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", metavar="NAME")] = "auto",
    json: _Json = None,
) -> None:
    from cogtune.bench.model_loading import run_modes
    from cogtune.generate.loading import choose_device

    names = [name for name in modes.split(",") if name]
    run_modes(names, _results("load", json), model=model, device=str(choose_device(device)))


def _make_checkpoint(
    folder: Annotated[Path, typer.Argument(help="The new folder.", metavar="DIR")],
    preset: Annotated[str, typer.Option("--preset", help="full, or tiny: 400 kB.", metavar="NAME")] = "full",
    device: Annotated[
        str, typer.Option("--device", help="Where values are made. auto: the GPU, if there is one.", metavar="NAME")
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the values.")] = 0,
) -> None:
    from cogtune.errors import ConfigError

    if preset not in ("full", "tiny"):
        raise ConfigError(f"--preset is {preset}; it is full or tiny", code="config-value")

    from cogtune.bench.checkpoint import make_checkpoint
    from cogtune.generate.loading import choose_device

    made = make_checkpoint(
        folder, preset=preset, device=choose_device(device), seed=seed, progress=lambda line: print(line, flush=True)
    )
    speed = made.bytes / 1e9 / made.seconds
    print(
        f"{folder}: {made.tensors} tensors in {made.shards} shards, {made.bytes:,} bytes, {made.seconds:.1f} s, "
        f"{speed:.2f} GB/s"
    )


def _config(ctx: typer.Context, tiny: bool) -> RunConfig:
    from cogtune.bench.variants import parse_variants
    from cogtune.cli.options import split_arguments

    overrides = split_arguments(ctx.args).overrides
    if tiny:
        overrides.setdefault("model.path", ["random-tiny"])
    return parse_variants([], overrides, preset="s400", cached=False)[0].config


def _results(kind: str, json: Path | None) -> Results:
    from cogtune.bench.report import Results

    return Results(kind, _command(), json)


def _steps_of(
    ctx: typer.Context,
    texts: list[str],
    preset: str,
    features: str,
    counts: tuple[int, int, int],
    breakdown: bool,
    tiny: bool,
    json: Path | None,
    kind: str = "train",
) -> Results:
    from cogtune.cli.options import split_arguments

    overrides = split_arguments(ctx.args).overrides
    if tiny:
        overrides.setdefault("model.path", ["random-tiny"])

    from cogtune.bench.report import Results
    from cogtune.bench.train import measure
    from cogtune.bench.variants import parse_variants
    from cogtune.distributed.environment import is_main

    variants = parse_variants(texts, overrides, preset=preset, cached=features == "cached")
    results = Results(kind, _command(), json)
    measure(variants, results, warm=counts[0], steps=counts[1], rounds=counts[2], breakdown=breakdown)
    if is_main():
        print(results.line())
    return results


def _command() -> str:
    """The command line, without where its results go; see `shown_command`."""
    from cogtune.bench.report import shown_command

    return shown_command(["cogtune", *sys.argv[1:]])
