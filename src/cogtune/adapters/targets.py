"""Target modules of an adapter: named sets, module names as peft matches them, and patterns.

The published module names are ambiguous: ``gate_proj`` also matches the GLU adapter, ``linear_proj`` also matches a
container, ``dense`` matches only the tower. A name that matches nothing or a container is an error, and the
named sets spell out suffixes that match exactly what they say.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cogtune.errors import AdapterError
from cogtune.language import tr

if TYPE_CHECKING:
    from torch import nn

_MLP = ("gate_proj", "up_proj", "down_proj")


def _expert(name: str) -> dict[str, tuple[str, ...]]:
    attention = (f"{name}_expert_query_key_value", f"{name}_expert_dense")
    mlp = tuple(f"{name}_mlp.{part}" for part in _MLP)
    return {"": attention + mlp, "-attention": attention, "-mlp": mlp}


def _sets() -> dict[str, tuple[str, ...]]:
    vision, language = _expert("vision"), _expert("language")
    named = {f"vision-experts{part}": suffixes for part, suffixes in vision.items()}
    named |= {f"language-experts{part}": suffixes for part, suffixes in language.items()}
    named |= {f"experts{part}": vision[part] + language[part] for part in vision}
    named["vision-tower"] = ("attention.query_key_value", "attention.dense", "mlp.fc1", "mlp.fc2")
    named["glu-adapter"] = tuple(
        f"linear_proj.{part}" for part in ("linear_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h")
    )
    return named


TARGET_SETS = _sets()
_PATTERN_CHARACTERS = set("*?[](){}|\\^$+")


LINEAR = "Linear"
_ELSEWHERE = {
    **dict.fromkeys(("all", "all-linear", "linear"), "experts"),
    **dict.fromkeys(("q-proj", "k-proj", "v-proj", "qkv-proj", "qkv", "c-attn"), "experts-attention"),
    **dict.fromkeys(("o-proj", "out-proj"), "experts-attention"),
    **dict.fromkeys(("fc1", "fc2", "w1", "w2", "w3"), "experts-mlp"),
}
"""Targets as peft and other models name them, and the set that is meant here."""


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return peft's ``target_modules`` for ``targets`` on this model; see `match_targets`."""
    from torch import nn

    kinds = {
        name: LINEAR if isinstance(module, nn.Linear) else type(module).__name__
        for name, module in model.named_modules()
    }
    return match_targets(kinds, targets)


def adapted_modules(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names of the modules that ``targets`` match on this model; see `match_targets` for errors."""
    chosen = resolve_targets(model, targets)
    return [name for name, _ in model.named_modules() if any(is_match(name, target) for target in chosen)]


def match_targets(kinds: Mapping[str, str], targets: Sequence[str]) -> list[str]:
    """peft's ``target_modules`` for ``targets``: suffixes for sets and names, whole module names for patterns.

    ``kinds``: every module's name to the name of its class, `LINEAR` for all linear layers. A pattern is a regular
    expression over whole module names (``.*layers\\.(0|1)\\..*_dense``).

    Raises:
        AdapterError: a target matches nothing, or something that is not a linear layer.
    """
    chosen: dict[str, None] = {}
    for target in targets:
        if target in TARGET_SETS:
            chosen |= dict.fromkeys(_of_set(target, kinds))
            continue
        is_pattern = bool(set(target) & _PATTERN_CHARACTERS)
        hits = _matching_pattern(target, kinds) if is_pattern else [n for n in kinds if is_match(n, target)]
        if not hits:
            raise _nothing(target, kinds)
        containers = [name for name in hits if kinds[name] != LINEAR]
        if containers:
            raise _container(target, containers[0], kinds)
        chosen |= dict.fromkeys(hits if is_pattern else [target])
    if not chosen:
        raise AdapterError(tr("lora.targets is empty; nothing would train"), hint=_sets_hint(), code="adapter-targets")
    return list(chosen)


def _of_set(target: str, kinds: Mapping[str, str]) -> list[str]:
    """Return the suffixes of a named set that this model has: a video model has no vision experts."""
    if not any(is_match(name, TARGET_SETS["language-experts"][0]) for name in kinds):
        return list(TARGET_SETS[target])  # a part of a model; whoever asked knows which
    found = [suffix for suffix in TARGET_SETS[target] if any(is_match(name, suffix) for name in kinds)]
    if not found and target.startswith("vision-experts"):
        instead = target.replace("vision-", "")
        raise AdapterError(
            tr("lora.targets: `{target}` matches nothing: a video model has one expert for all tokens", target=target),
            hint=tr("name that one: --lora.targets {instead}", instead=instead),
            code="adapter-targets",
        )
    return found or list(TARGET_SETS[target])


def is_match(name: str, target: str) -> bool:
    """Apply peft's rule for lists: a target matches the whole name, or its end after a dot."""
    return name == target or name.endswith("." + target)


_DEAD_ENDS = ("vision_expert_dense", *_expert("vision")["-mlp"])


def is_dead_end(name: str, num_layers: int) -> bool:
    """Return whether the output of the linear layer ``name`` cannot influence the loss.

    This is so in the last of ``num_layers`` decoder layers for the vision expert: image tokens have no labels there, so
    their output projection and MLP are not needed.
    """
    if f".layers.{num_layers - 1}." not in f".{name}" or ".vision." in name:
        return False
    return any(is_match(name, suffix) for suffix in _DEAD_ENDS)


_PICTURES_ONLY = {"vision-experts-attention", "vision-experts-mlp", "vision-tower", "glu-adapter"}


def region(name: str) -> str:
    """Return the named set that a module belongs to, for reports; ``other`` outside all of them."""
    for known in (
        "vision-experts-attention",
        "vision-experts-mlp",
        "language-experts-attention",
        "language-experts-mlp",
    ):
        if any(is_match(name, suffix) for suffix in TARGET_SETS[known]):
            return known
    if ".vision.linear_proj." in f".{name}":
        return "glu-adapter"
    return "vision-tower" if ".vision.transformer." in f".{name}" else "other"


def check_reached(names: Iterable[str]) -> None:
    """Check that text alone reaches one of the modules ``names``; called if no record has a picture.

    Raises:
        AdapterError: all of them process pictures only, so none of them would train.
    """
    regions = {region(name) for name in names}
    if regions <= _PICTURES_ONLY:
        raise AdapterError(
            tr(
                "no training record has a picture, and lora.targets covers only what pictures pass"
                " through ({regions}): nothing would train",
                regions=", ".join(sorted(regions)),
            ),
            hint=tr(
                "name the text's expert as well, --lora.targets experts, or see with `cogtune data"
                " check` why the pictures were not found"
            ),
            code="adapter-idle",
        )


def _matching_pattern(pattern: str, kinds: Mapping[str, str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AdapterError(
            tr("lora.targets: `{pattern}` is not a regular expression: {error}", pattern=pattern, error=error),
            hint=tr("a target with special characters is matched as a regular expression over whole module names"),
            code="adapter-targets",
        ) from error
    return [name for name, kind in kinds.items() if compiled.fullmatch(name) and kind == LINEAR]


def _nothing(target: str, kinds: Mapping[str, str]) -> AdapterError:
    names = {".".join(name.split(".")[-parts:]) for name, kind in kinds.items() if kind == LINEAR for parts in (1, 2)}
    others = [name for name, kind in kinds.items() if kind != LINEAR]  # a name that hits one of them is refused too
    usable = [name for name in sorted(names) if not any(is_match(other, name) for other in others)]
    meant = _ELSEWHERE.get(target.lower().replace("_", "-"))
    near = f"`{meant}`" if meant else _nearest(target, [*TARGET_SETS, *usable])
    return AdapterError(
        tr("lora.targets: `{target}` matches none of this model's modules", target=target),
        hint=tr("did you mean {near}? {sets_hint}", near=near, sets_hint=_sets_hint()) if near else _sets_hint(),
        code="adapter-targets",
    )


def _container(target: str, name: str, kinds: Mapping[str, str]) -> AdapterError:
    inside = [n for n, kind in kinds.items() if n.startswith(name + ".") and kind == LINEAR][:4]
    return AdapterError(
        tr(
            "lora.targets: `{target}` matches {name}, a {kinds}; LoRA adapts linear layers only",
            target=target,
            name=name,
            kinds=kinds[name],
        ),
        hint=tr(
            "name the layers inside it ({inside}). {sets_hint}",
            inside=", ".join(inside) or tr("it has none"),
            sets_hint=_sets_hint(),
        ),
        code="adapter-targets",
    )


def _nearest(target: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(target, list(names), n=3, cutoff=0.5)
    return " or ".join(f"`{name}`" for name in found)


def _sets_hint() -> str:
    return tr(
        "the named sets are {target_sets}; `cogtune plan --targets` lists every name",
        target_sets=", ".join(TARGET_SETS),
    )
