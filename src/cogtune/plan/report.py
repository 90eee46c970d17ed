"""Format a plan as text for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cogtune.language import padded, phrase, tr
from cogtune.plan.calibration import CONTEXT
from cogtune.plan.inference import answer, merge
from cogtune.plan.memory import Phase
from cogtune.plan.plan import Plan
from cogtune.plan.setting import Setting
from cogtune.system.byte_sizes import GIB, format_size
from cogtune.system.durations import format_duration

_SHOWN = 4
_NAMES = (
    *(phrase("load"), phrase("fill"), phrase("train"), phrase("evaluate"), phrase("save")),
    *(phrase("experts"), phrase("embedding and head"), phrase("GLU adapter and norms"), phrase("vision tower")),
    *(phrase("adapter"), phrase("adapter gradients"), phrase("optimizer"), phrase("activations"), phrase("logits")),
    *(phrase("workspace"), phrase("batch"), phrase("communication"), phrase("keys and values")),
)
"""Names of phases and of parts of their memory."""


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of the whole plan."""
    setting = plan.setting
    yield from _about(plan)
    yield ""
    yield f"{padded(tr('phase'), 9)} {'GiB':>6}  {tr('of which')}"
    for phase in plan.memory.phases:
        yield _row(tr(phase.name), f"{phase.reserved / GIB:.1f}", parts(phase))
    peak = tr(
        "as nvidia-smi shows it: {reserved:.1f} reserved and {outside:.1f} of CUDA's own, of {usable:.1f} usable",
        reserved=plan.memory.reserved / GIB,
        outside=plan.memory.outside / GIB,
        usable=plan.card.usable / GIB,
    )
    yield _row(tr("peak"), f"{plan.memory.driver / GIB:.1f}", peak)
    yield _row(tr("host"), f"{plan.memory.host / GIB:.1f}", tr("per process, not counting cached file pages"))
    yield ""
    yield from _after_training(plan)
    yield ""
    yield tr(
        "largest batch that fits, all layers recomputed: {rows} row{s} of that length",
        rows=plan.largest,
        s="" if plan.largest == 1 else "s",
    )
    yield from _times(plan)
    yield _headed(tr("disk"), _disk(plan))
    if plan.cost is not None:
        cost = tr("{cost:,.2f} for the whole run on {cards} card{s}", cost=plan.cost, cards=setting.ranks,
                  s="" if setting.ranks == 1 else "s")  # fmt: skip
        yield _headed(tr("cost"), cost)


def _headed(head: str, text: str) -> str:
    return f"{padded(head, 9)}{text}"


def _row(head: str, size: str, text: str) -> str:
    return f"{padded(head, 9)} {size:>6}  {text}"


def _about(plan: Plan) -> Iterator[str]:
    card, setting, rows = plan.card, plan.setting, plan.rows
    count = f"{setting.ranks} x " if setting.ranks > 1 else ""
    usable = tr(
        "{cards}, {usable} of {memory} usable each",
        cards=f"{count}{card.name}",
        usable=format_size(card.usable),
        memory=format_size(card.memory),
    )
    yield _headed(tr("cards"), usable + (tr(" (an estimate: this card was not measured)") if plan.estimate else ""))
    for holder in card.holders:
        yield _headed("", tr("in use by {holder}", holder=holder))
    if rows.typical:
        data = tr(
            "not given, so as an example {count:,} pictures with {tokens} text tokens each",
            count=rows.count,
            tokens=rows.largest.text - 1,
        )
    else:
        data = tr(
            "{count:,} rows on {pictures:,} pictures, longest text {tokens} tokens",
            count=rows.count,
            pictures=rows.pictures,
            tokens=rows.largest.text,
        )
        if not rows.exact:
            data += tr(" (estimated: the model's tokenizer.json is not here)")
    yield _headed(tr("data"), data)
    yield _headed(tr("chosen"), tr(", ").join(chosen(plan)))
    for warning in plan.warnings:
        yield _headed(tr("warning"), warning)


def _after_training(plan: Plan) -> Iterator[str]:
    """Describe what the result needs after training: a card for `chat` and `predict`, host memory for `merge`."""
    phase = answer(plan.setting)
    tokens = plan.setting.batch.tokens(plan.setting.sizes) // plan.setting.batch.rows
    prompt = tr("one prompt of {tokens:,} tokens: {parts}", tokens=tokens, parts=parts(phase))
    yield _row(tr("answer"), f"{phase.reserved / GIB:.1f}", prompt)
    for line in _leaner(plan, phase.reserved):
        yield _row("", "", line)
    host = tr("on the host, {size:.1f} GiB", size=merge(plan.setting).host_bytes / GIB)
    yield _row(tr("merge"), "-", host)


def _leaner(plan: Plan, reserved: int) -> Iterator[str]:
    """Yield the first flags with which answering fits, or those that need least memory, if ``reserved`` is too much.

    A card that is not here is planned for with a desktop on it; what fits only without one is said as well.
    """
    card = plan.card
    if reserved + CONTEXT <= card.usable:
        return
    ways = [(list[str](), reserved), *_ways(plan.setting)]
    fitting = next((way for way in ways if way[1] + CONTEXT <= card.usable), ways[-1])
    alone = next((way for way in ways if card.free is None and way[1] + CONTEXT <= card.memory), fitting)
    if not alone[0]:
        yield tr("fits if nothing else uses the card")
    elif alone is fitting:
        yield tr("more than this card has; {leaner}", leaner=_said(*fitting))
    else:
        yield tr("more than this card has; {leaner}, which fits if nothing else uses the card", leaner=_said(*alone))
    if alone is not fitting:
        desktop = (card.memory - card.usable) / GIB
        yield tr("beside a desktop ({size:.2f} GiB): {leaner}", size=desktop, leaner=_said(*fitting))


def _ways(setting: Setting) -> Iterator[tuple[list[str], int]]:
    """Yield flags with which answering needs less and less, and the bytes that it then reserves."""
    lean, flags = setting.quant, list[str]()
    four_bits = {"experts": "nf4", "tower": "nf4"} if setting.sizes.stored is None else {}
    for changes in (four_bits, {"embedding": "host"}, {"stream": 0}, {"stream": "all"}):
        lean = lean.changed(**changes)
        kept = [flag for flag in flags if not flag.startswith("--quant.stream")]
        flags = [*kept, *(f"--quant.{name} {value}" for name, value in changes.items())]
        own = replace(setting, quant=lean)
        yield flags, answer(own.streaming(0) if lean.streams else own).reserved


def _said(flags: list[str], reserved: int) -> str:
    return tr("with {flags} it takes {size:.1f}", flags=" ".join(flags), size=reserved / GIB)


def summary(plan: Plan) -> str:
    """Return the plan in one line, for the start of a run."""
    return tr(
        "plan: {memory:.1f} of {usable:.1f} GiB ({phase}), {chosen}; {seconds:.2f} s a step, {epoch} an epoch{mark}",
        memory=plan.memory.driver / GIB,
        usable=plan.card.usable / GIB,
        phase=tr(plan.memory.peak.name),
        chosen=tr(", ").join(chosen(plan)),
        seconds=plan.times.step.seconds,
        epoch=format_duration(plan.times.epoch),
        mark=tr(", estimated") if plan.estimate else "",
    )


def chosen(plan: Plan) -> list[str]:
    """Describe the chosen settings in words."""
    setting, layers = plan.setting, plan.setting.sizes.num_hidden_layers
    form = {"none": setting.dtype, "nf4": "NF4", "fp4": "FP4", "int8": "int8", "fp8": "fp8"}
    words = [tr("experts in {form}", form=form.get(setting.quant.experts, setting.quant.experts))]
    if setting.tower == "cached":
        words.append(tr("features cached"))
    elif setting.tower == "live":
        words.append(tr("live tower in {form}", form=form.get(setting.quant.tower, setting.quant.tower)))
    if setting.decoder:
        words.append(tr("{count} of {layers} layers recomputed", count=len(setting.decoder), layers=layers))
        if setting.offloading:
            words.append(tr("their inputs in host memory"))
    else:
        words.append(tr("nothing recomputed"))
    if setting.quant.embedding == "host":
        words.append(tr("embedding in host memory"))
    if setting.resident is not None:
        streamed = layers - setting.resident
        words.append(tr("{count} of {layers} layers streamed from host memory", count=streamed, layers=layers))
    words.append(setting.optimizer)
    if setting.tensor > 1:
        words.append(f"parallel.tensor {setting.tensor}")
    if setting.ranks > setting.tensor:
        words.append(setting.engine)
    return words


def parts(phase: Phase) -> str:
    """Return the largest parts of a phase."""
    largest = sorted(phase.parts.items(), key=lambda item: -item[1])
    shown = [f"{tr(name)} {size / GIB:.1f}" for name, size in largest[:_SHOWN] if size >= 0.05 * GIB]
    return tr(", ").join(shown) or tr("no part reaches 0.1 GiB")


def compared(planned: Phase, reserved: int) -> str:
    """Compare planned with actual memory, for a run that ran out of it."""
    return tr(
        "planned {planned:.2f} GiB ({parts}), reserved {reserved:.2f} GiB",
        planned=planned.reserved / GIB,
        parts=parts(planned),
        reserved=reserved / GIB,
    )


def _times(plan: Plan) -> Iterator[str]:
    times, setting = plan.times, plan.setting
    step = times.step
    shares = {
        tr("decoder"): step.decoder,
        tr("tower"): step.tower,
        tr("dequantising weights"): step.quantisation,
        tr("waiting for other cards"): step.waiting,
        tr("waiting for copies from host memory"): step.copying,
        tr("waiting for the host"): step.host,
    }
    said = tr(", ").join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in shares.items() if seconds >= 0.001)
    rows = setting.batch.rows * setting.ranks // setting.tensor * setting.accumulation
    a_step = tr(
        "a step of {rows} row{s} {seconds:.2f} s ({parts})",
        rows=rows,
        s="s" if rows > 1 else "",
        seconds=step.seconds,
        parts=said,
    )
    yield _headed(tr("time"), a_step)
    epoch = tr("an epoch of {steps:,} steps {duration}", steps=times.steps, duration=format_duration(times.epoch))
    yield _headed("", epoch)
    run = [tr("loading {duration}", duration=format_duration(times.load))]
    if times.fill:
        run.append(tr("filling the cache {duration}", duration=format_duration(times.fill)))
    epochs = tr(
        "{epochs} epoch{s} {duration}",
        epochs=plan.epochs,
        s="s" if plan.epochs > 1 else "",
        duration=format_duration(plan.epochs * times.epoch),
    )
    whole = tr(
        "the whole run {duration} without validation: {parts}",
        duration=format_duration(plan.seconds),
        parts=tr(", ").join([*run, epochs]),
    )
    yield _headed("", whole)
    if plan.answering:
        answers = tr(
            "answers to validation questions: {seconds:.1f} s, before the first step and at each validation",
            seconds=plan.answering,
        )
        yield _headed("", answers)
    if plan.rows.typical:
        example = tr(
            "for the example's {count:,} pictures, one row each: --data DIR counts yours", count=plan.rows.count
        )
        yield _headed("", example)


def _disk(plan: Plan) -> str:
    if plan.rows.typical:
        cache = tr("feature cache of the example's {pictures:,} pictures", pictures=plan.rows.pictures)
    else:
        cache = tr("feature cache of the data's {pictures:,} pictures", pictures=plan.rows.pictures)
    found: Mapping[str, int] = {cache: plan.cache, tr("checkpoints"): plan.checkpoints}
    return tr(", ").join(f"{name} {format_size(size)}" for name, size in found.items() if size)
