"""Format a plan as text for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cogtune.language import tr
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
    mark = tr(" (an estimate: this card was not measured)") if plan.estimate else ""
    count = f"{setting.ranks} x " if setting.ranks > 1 else ""
    yield tr(
        "cards    {count}{name}, {usable} of {memory} usable each{mark}",
        count=count,
        name=card.name,
        usable=format_size(card.usable),
        memory=format_size(card.memory),
        mark=mark,
    )
    for holder in card.holders:
        yield tr("         in use by {holder}", holder=holder)
    data = tr(
        "{count:,} rows on {pictures:,} pictures, longest text {text} tokens",
        count=rows.count,
        pictures=rows.pictures,
        text=rows.largest.text,
    )
    if not rows.exact:
        data += tr(" (estimated: the model's tokenizer.json is not here)")
    if rows.typical:
        data = tr(
            "not given, so as an example {count:,} pictures with {text} text tokens each",
            count=rows.count,
            text=rows.largest.text - 1,
        )
    yield f"data     {data}"
    yield f"chosen   {', '.join(chosen(plan))}"
    for warning in plan.warnings:
        yield f"warning  {warning}"
    yield ""
    yield tr("{value:<9} {value_2:>6}  of which", value="phase", value_2="GiB")
    for phase in plan.memory.phases:
        yield f"{phase.name:<9} {phase.reserved / GIB:6.1f}  {parts(phase)}"
    outside = plan.memory.outside / GIB
    yield (
        tr(
            "{value:<9} {driver:6.1f}  as nvidia-smi shows it: {reserved:.1f} reserved and"
            " {outside:.1f} of CUDA's own, of {usable:.1f} usable",
            value="peak",
            driver=plan.memory.driver / GIB,
            reserved=plan.memory.reserved / GIB,
            outside=outside,
            usable=card.usable / GIB,
        )
    )
    yield tr(
        "{value:<9} {host:6.1f}  per process, not counting cached file pages", value="host", host=plan.memory.host / GIB
    )
    yield ""
    yield from _after_training(plan)
    yield ""
    yield tr("largest batch that fits, all layers recomputed: {largest} rows of that length", largest=plan.largest)
    yield from _times(plan)
    yield f"disk     {_disk(plan)}"
    if plan.cost is not None:
        yield tr("cost     {cost:,.2f} for the whole run on {ranks} card(s)", cost=plan.cost, ranks=setting.ranks)


def _after_training(plan: Plan) -> Iterator[str]:
    """Describe what the result needs after training: a card for `chat` and `predict`, host memory for `merge`."""
    phase, room = answer(plan.setting), plan.card.usable
    tokens = plan.setting.batch.tokens(plan.setting.sizes) // plan.setting.batch.rows
    yield tr(
        "{value:<9} {reserved:6.1f}  one prompt of {tokens:,} tokens: {parts}",
        value="answer",
        reserved=phase.reserved / GIB,
        tokens=tokens,
        parts=parts(phase),
    )
    if phase.reserved + CONTEXT > room:
        yield tr(
            "{value:<9} {value:6}  more than this card has; {leaner}", value="", leaner=_leaner(plan.setting, room)
        )
    yield tr(
        "{value:<9} {value_2:>6}  on the host, {host_bytes:.1f} GiB",
        value="merge",
        value_2="-",
        host_bytes=merge(plan.setting).host_bytes / GIB,
    )


def _leaner(setting: Setting, room: int) -> str:
    """Return the first flags with which answering fits, or those that need least memory."""
    lean = setting.quant.changed(experts="nf4", tower="nf4")
    flags, reserved = tr("--quant.experts nf4 --quant.tower nf4"), answer(replace(setting, quant=lean)).reserved
    if reserved + CONTEXT > room:
        lean, flags = lean.changed(embedding="host"), tr("{flags} --quant.embedding host", flags=flags)
        reserved = answer(replace(setting, quant=lean)).reserved
    return tr("with {flags} it takes {reserved:.1f}", flags=flags, reserved=reserved / GIB)


def summary(plan: Plan) -> str:
    """Return the plan in one line, for the start of a run."""
    memory = f"{plan.memory.driver / GIB:.1f} of {plan.card.usable / GIB:.1f} GiB"
    mark = ", estimated" if plan.estimate else ""
    step = tr(
        "{seconds:.2f} s a step, {duration} an epoch{mark}",
        seconds=plan.times.step.seconds,
        duration=format_duration(plan.times.epoch),
        mark=mark,
    )
    return f"plan: {memory} ({plan.memory.peak.name}), {', '.join(chosen(plan))}; {step}"


def chosen(plan: Plan) -> list[str]:
    """Describe the chosen settings in words."""
    setting, layers = plan.setting, plan.setting.sizes.num_hidden_layers
    form = {"none": setting.dtype, "nf4": "NF4", "int8": "int8", "fp8": "fp8"}
    words = [tr("experts in {value}", value=form.get(setting.quant.experts, setting.quant.experts))]
    if setting.tower == "cached":
        words.append(tr("features cached"))
    elif setting.tower == "live":
        words.append(tr("live tower in {value}", value=form.get(setting.quant.tower, setting.quant.tower)))
    recomputed = len(setting.decoder)
    words.append(
        tr("nothing recomputed")
        if not recomputed
        else tr("{recomputed} of {layers} layers recomputed", recomputed=recomputed, layers=layers)
    )
    if setting.quant.embedding == "host":
        words.append(tr("embedding in host memory"))
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
        "dequantising weights": step.quantisation,
        "waiting for other cards": step.waiting,
        "waiting for the host": step.host,
    }
    said = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in shares.items() if seconds >= 0.001)
    rows = setting.batch.rows * setting.ranks // setting.tensor * setting.accumulation
    yield tr(
        "time     a step of {rows} row{s} {seconds:.2f} s ({said})",
        rows=rows,
        s="s" if rows > 1 else "",
        seconds=step.seconds,
        said=said,
    )
    yield tr(
        "         an epoch of {steps:,} steps {duration}",
        steps=times.steps,
        duration=format_duration(times.epoch),
    )
    epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
    filling = tr("filling the cache {duration}, ", duration=format_duration(times.fill)) if times.fill else ""
    parts = f"loading {format_duration(times.load)}, {filling}{epochs} {format_duration(plan.epochs * times.epoch)}"
    yield tr(
        "         the whole run {duration} without validation: {parts}",
        duration=format_duration(plan.seconds),
        parts=parts,
    )
    if plan.rows.typical:
        yield tr(
            "         for the example's {count:,} pictures, one row each: --data DIR counts yours",
            count=plan.rows.count,
        )


def _disk(plan: Plan) -> str:
    pictures = f"{(tr('the example') if plan.rows.typical else tr('the data'))}'s {plan.rows.pictures:,} pictures"
    found: Mapping[str, int] = {f"feature cache of {pictures}": plan.cache, "checkpoints": plan.checkpoints}
    return ", ".join(f"{name} {format_size(size)}" for name, size in found.items() if size)
