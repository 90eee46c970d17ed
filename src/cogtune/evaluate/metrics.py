"""Every metric by its name."""

from __future__ import annotations

from cogtune.errors import ConfigError
from cogtune.evaluate.answer_metrics import answer_metrics, numeric
from cogtune.evaluate.metric import Metric
from cogtune.evaluate.text_metrics import text_metrics
from cogtune.language import tr


def known() -> dict[str, Metric]:
    """Return every metric by its name, in the order of the help."""
    return {metric.name: metric for metric in (*answer_metrics(), *text_metrics())}


def find_metric(name: str) -> Metric:
    """Return the metric of a name; ``numeric:0.01`` sets that metric's tolerance.

    Raises:
        ConfigError: no such metric, or a tolerance that is none.
    """
    metrics = known()
    base, colon, given = name.partition(":")
    if base == "numeric" and colon:
        try:
            tolerance = float(given)
        except ValueError:
            tolerance = -1.0
        if not 0 <= tolerance < 1:
            raise ConfigError(
                tr("{name}: `{given}` is no tolerance", name=name, given=given),
                hint=tr("for example numeric:0.01"),
                code="config-value",
            )
        return numeric(tolerance)
    if name not in metrics:
        raise ConfigError(
            tr("no metric is called `{name}`", name=name),
            hint=tr("there are {names}", names=tr(", ").join(metrics)),
            code="config-value",
        )
    return metrics[name]
