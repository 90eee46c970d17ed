"""Sections of the report about a training: what ran, its curves, its data, the plan beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogtune.errors import ConfigError
from cogtune.evaluate import warning_texts
from cogtune.evaluate.metrics import find_metric
from cogtune.evaluate.report.chart import Frame, Line, line_chart
from cogtune.evaluate.report.words import LANGUAGES, both, number, pair, plain, shown
from cogtune.evaluate.run_folder import RunFolder, energy_of
from cogtune.language import phrase, speaking
from cogtune.system.durations import format_duration
from cogtune.system.energy import format_energy

_STYLES = ("one", "two", "three", "four")
_GIB = 2**30
_LIBRARIES = ("cogtune", "python", "torch", "transformers", "peft", "cuda")


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return names and values, both HTML, as a table."""
    body = "".join(f"<tr><th scope=row>{name}</th><td>{value}</td></tr>" for name, value in rows if value)
    return f"<div class=wide><table class=facts>{body}</table></div>"


def span(seconds: float) -> str:
    """Return a duration in both languages."""
    said = []
    for language in ("en", "zh"):
        with speaking(language):
            said.append(shown(format_duration(seconds)))
    return pair(*said)


def what_ran(run: RunFolder) -> str:
    """Configuration, versions, device, data and time of a training."""
    versions = run.versions
    base = f"{shown(str(run.value('model.path') or ''))}"
    libraries = ", ".join(f"{name} {shown(str(versions[name]))}" for name in _LIBRARIES if versions.get(name))
    data = run.data
    rows = [
        (both("base model"), base),
        (both("adapter"), _adapter(run)),
        (both("data"), shown(", ".join(_paths(run)))),
        (both("records"), _records(data)),
        (both("fingerprint of the data"), f"<code>{shown(str(data.get('fingerprint', ''))[:16])}</code>"),
        (both("steps"), _steps(run)),
        (both("started"), shown(run.started)),
        (both("time"), span(run.seconds) if run.seconds else ""),
        (both("energy of the cards"), _energy(run)),
        (both("device"), shown(f"{versions.get('device', '')}")),
        (both("versions"), libraries),
    ]
    config = (
        f"<details><summary>{both('every key, as it was used')}</summary><pre>{shown(run.config_text)}</pre></details>"
    )
    return table(rows) + (config if run.config_text else "")


def _energy(run: RunFolder) -> str:
    drawn = energy_of(run.metrics)
    if not drawn:
        return ""
    total, each = (format_energy(drawn[name]) for name in ("joules", "joules_per_sample"))
    return both("{energy}, {each} a sample", energy=total, each=each)


def _paths(run: RunFolder) -> list[str]:
    given = run.value("data.path") or []
    return [str(one.get("path", "")) if isinstance(one, dict) else str(one) for one in given]


def _adapter(run: RunFolder) -> str:
    lora = run.config.get("lora") or {}
    targets = ", ".join(map(str, lora.get("targets") or ()))
    return both("LoRA of rank {rank} on {targets}", rank=int(lora.get("rank") or 0), targets=targets)


def _records(data: dict[str, Any]) -> str:
    if not data:
        return ""
    return both(
        "{train:,} pictures and texts to train on, {validation:,} to validate, {turns:,} questions in all",
        train=int(data.get("train_pictures") or 0),
        validation=int(data.get("validation_pictures") or 0),
        turns=int(data.get("turns") or 0),
    )


def _steps(run: RunFolder) -> str:
    result = run.result
    if result is None:
        return both("{step} of {total}: the run did not finish", step=run.steps, total=run.total_steps)
    best = result.get("best_step")
    if best is None:
        return str(result.get("step") or 0)
    return both("{step}, the best one {best}", step=int(result.get("step") or 0), best=int(best))


def unfinished(run: RunFolder) -> str:
    """Say that a run did not finish, and why if its log says so."""
    if run.result is not None:
        return ""
    why = f"<pre>{shown(run.error)}</pre>" if run.error else ""
    text = both(
        "This run did not finish: its last logged step is {step} of {total}.", step=run.steps, total=run.total_steps
    )
    return f'<div class="note worse" role=note><p><b>{text}</b></p>{why}</div>'


def warnings(run: RunFolder) -> str:
    """What the training warned of, with what to do; empty without warnings."""
    items = []
    for line in run.lines("warning"):
        said = []
        for language in LANGUAGES:
            with speaking(language):
                values = line.get("values")
                found = warning_texts.texts(
                    str(line.get("code")), str(line.get("cause")), values if isinstance(values, dict) else {}
                )
            said += [None if found is None else f"{shown(found[0])}<br><small>{shown(found[1])}</small>"]
        if said[0] is not None and said[1] is not None:
            step = both("step {step}", step=line["step"])
            items.append(f"<li><b>{step}</b>: {pair(said[0], said[1])} <code>{shown(line['code'])}</code></li>")
    if not items:
        return ""
    title = f"<p><b>{both('The training warned of this:')}</b></p>"
    return f'<div class="note worse" role=note>{title}<ul>{"".join(items)}</ul></div>'


def curves(run: RunFolder, other: RunFolder | None = None) -> str:
    """Charts of loss, values of answers, speed, memory, learning rate and gradient norm."""
    parts = [_loss(run, other), _answers(run)]
    for name, key in (
        (phrase("samples per second"), "samples_per_second"),
        (phrase("peak memory, GiB"), "memory_gib"),
        (phrase("learning rate"), "lr"),
        (phrase("norm of the gradient"), "grad_norm"),
    ):
        points = _points(run.lines("train"), key)
        parts.append(chart(name, [("", points)] if len(points) > 1 else []))
    return f"<div class=charts>{''.join(parts)}</div>"


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _loss(run: RunFolder, other: RunFolder | None) -> str:
    lines = [(both("training"), _points(run.lines("train"), "loss")),
             (both("validation"), _points(run.lines("validation"), "loss"))]  # fmt: skip
    held = run.lines("validation")
    for one in dict.fromkeys(one for line in held for one in line.get("sets") or ()):
        parts = [{**(line.get("sets") or {}).get(one, {}), "step": line["step"]} for line in held]
        points = _points(parts, "loss")
        lines.append((f"{both('validation')} {shown(one)}", points))
    if other is not None:
        name = shown(other.path.name)
        lines += [(f"{both('training')} {name}", _points(other.lines("train"), "loss")),
                  (f"{both('validation')} {name}", _points(other.lines("validation"), "loss"))]  # fmt: skip
    return chart(phrase("loss"), lines, log=True)


def _answers(run: RunFolder) -> str:
    lines = run.lines("answers")
    names = list(dict.fromkeys(name for line in lines for name in line.get("values", {})))[: len(_STYLES)]
    drawn = [
        (_metric(name), [(line["step"], 100 * line["values"][name]) for line in lines if name in line["values"]])
        for name in names
    ]
    return chart(phrase("answers to validation questions, points"), drawn)


def _metric(name: str) -> str:
    try:
        return both(find_metric(name).title)
    except ConfigError:  # of a run of another version
        return shown(name)


def chart(title: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, log: bool = False) -> str:
    """Return a chart over steps with title and legend (HTML names); empty without two points."""
    lines = [(name, points) for name, points in lines if points]
    if not lines or max(x for _, points in lines for x, _ in points) == 0:
        return ""
    if log and min(y for _, points in lines for _, y in points) <= 0:
        log = False
    drawn = [
        Line("", _STYLES[place % len(_STYLES)], points, dots=len(points) <= 24)
        for place, (_, points) in enumerate(lines)
    ]
    svg = line_chart(drawn, Frame(plain(title), 560, 220, right=24), log=log)
    named = [(line.style, name) for line, (name, _) in zip(drawn, lines, strict=True) if name]
    legend = "".join(f'<span><i class="{style}"></i>{name}</span>' for style, name in named)
    return f"<figure><figcaption>{both(title)}</figcaption>{svg}<p class=legend>{legend}</p></figure>"


def data_report(run: RunFolder) -> str:
    """Everything that was left out, cut or repaired, with counts, and the rows' lengths."""
    data, rows = run.data, []
    counted: list[tuple[str, Any]] = [
        (phrase("records left out: {kind}"), data.get("bad")),
        (phrase("repaired: {kind}"), data.get("repaired")),
    ]
    for template, counts in counted:
        for kind, count in (counts or {}).items():
            rows.append((both(template, kind=str(kind)), number(count, 0)))
    held = data.get("validation_rows") or {}
    sets = {"": held} if "rows" in held else held
    parts = [(both("training"), data.get("train_rows") or {})]
    parts += [(f"{both('validation')} {shown(str(name))}".rstrip(), found) for name, found in sets.items()]
    for name, found in parts:
        for key, template in _CUT.items():
            if found.get(key):
                rows.append((f"{name}: {both(template)}", number(found[key], 0)))
    if data.get("turned"):
        rows.append(
            (both("pictures with an EXIF orientation ({exif})", exif=str(data.get("exif"))), number(data["turned"], 0))
        )
    if data.get("animated"):
        rows.append((both("animated pictures, of which the first frame is used"), number(data["animated"], 0)))
    examples = [*data.get("bad_examples", ()), *data.get("notes", ())]
    listed = "".join(f"<li><bdi>{shown(str(one))}</bdi></li>" for one in examples)
    text = table(rows) if rows else f"<p>{both('Nothing was left out, cut or repaired.')}</p>"
    return text + (f"<ul>{listed}</ul>" if listed else "") + _lengths(data)


_CUT = {
    "dropped_long_prompt": phrase("questions longer than data.max_input_len, left out"),
    "dropped_long_answer": phrase("answers longer than data.max_output_len, left out"),
    "truncated_answers": phrase("answers cut to data.max_output_len"),
    "trimmed": phrase("answers trained without their first turns"),
}


def _lengths(data: dict[str, Any]) -> str:
    ranges = ((data.get("row_lengths") or {}).get("train") or {}).get("ranges") or {}
    return histogram(phrase("tokens of a row"), ranges, both("rows"))


def histogram(title: str, ranges: dict[str, int], unit: str) -> str:
    """Return bars for counts by range; empty without any."""
    most = max(ranges.values(), default=0)
    if not most:
        return ""
    bars = "".join(
        f"<tr><th scope=row>{shown(name)}</th><td class=bars><div style='width:{100 * count / most:.1f}%'></div></td>"
        f"<td>{count:,}</td></tr>"
        for name, count in ranges.items()
    )
    head = f"<tr><th scope=col>{both(title)}</th><th></th><th scope=col>{unit}</th></tr>"
    return f"<div class=wide><table class=histogram><thead>{head}</thead><tbody>{bars}</tbody></table></div>"


def plan_report(run: RunFolder) -> str:
    """The plan that the run was started with, beside what was measured; empty without a plan (on a CPU)."""
    plan = run.plan
    train = run.lines("train")
    if not plan or not train:
        return ""
    memory = max(line.get("memory_gib", 0.0) for line in train)
    rows = [_beside(phrase("peak memory allocated, GiB"), _allocated(plan) / _GIB, memory)]
    speeds = [line["samples_per_second"] for line in train[1:] or train if line.get("samples_per_second")]
    step, batch = (plan.get("seconds") or {}).get("step"), run.run.get("batch_size", 0) * run.run.get("ranks", 0)
    batch *= run.run.get("accumulation", 1)
    if step and speeds and batch:
        rows.append(_beside(phrase("seconds of a step"), step, batch / sorted(speeds)[len(speeds) // 2], digits=3))
    answering = [line["seconds"] for line in run.lines("answers")]
    if answering and plan["seconds"].get("answering"):
        rows.append(
            _beside(phrase("seconds of answering"), plan["seconds"]["answering"], sum(answering) / len(answering))
        )
    head = "".join(f"<th scope=col>{one}</th>" for one in ("", both("planned"), both("measured")))
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _allocated(plan: dict[str, Any]) -> float:
    phases = plan.get("phases") or {}
    return float(max((phase.get("allocated", 0) for phase in phases.values()), default=0))


def _beside(name: str, planned: float, measured: float, digits: int = 1) -> str:
    return f"<tr><th scope=row>{both(name)}</th><td>{planned:.{digits}f}</td><td>{measured:.{digits}f}</td></tr>"
