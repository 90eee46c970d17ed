"""Which metrics are computed, each on the records that it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from cogtune.errors import ConfigError, SetupError
from cogtune.evaluate.metric import Kind, Metric, References, kind_of
from cogtune.evaluate.metrics import find_metric, known
from cogtune.language import phrase, tr

_FEW = 0.05  # share of the records below which a kind gets no metric of its own
KIND_NAMES: dict[Kind, str] = {
    "box": phrase("boxes"),
    "number": phrase("numbers"),
    "short": phrase("short answers"),
    "long": phrase("longer texts"),
}


@dataclass(frozen=True)
class Chosen:
    """A metric and the positions of the records that it scores."""

    metric: Metric
    places: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The metrics in order, the first being the one that the verdict is about; ``notes`` say what was left out."""

    metrics: tuple[Chosen, ...]
    kinds: dict[Kind, int]
    notes: tuple[str, ...] = ()


def choose(names: Sequence[str], references: Sequence[References]) -> Choice:
    """Return the metrics of these names, or, without names, those that fit the records.

    Raises:
        ConfigError: an unknown metric, or one that fits no record; the message names those that fit.
        SetupError: its package is not installed.
    """
    kinds = [kind_of(right) for right in references]
    counts: dict[Kind, int] = dict(Counter(kinds).most_common())
    if names:
        metrics = [find_metric(name) for name in dict.fromkeys(names)]
        return Choice(tuple(_named(metric, references, counts) for metric in metrics), counts)
    notes: list[str] = []
    chosen: list[Chosen] = []
    for kind in (kind for kind, count in counts.items() if count >= _FEW * len(references)):
        for metric in known().values():
            if kind not in metric.kinds or any(one.metric.name == metric.name for one in chosen):
                continue
            places = [at for at, right in enumerate(references) if kinds[at] in metric.kinds and metric.fits(right)]
            if not places:
                continue
            if not installed(metric):
                notes.append(_missing(metric))
                continue
            chosen.append(Chosen(metric, tuple(places)))
    chosen.sort(key=lambda one: _rank(one.metric, counts))
    return Choice(tuple(chosen), counts, tuple(notes))


def installed(metric: Metric) -> bool:
    """Whether the package that a metric needs is there."""
    return metric.package is None or find_spec(metric.package) is not None


def _missing(metric: Metric) -> str:
    return tr(
        "{name} is left out: its package {package} is not installed (pip install \"cogtune[metrics]\")",
        name=metric.name,
        package=metric.package,
    )  # fmt: skip


_FIRST = {"number": ("vqa", "numeric", "exact"), "short": ("vqa", "exact"), "long": ("rouge_l", "token_f1", "bleu"),
          "box": ("box_accuracy", "iou")}  # fmt: skip


def _rank(metric: Metric, counts: dict[Kind, int]) -> tuple[int, int]:
    """The order of the defaults: by the most frequent kind, then by what is usual for it."""
    for place, kind in enumerate(counts):
        if kind in metric.kinds:
            usual = _FIRST[kind]
            return place, usual.index(metric.name) if metric.name in usual else len(usual)
    return len(counts), 0


def _named(metric: Metric, references: Sequence[References], counts: dict[Kind, int]) -> Chosen:
    places = tuple(at for at, right in enumerate(references) if metric.fits(right))
    if not places:
        fitting = [name for name, other in known().items() if any(other.fits(right) for right in references)]
        kinds = tr(", ").join(tr(KIND_NAMES[kind]) for kind in counts)
        raise ConfigError(
            tr(
                "{name} fits none of the {count} records ({kinds})",
                name=metric.name,
                count=len(references),
                kinds=kinds,
            ),
            hint=tr("these fit: {names}", names=tr(", ").join(fitting)),
            code="metric-fits-none",
        )
    if not installed(metric):
        raise SetupError(
            tr("{name} needs the package {package}", name=metric.name, package=metric.package),
            hint=tr('pip install "cogtune[metrics]"'),
            code="no-metric-packages",
        )
    return Chosen(metric, places)
