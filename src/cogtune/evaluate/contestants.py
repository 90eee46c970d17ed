"""Whose answers are compared: a model with or without an adapter, or a file of predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cogtune.adapters.adapter_folder import CONFIG_NAME, find_adapter
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.load import explicit_values, with_values
from cogtune.errors import ConfigError
from cogtune.language import tr

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Contestant:
    """One side of a comparison.

    Attributes:
        name: as tables call it.
        config: the model and how it answers; None: answers are in ``predictions``.
        predictions: a file that ``cogtune predict`` wrote.
    """

    name: str
    config: AnswerConfig | None = None
    predictions: Path | None = None


def contestants(config: AnswerConfig, against: tuple[str, ...], predictions: Path | None = None) -> list[Contestant]:
    """Return the evaluated model first, then those that it is compared with.

    ``base`` is the evaluated model without its adapter; other names are an adapter's folder, the output folder of a
    training, a model's folder, or a predictions file (``.jsonl``).

    Raises:
        ConfigError: nothing to evaluate, a name that is none of these, or ``base`` of what has no adapter.
    """
    if predictions is not None:
        first = Contestant(_short(predictions), predictions=predictions)
    elif config.generate.adapter is not None:
        first = Contestant(TUNED if set(against) <= {BASE} else _short(config.generate.adapter), config)
    elif config.model.path is not None:
        first = Contestant(BASE if BASE not in against else _short(Path(config.model.path)), config)
    else:
        raise ConfigError(
            tr("no model is named"),
            hint=tr("give --adapter OUT, --model BASE or --predictions answers.jsonl"),
            code="config-missing",
        )
    others = [_other(name, config, first) for name in dict.fromkeys(against)]
    return _with_own_names([first, *others])


def _other(name: str, config: AnswerConfig, first: Contestant) -> Contestant:
    if name == BASE:
        if config.generate.adapter is None:
            raise ConfigError(
                tr("--against base: there is no adapter whose base this could be"),
                hint=tr("give --adapter OUT, or name a model's folder"),
                code="config-combination",
            )
        return Contestant(BASE, config)
    path = Path(name).expanduser()
    if path.suffix == ".jsonl":
        return Contestant(_short(path), predictions=path)
    if (path / CONFIG_NAME).is_file() or (path / "adapter" / CONFIG_NAME).is_file():
        return Contestant(_short(path), _with(config, {"generate.adapter": str(find_adapter(path))}))
    if (path / "config.json").is_file():
        return Contestant(_short(path), _with(config, {"model.path": name}, without="generate.adapter"))
    raise ConfigError(
        tr("--against {name}: neither an adapter, a model's folder nor a predictions file", name=name),
        hint=tr("name one of them, or base for the model without its adapter"),
        code="config-value",
    )


def without_adapter(config: AnswerConfig, model: str) -> AnswerConfig:
    """Return the settings of an adapter's base: those that the adapter was evaluated with."""
    return _with(config, {"model.path": model}, without="generate.adapter")


def _with(config: AnswerConfig, values: dict[str, str], without: str = "") -> AnswerConfig:
    kept = {key: value for key, value in explicit_values(config).items() if key != without}
    return with_values(AnswerConfig(), kept | values)


def _short(path: Path) -> str:
    """The last names of a path that tell models apart: ``runs/a/adapter`` is ``a``."""
    parts = [part for part in path.expanduser().absolute().parts if part != "/"]
    while len(parts) > 1 and parts[-1] == "adapter":
        parts.pop()
    return parts[-1] if parts else str(path)


def _with_own_names(found: list[Contestant]) -> list[Contestant]:
    """Number names that stand there twice."""
    seen: dict[str, int] = {}
    named = []
    for one in found:
        seen[one.name] = seen.get(one.name, 0) + 1
        named.append(one if seen[one.name] == 1 else replace(one, name=f"{one.name} ({seen[one.name]})"))
    return named
