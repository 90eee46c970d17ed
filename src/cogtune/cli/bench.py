"""``cogtune bench``: measurements on the hardware at hand, one subcommand per question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

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


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
    group.command("train", help=_TRAIN, short_help="Training steps, variants side by side.", context_settings=_KEYS)(
        _train
    )
    group.command("baseline", help=_BASELINE, short_help="The published computation.", context_settings=_KEYS)(
        _baseline
    )
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


def _steps_of(
    ctx: typer.Context,
    texts: list[str],
    preset: str,
    features: str,
    counts: tuple[int, int, int],
    breakdown: bool,
    tiny: bool,
    json: Path | None,
) -> None:
    from cogtune.cli.options import split_arguments

    overrides = split_arguments(ctx.args).overrides
    if tiny:
        overrides.setdefault("model.path", ["random-tiny"])

    from cogtune.bench.report import Results
    from cogtune.bench.training import measure
    from cogtune.bench.variants import parse_variants

    variants = parse_variants(texts, overrides, preset=preset, cached=features == "cached")
    results = Results("train", _command(), json)
    measure(variants, results, warm=counts[0], steps=counts[1], rounds=counts[2], breakdown=breakdown)
    print(results.line())


def _command() -> str:
    shown = (f'"{word}"' if " " in word else word for word in sys.argv[1:])
    return " ".join(["cogtune", *shown])
