"""What a training should be warned of, from its metrics: pure functions over the lines of ``metrics.jsonl``.

`Watch` takes the lines one by one, as a run writes them or from a file, and returns what they give reason to say, each
code once in a run. The words are in `evaluate.warning_texts`. Thresholds were set on recorded curves of good and bad
runs (``benchmarks/results/curves.json``): no good run may have a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

Lines = Sequence[dict[str, Any]]

_FLAT_LINES, _FLAT_STEPS, _FLAT_MOST = 20, 100, 400
_FLAT_SHARE = 0.03  # of the loss: less is no movement
_HELD_SHARE = 0.005  # the same of the validation loss
_LEARNT = 0.2  # nats per token: a loss below it has nowhere to go
_LOW_LR, _NO_GRADIENT = 2e-6, 1e-6
_RECENT = 20  # lines that say what is usual
_SPIKE, _SPIKE_NATS = 4.0, 1.0
_STAYS, _STAYS_RISE, _STAYS_NATS = 6, 1.5, 0.3
_EXPLODING, _EXPLODED = 10.0, 100.0
_WORSE, _WORSE_LAST, _WORSE_NATS, _TRAINED_ON = 1.05, 1.1, 0.02, 0.95
_FEW_ROWS, _LOOKS = 8, 1.02
_STARVED, _STARVED_LINES = 0.5, 5
_CREEPING_LINES, _CREEPING_MOST, _CREEPING_FIT, _CREEPING_SHARE = 20, 1000, 0.9, 0.05
_SLOWER, _SLOWER_LINES = 0.5, 8
_FILLING = 4  # checkpoints that say how fast
_FAR = 20  # what was seen is taken to go on for so many times as long, and no longer


@dataclass(frozen=True)
class Finding:
    """A reason to warn.

    Attributes:
        code: its entry in the catalogue of errors.
        cause: which of the texts of this code fits.
        values: the numbers of the text.
    """

    code: str
    cause: str
    step: int
    values: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``, but for its kind and step."""
        return {"code": self.code, "cause": self.cause, "values": self.values}


class Watch:
    """The metrics of a run so far.

    Args:
        lines: those of the run's earlier starts; nothing is said of them again.
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.start: dict[str, Any] = {}
        self.told: set[str] = set()
        self._lines: dict[str, list[dict[str, Any]]] = {}
        self._began: dict[str, int] = {}
        for line in lines:
            self._keep(line)

    def add(self, line: dict[str, Any]) -> list[Finding]:
        """Take the next line of the metrics and return what it gives reason to say for the first time."""
        self._keep(line)
        looks = _DETECTORS.get(str(line.get("kind")), ())
        found = [one for code, look in looks if code not in self.told and (one := look(self)) is not None]
        self.told |= {one.code for one in found}
        return found

    def _keep(self, line: dict[str, Any]) -> None:
        kind = str(line.get("kind"))
        if kind == "start":
            self.start, self._began = line, {name: len(lines) for name, lines in self._lines.items()}
        elif kind == "warning":
            self.told.add(str(line.get("code")))
        else:
            self._lines.setdefault(kind, []).append(line)

    def all(self, kind: str) -> Lines:
        """The run's lines of a kind, earlier starts included."""
        return self._lines.get(kind, [])

    def own(self, kind: str) -> Lines:
        """The lines of this start alone, which is on one machine."""
        return self.all(kind)[self._began.get(kind, 0) :]

    def limit(self, name: str) -> float | None:
        """A positive number of the line that the run starts with."""
        found = _number(self.start, name)
        return found if found is not None and found > 0 else None


def _number(line: dict[str, Any], name: str) -> float | None:
    value = line.get(name)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known and value is not None else None


def _numbers(lines: Lines, name: str) -> list[float]:
    return [value for line in lines if (value := _number(line, name)) is not None]


def _flat_loss(watch: Watch) -> Finding | None:
    """The loss of the last quarter is that of the first, by all that its noise allows, or by the validation loss."""
    lines = watch.all("train")
    losses, step = _numbers(lines, "loss"), lines[-1]["step"]
    if not _FLAT_LINES <= len(losses) <= _FLAT_MOST or step < _FLAT_STEPS:
        return None
    part = max(5, len(losses) // 4)
    first, last = max(losses[0], fmean(losses[:part])), fmean(losses[-part:])
    jumps = [one - other for one, other in pairwise(losses)]
    error = math.sqrt(fmean(jump * jump for jump in jumps) / part)  # of the difference of two means
    moved, still = abs(first - last), _FLAT_SHARE * first
    held = _numbers(watch.all("validation"), "loss")  # the same records each time, so without noise
    held_still = len(held) >= 3 and abs(held[0] - held[-1]) < _HELD_SHARE * held[0] and moved < max(still, 2 * error)
    if first < _LEARNT or not (held_still or moved + 2 * error < still):
        return None
    rates, norms = _numbers(lines, "lr"), _numbers(lines, "grad_norm")
    cause = "other"
    if norms and median(norms) < _NO_GRADIENT:
        cause = "gradient"
    elif rates and max(rates) < _LOW_LR:
        cause = "lr"
    values = {"first": first, "last": last, "lr": max(rates, default=0.0), "norm": median(norms) if norms else 0.0}
    return Finding("watch-loss-flat", cause, step, values)


def _spike(watch: Watch) -> Finding | None:
    """A step far above what was usual, or a loss that rose and stays up."""
    lines = watch.all("train")[-1 - _STAYS - 5 * _RECENT :]
    losses = _numbers(lines, "loss")
    before = lines[-1 - _RECENT : -1]
    if len(before) < 5 or len(losses) < len(lines):
        return None
    step, highest = lines[-1]["step"], _highest(lines[-1], "loss")
    usual = median(_numbers(before, "loss"))
    most = median(_highest(line, "loss") for line in before)
    if highest > max(_SPIKE * most, most + _SPIKE_NATS):
        return Finding("watch-loss-spike", "one", step, {"loss": highest, "usual": usual})
    earlier, last = losses[:-_STAYS], losses[-_STAYS:]
    if len(earlier) >= _STAYS:
        low = min(fmean(earlier[at : at + _STAYS]) for at in range(len(earlier) - _STAYS + 1))
        if min(last) > _STAYS_RISE * low + _STAYS_NATS:
            return Finding("watch-loss-spike", "stays", step, {"loss": fmean(last), "usual": low})
    return None


def _highest(line: dict[str, Any], name: str) -> float:
    """The largest value of a line's steps; their mean, where only that was recorded."""
    found = [value for key in (f"{name}_max", name) if (value := _number(line, key)) is not None]
    return max(found, default=0.0)


def _exploding(watch: Watch) -> Finding | None:
    """Gradients far above what was usual, and above 1 or the smaller norm that they are scaled down to."""
    lines = [line for line in watch.all("train")[-_RECENT - 5 :] if _number(line, "grad_norm") is not None]
    if len(lines) < 15:
        return None
    usual = median(_numbers(lines[:-5], "grad_norm"))
    limit = max(usual, min(1.0, watch.limit("max_grad_norm") or 1.0))
    last = [_highest(line, "grad_norm") for line in lines[-5:]]
    often = sum(norm > _EXPLODING * limit for norm in last) >= 3
    if not often and last[-1] <= _EXPLODED * limit:
        return None
    values = {"norm": max(last), "usual": usual, "lr": _number(lines[-1], "lr") or 0.0}
    return Finding("watch-gradient-exploding", "", lines[-1]["step"], values)


def _no_gradient(watch: Watch) -> Finding | None:
    """Five lines without any gradient."""
    norms = _numbers(watch.all("train")[-5:], "grad_norm")
    if len(norms) < 5 or any(norms):
        return None
    return Finding("watch-adapter-unchanged", "gradient", watch.all("train")[-1]["step"])


def _unchanged(watch: Watch) -> Finding | None:
    """A checkpoint with the weights of the one before, or with matrices that are zero as at the beginning."""
    lines = watch.all("checkpoint")
    line, before = lines[-1], lines[-2] if len(lines) > 1 else {}
    norm, count, zero = (_number(line, name) for name in ("adapter_norm", "matrices", "zero_matrices"))
    values = {"count": count or 0.0, "zero": zero or 0.0}
    same = norm is not None and norm == _number(before, "adapter_norm") and line["step"] > before["step"]
    if same or (count and zero == count):
        return Finding("watch-adapter-unchanged", "all", line["step"], values)
    if zero and line["step"] >= 10:
        return Finding("watch-adapter-unchanged", "some", line["step"], values)
    return None


def _overfitting(watch: Watch) -> Finding | None:
    """Three validations in a row, each worse, while the training loss goes on falling."""
    lines = [line for line in watch.all("validation") if _number(line, "loss") is not None]
    losses = _numbers(lines, "loss")
    if len(losses) < 4:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    last = losses[-3:]
    rising = last[0] > _WORSE * losses[best] and last[0] < last[1] < last[2]
    rising = rising and last[2] > max(_WORSE_LAST * losses[best], losses[best] + _WORSE_NATS)
    if best > len(losses) - 4 or not rising:
        return None
    step, trained = lines[best]["step"], watch.all("train")
    then = _numbers([line for line in trained if line["step"] <= step][-3:], "loss")
    now = _numbers(trained[-3:], "loss")
    if not then or not now or fmean(now) > _TRAINED_ON * fmean(then):
        return None
    values = {"best": losses[best], "best_step": step, "last": last[-1], "then": fmean(then), "now": fmean(now)}
    return Finding("watch-overfitting", "", lines[-1]["step"], values)


def _picture_ignored(watch: Watch) -> Finding | None:
    """The loss is no lower with the right pictures than with those of other records."""
    line = watch.all("validation")[-1]
    own, other, rows = (_number(line, name) for name in ("own_pictures", "other_pictures", "exchanged"))
    if own is None or other is None or rows is None or rows < _FEW_ROWS or other > _LOOKS * own:
        return None
    return Finding("watch-picture-ignored", "", line["step"], {"own": own, "other": other, "rows": rows})


def _starved(watch: Watch) -> Finding | None:
    """The device waited for batches for most of the time, line after line. The first lines fill the queue."""
    shares = _numbers(watch.own("train")[3:], "loader_wait")[-_STARVED_LINES:]
    if len(shares) < _STARVED_LINES or min(shares) < _STARVED:
        return None
    return Finding("watch-loader-starved", "", watch.own("train")[-1]["step"], {"share": 100 * fmean(shares)})


def _creeping(watch: Watch) -> Finding | None:
    """Memory that rises on a straight line, and reaches its limit before the last step."""
    lines, total = watch.own("train")[-_CREEPING_MOST:], watch.limit("total_steps")
    half = lines[len(lines) // 2 :]
    if total is None or len(half) < _CREEPING_LINES:
        return None
    for cause, name in (("host", "host_gib"), ("device", "memory_gib")):
        limit = watch.limit(f"{name}_limit")
        points = [(float(line["step"]), value) for line in half if (value := _number(line, name)) is not None]
        if limit is None or len(points) < _CREEPING_LINES:
            continue
        (step, now), first = points[-1], points[0][1]
        slope, fit = _line(points)
        rises = sum(one[1] < other[1] for one, other in pairwise(points))
        steady = fit > _CREEPING_FIT and 2 * rises > len(points) and now - first > _CREEPING_SHARE * first
        full = step + (limit - now) / slope if slope > 0 else math.inf
        if steady and full < min(total, step + _FAR * (step - points[0][0])):
            values = {"now": now, "rate": 1000 * slope, "limit": limit, "full": math.ceil(full)}
            return Finding("watch-memory-creeping", cause, int(step), values)
    return None


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The slope of the straight line through points, and the share of their variance that it explains."""
    x, y = fmean(one for one, _ in points), fmean(other for _, other in points)
    xx = sum((one - x) ** 2 for one, _ in points)
    yy = sum((other - y) ** 2 for _, other in points)
    xy = sum((one - x) * (other - y) for one, other in points)
    return (xy / xx, xy * xy / (xx * yy)) if xx > 0 and yy > 0 else (0.0, 0.0)


def _slowing(watch: Watch) -> Finding | None:
    """Samples and tokens a second both below what they were at the beginning, line after line."""
    lines = watch.own("train")
    if len(lines) < 12 + _SLOWER_LINES:
        return None
    found = {}
    for name in ("samples_per_second", "tokens_per_second"):
        usual = median(_numbers(lines[2:12], name) or [0.0])
        last = _numbers(lines[-_SLOWER_LINES:], name)
        if not last or max(last) >= _SLOWER * usual:
            return None
        found[name] = (usual, median(last))
    usual, now = found["samples_per_second"]
    return Finding("watch-throughput", "", lines[-1]["step"], {"usual": usual, "now": now})


def _filling(watch: Watch) -> Finding | None:
    """No room for two more checkpoints, or free space that falls and is gone before the last step."""
    lines, total = watch.own("checkpoint"), watch.limit("total_steps")
    line = lines[-1]
    free, size = _number(line, "free_bytes"), _number(line, "bytes")
    if free is None or size is None:
        return None
    values = {"free": free / 2**30, "size": size / 2**30}
    if free < 2 * size:
        return Finding("watch-disk-filling", "little", line["step"], values)
    recent = lines[-_FILLING:]
    spaces = _numbers(recent, "free_bytes")
    falling = all(one > other for one, other in pairwise(spaces))
    if total is None or len(spaces) < _FILLING or not falling:
        return None
    seen = max(1, line["step"] - recent[0]["step"])
    full = line["step"] + max(0.0, free - size) * seen / (spaces[0] - spaces[-1])
    if full > min(total, line["step"] + _FAR * seen):
        return None
    return Finding("watch-disk-filling", "falling", line["step"], {**values, "full": math.ceil(full)})


_DETECTORS: dict[str, tuple[tuple[str, Callable[[Watch], Finding | None]], ...]] = {
    "train": (
        ("watch-adapter-unchanged", _no_gradient),
        ("watch-loss-flat", _flat_loss),
        ("watch-loss-spike", _spike),
        ("watch-gradient-exploding", _exploding),
        ("watch-loader-starved", _starved),
        ("watch-memory-creeping", _creeping),
        ("watch-throughput", _slowing),
    ),
    "validation": (("watch-overfitting", _overfitting), ("watch-picture-ignored", _picture_ignored)),
    "checkpoint": (("watch-adapter-unchanged", _unchanged), ("watch-disk-filling", _filling)),
}
CODES = tuple(dict.fromkeys(code for looks in _DETECTORS.values() for code, _ in looks))
