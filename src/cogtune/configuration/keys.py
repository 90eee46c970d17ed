"""The table of configuration keys, used by help, error messages, documentation and the rules for resuming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from pydantic.fields import FieldInfo

from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.field_types import fields_of, kinds, type_text, value_text
from cogtune.configuration.run_config import RunConfig
from cogtune.configuration.suggestions import nearest
from cogtune.configuration.values import Section

ALIASES = {
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "data": "data.path",
    "output": "train.output",
    "adapter": "lora.start_from",
    "resume": "train.resume",
}
"""Short flags (``--model`` ...) of a run, and their keys."""

ANSWER_ALIASES = {
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "data": "data.path",
    "adapter": "generate.adapter",
    "merge": "generate.merge",
    "device": "generate.device",
    "offload": "generate.offload",
    "max-new-tokens": "generate.max_new_tokens",
    "max-input-len": "generate.max_input_len",
    "greedy": "generate.greedy",
    "temperature": "generate.temperature",
    "top-p": "generate.top_p",
    "top-k": "generate.top_k",
    "seed": "generate.seed",
    "batch-size": "generate.batch_size",
    "own-history": "generate.own_history",
}
"""Short flags of answering, and their keys."""


@dataclass(frozen=True)
class Key:
    """One configuration key."""

    key: str
    field: FieldInfo
    default: str
    description: str
    required: bool
    alias: str | None
    kinds: frozenset[str]
    """Kinds of value it accepts: bool, int, float, text, list, mapping, null."""
    item_kinds: frozenset[str]
    """For a list, the kinds of its items."""

    @property
    def type(self) -> str:
        """Its type with bounds, in the user's language: ``whole number >= 1``."""
        return type_text(self.field)

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]


def aliases(root: type[Section] = RunConfig) -> Mapping[str, str]:
    """Return a configuration's short flags (without dashes) and their keys."""
    return ANSWER_ALIASES if root is AnswerConfig else ALIASES


@cache
def known_keys(root: type[Section] = RunConfig) -> Mapping[str, Key]:
    """Return every key of a configuration by name, in section order."""
    alias_of = {key: f"--{alias}" for alias, key in aliases(root).items()}
    return {name: _key(name, field, alias_of.get(name)) for name, field in fields_of(root).items()}


def _key(name: str, field: FieldInfo, alias: str | None) -> Key:
    of_value, of_items = kinds(field.annotation)
    return Key(
        key=name,
        field=field,
        default="required" if field.is_required() else value_text(field.default),
        description=field.description or "",
        required=field.is_required(),
        alias=alias,
        kinds=of_value,
        item_kinds=of_items,
    )


def describe_keys(root: type[Section] = RunConfig) -> tuple[Key, ...]:
    """Return all keys in section order."""
    return tuple(known_keys(root).values())


@cache
def sections(root: type[Section] = RunConfig) -> Mapping[str, type[Section]]:
    """Return the sections of a configuration by name."""
    found: dict[str, type[Section]] = {}
    for name, field in root.model_fields.items():
        assert isinstance(field.annotation, type)
        found[name] = field.annotation
    return found


def nearest_key(name: str, extra: Iterable[str] = (), root: type[Section] = RunConfig) -> str | None:
    """Return the key (or one of ``extra``, such as a command's own flags) that a misspelt or foreign name most likely
    means.
    """
    return nearest(name, list(known_keys(root)), [*aliases(root), *extra])
