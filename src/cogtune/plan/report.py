"""Format a plan as text for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cogtune.plan.calibration import CONTEXT
from cogtune.plan.inference import answer, merge
from cogtune.plan.memory import Phase
from cogtune.plan.plan import Plan
from cogtune.plan.setting import Setting
from cogtune.system.byte_sizes import GIB, format_size
from cogtune.system.durations import format_duration

_SHOWN = 4


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of the whole plan."""
    card, setting, rows = plan.card, plan.setting, plan.rows
    mark = " (an estimate: this card was not measured)" if plan.estimate else ""
    count = f"{setting.ranks} x " if setting.ranks > 1 else ""
    yield f"cards    {count}{card.name}, {format_size(card.usable)} of {format_size(card.memory)} usable each{mark}"
    for holder in card.holders:
        yield f"         in use by {holder}"
    data = f"{rows.count:,} rows on {rows.pictures:,} pictures, longest text {rows.largest.text} tokens"
    if not rows.exact:
        data += " (estimated: the model's tokenizer.json is not here)"
    if rows.typical:
        data = f"not given, so as an example {rows.count:,} pictures with {rows.largest.text - 1} text tokens each"
    yield f"data     {data}"
    yield f"chosen   {', '.join(chosen(plan))}"
    for warning in plan.warnings:
        yield f"warning  {warning}"
    yield ""
    yield f"{'phase':<9} {'GiB':>6}  of which"
    for phase in plan.memory.phases:
        yield f"{phase.name:<9} {phase.reserved / GIB:6.1f}  {parts(phase)}"
    outside = plan.memory.outside / GIB
    yield (
        f"{'peak':<9} {plan.memory.driver / GIB:6.1f}  as nvidia-smi shows it: {plan.memory.reserved / GIB:.1f}"
        f" reserved and {outside:.1f} of CUDA's own, of {card.usable / GIB:.1f} usable"
    )
    yield f"{'host':<9} {plan.memory.host / GIB:6.1f}  per process, not counting cached file pages"
    yield ""
    yield from _afterwards(plan)
    yield ""
    yield f"largest batch that fits, all layers recomputed: {plan.largest} rows of that length"
    yield from _times(plan)
    yield f"disk     {_disk(plan)}"
    if plan.cost is not None:
        yield f"cost     {plan.cost:,.2f} for the whole run on {setting.ranks} card(s)"


def _afterwards(plan: Plan) -> Iterator[str]:
    """Describe what the result needs after training: a card for `chat` and `predict`, host memory for `merge`."""
    phase, room = answer(plan.setting), plan.card.usable
    tokens = plan.setting.batch.tokens(plan.setting.sizes) // plan.setting.batch.rows
    yield f"{'answer':<9} {phase.reserved / GIB:6.1f}  one prompt of {tokens:,} tokens: {parts(phase)}"
    if phase.reserved + CONTEXT > room:
        yield f"{'':<9} {'':6}  more than this card has; {_leaner(plan.setting, room)}"
    yield f"{'merge':<9} {'-':>6}  on the host, {merge(plan.setting).host_bytes / GIB:.1f} GiB"


def _leaner(setting: Setting, room: int) -> str:
    """Return the first flags with which answering fits, or those that need least memory."""
    lean = setting.quant.changed(experts="nf4", tower="nf4")
    flags, reserved = "--quant.experts nf4 --quant.tower nf4", answer(replace(setting, quant=lean)).reserved
    if reserved + CONTEXT > room:
        lean, flags = lean.changed(embedding="host"), f"{flags} --quant.embedding host"
        reserved = answer(replace(setting, quant=lean)).reserved
    return f"with {flags} it takes {reserved / GIB:.1f}"


def summary(plan: Plan) -> str:
    """Return the plan in one line, for the start of a run."""
    memory = f"{plan.memory.driver / GIB:.1f} of {plan.card.usable / GIB:.1f} GiB"
    mark = ", estimated" if plan.estimate else ""
    step = f"{plan.times.step.seconds:.2f} s a step, {format_duration(plan.times.epoch)} an epoch{mark}"
    return f"plan: {memory} ({plan.memory.peak.name}), {', '.join(chosen(plan))}; {step}"


def chosen(plan: Plan) -> list[str]:
    """Describe the chosen settings in words."""
    setting, layers = plan.setting, plan.setting.sizes.num_hidden_layers
    form = {"none": setting.dtype, "nf4": "NF4", "int8": "int8", "fp8": "fp8"}
    words = [f"experts in {form.get(setting.quant.experts, setting.quant.experts)}"]
    if setting.tower == "cached":
        words.append("features cached")
    elif setting.tower == "live":
        words.append(f"live tower in {form.get(setting.quant.tower, setting.quant.tower)}")
    recomputed = len(setting.decoder)
    words.append("nothing recomputed" if not recomputed else f"{recomputed} of {layers} layers recomputed")
    if setting.quant.embedding == "host":
        words.append("embedding in host memory")
    words.append(setting.optimizer)
    if setting.tensor > 1:
        words.append(f"parallel.tensor {setting.tensor}")
    if setting.ranks > setting.tensor:
        words.append(setting.engine)
    return words


def parts(phase: Phase) -> str:
    """Return the largest parts of a phase."""
    largest = sorted(phase.parts.items(), key=lambda item: -item[1])
    shown = [f"{name} {size / GIB:.1f}" for name, size in largest[:_SHOWN] if size >= 0.05 * GIB]
    return ", ".join(shown)


def compared(planned: Phase, reserved: int) -> str:
    """Compare planned with actual memory, for a run that ran out of it."""
    return f"planned {planned.reserved / GIB:.2f} GiB ({parts(planned)}), reserved {reserved / GIB:.2f} GiB"


def _times(plan: Plan) -> Iterator[str]:
    times, setting = plan.times, plan.setting
    step = times.step
    shares = {
        "decoder": step.decoder,
        "tower": step.tower,
        "unpacking weights": step.quantisation,
        "waiting for other cards": step.waiting,
        "waiting for the host": step.host,
    }
    said = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in shares.items() if seconds >= 0.001)
    rows = setting.batch.rows * setting.ranks // setting.tensor * setting.accumulation
    yield f"time     a step of {rows} row{'s' if rows > 1 else ''} {step.seconds:.2f} s ({said})"
    yield f"         an epoch of {times.steps:,} steps {format_duration(times.epoch)}"
    epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
    filling = f"filling the cache {format_duration(times.fill)}, " if times.fill else ""
    parts = f"loading {format_duration(times.load)}, {filling}{epochs} {format_duration(plan.epochs * times.epoch)}"
    yield f"         the whole run {format_duration(plan.seconds)} without validation: {parts}"
    if plan.rows.typical:
        yield f"         for the example's {plan.rows.count:,} pictures, one row each: --data DIR counts yours"


def _disk(plan: Plan) -> str:
    pictures = f"{'the example' if plan.rows.typical else 'the data'}'s {plan.rows.pictures:,} pictures"
    found: Mapping[str, int] = {f"feature cache of {pictures}": plan.cache, "checkpoints": plan.checkpoints}
    return ", ".join(f"{name} {format_size(size)}" for name, size in found.items() if size)
