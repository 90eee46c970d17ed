"""What is compared: variants of one configuration, each with a name, its changes, and a preset of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogtune.configuration.keys import ALIASES
from cogtune.configuration.load import load_config
from cogtune.configuration.resolve import memory_budget
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.language import tr

BASELINE = "baseline"
_OWN = ("preset", "features")
_SHARED = ("batch_size", "accumulation", "activation_offloading")
"""Settings of ``train`` in which two variants of one assembled model may differ, besides recomputation."""


@dataclass(frozen=True)
class Variant:
    """A variant. ``cached``: features are given instead of pixels. ``baseline``: the published training step."""

    name: str
    preset: str
    cached: bool
    baseline: bool
    config: RunConfig
    changes: Mapping[str, str]

    @property
    def model_key(self) -> str:
        """A key that is equal for variants that can share an assembled model."""
        values = self.config.model_dump(mode="json")
        train = {key: value for key, value in values.pop("train").items() if key not in _SHARED}
        policy = train["gradient_checkpointing"]
        if policy in ("none", "all") or isinstance(policy, int):
            train["gradient_checkpointing"] = "named"
        values.pop("data")
        return repr((self.baseline, values, train))


def parse_variants(
    texts: Sequence[str], overrides: Mapping[str, Sequence[str]], *, preset: str, cached: bool
) -> list[Variant]:
    """Parse variants from the command line: ``NAME key=value key=value``, on top of the command's ``overrides``.

    A variant called ``baseline`` is the published training step. Without texts there is one variant, named after its
    preset.

    Raises:
        ConfigError: a repeated name, a word that is not ``key=value``, an unknown key or a wrong value.
    """
    if not texts:
        return [_variant(preset, {}, overrides, preset, cached)]
    variants: list[Variant] = []
    for text in texts:
        words = text.split()
        name = words.pop(0) if words and "=" not in words[0] else text
        changes: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(tr("--variant `{text}`: `{word}` is not key=value", text=text, word=word))
            changes[ALIASES.get(key, key)] = value
        if any(other.name == name for other in variants):
            raise ConfigError(
                tr("--variant `{name}` is given twice", name=name), hint=tr("names tell the rows of the table apart")
            )
        variants.append(_variant(name, changes, overrides, preset, cached))
    return variants


def _variant(
    name: str, changes: dict[str, str], overrides: Mapping[str, Sequence[str]], preset: str, cached: bool
) -> Variant:
    baseline = name == BASELINE or name.startswith(f"{BASELINE}-")
    own = {key: changes[key] for key in _OWN if key in changes}
    keys = {key: [value] for key, value in changes.items() if key not in own}
    features = own.get("features", "live" if baseline or not cached else "cached")
    if features not in ("live", "cached"):
        raise ConfigError(tr("features is `{features}`; it is live or cached", features=features))
    given = {ALIASES.get(key, key): value for key, value in overrides.items()}
    config = load_config(None, {**_DEFAULTS, **given, **keys})
    policy = config.train.gradient_checkpointing
    if memory_budget(policy) is not None:
        raise ConfigError(
            tr(
                "train.gradient_checkpointing is {policy}: a measurement has no plan that would keep a size",
                policy=policy,
            ),
            hint=tr("name the layers: none, all, or a number k for every k-th"),
            code="config-value",
        )
    if config.quant.stream == "auto":
        raise ConfigError(
            tr("quant.stream is auto: a measurement has no plan that would choose the layers"),
            hint=tr("name how many stay on the card: 0 to the model's number of layers"),
            code="config-value",
        )
    return Variant(name, own.get("preset", preset), features == "cached", baseline, config, changes)


_DEFAULTS: dict[str, Sequence[str]] = {
    "model.path": ["random"],
    "data.path": ["synthetic"],
    "data.validation_share": ["0"],
    "train.output": ["not-written"],
    "train.save_steps": ["1000000000"],
    "log.steps": ["1"],
    "lora.targets": ["vision_expert_query_key_value"],
    "lora.rank": ["8"],
    "train.gradient_checkpointing": ["none"],
}
"""A measurement's default setting: that of the published table and its baseline."""
