"""``config.json`` and ``generation_config.json`` of a model folder: the keys that are read, and their possible values.

These files come from others, and transformers sets every key it finds: some make it fetch or import code
(``attn_implementation`` names kernels on a hub, ``auto_map`` modules, ``quantization_config`` packages). So a file is
reduced to the keys of a CogVLM2 model before transformers sees it, and what is left out is said.

Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cogtune.configuration.architectures import completed
from cogtune.configuration.quantization import EIGHT_BIT, FOUR_BIT, OWN_METHOD
from cogtune.errors import CheckpointError
from cogtune.language import phrase, tr
from cogtune.system.reading import read_text

log = logging.getLogger("cogtune")

_MOST = 2**31 - 1
_MOST_LAYERS = 1024

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what was expected, for the message."""


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return value is None or _whole(value, 0, _MOST)


COUNT: Check = (lambda value: _whole(value, 1, _MOST), phrase("a whole number above 0"))
LAYERS: Check = (lambda value: _whole(value, 1, _MOST_LAYERS), phrase("a whole number from 1 to 1024"))
NUMBER: Check = (lambda value: _number(value) and value >= 0, phrase("a number that is not below 0"))
FLAG: Check = (lambda value: value is None or isinstance(value, bool), phrase("true or false"))
TEXT: Check = (lambda value: isinstance(value, str), phrase("a text"))
TEXTS: Check = (
    lambda value: value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)),
    phrase("a list of texts"),
)
TOKEN: Check = (_is_id, phrase("a token id"))
TOKENS: Check = (
    lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)) and None not in value),
    phrase("a token id, or a list of them"),
)
DTYPE: Check = (
    lambda value: value is None or value in ("float32", "bfloat16", "float16", "float64"),
    phrase("float32, bfloat16 or float16"),
)
QUANTISED: Check = (
    lambda value: value is None or (isinstance(value, dict) and isinstance(value.get("quant_method"), str)),
    phrase('null, or a mapping with "quant_method": "bitsandbytes"'),
)
SECTION: Check = (lambda value: value is None or isinstance(value, dict), phrase("a mapping"))


def _only(name: str) -> Check:
    return (lambda value: value == name, phrase("the published value, which the code computes"))


_BOTH: dict[str, Check] = {"model_type": TEXT, "dtype": DTYPE, "torch_dtype": DTYPE, "transformers_version": TEXT}
VISION_KEYS: dict[str, Check] = _BOTH | {
    **dict.fromkeys(("image_size", "patch_size", "in_channels", "hidden_size", "intermediate_size"), COUNT),
    **dict.fromkeys(("num_heads", "num_positions"), COUNT),
    "num_hidden_layers": LAYERS,
    "hidden_act": _only("gelu"),
    "layer_norm_eps": NUMBER,
    "dropout_prob": NUMBER,
}
"""Keys of ``vision_config`` that are read."""

MODEL_KEYS: dict[str, Check] = _BOTH | {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("num_attention_heads", "num_multi_query_heads", "num_key_value_heads"), COUNT),
    "num_hidden_layers": LAYERS,
    "hidden_act": _only("silu"),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta"), NUMBER),
    **dict.fromkeys(("rope_precision", "template_version"), TEXT),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    "eos_token_id": TOKENS,
    "generation": (lambda value: _whole(value, 1, 2), phrase("1 or 2")),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "vision_experts"), FLAG),
    "architectures": TEXTS,
    "vision_config": SECTION,
    "quantization_config": QUANTISED,
}
"""Keys of ``config.json`` that are read."""

GENERATION_KEYS: dict[str, Check] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    "eos_token_id": TOKENS,
    **dict.fromkeys(("do_sample", "use_cache", "_from_model_config"), FLAG),
    **dict.fromkeys(("temperature", "top_p"), (lambda value: value is None or NUMBER[0](value), NUMBER[1])),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens"), (_is_id, phrase("a whole number"))),
    "transformers_version": TEXT,
}
"""Keys of ``generation_config.json`` that are read."""

_QUIET = {
    "_name_or_path", "auto_map", "torchscript", "_attn_implementation_autoset", "return_dict", "output_attentions",
    "output_hidden_states", "architectures", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type",
}  # fmt: skip
"""Left out without a word: the published file has them, or transformers wrote its own defaults."""

_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "quanto": "Quanto"}

_told: set[tuple[str, ...]] = set()
_NAMED = 8


def read_model_json(file: Path) -> dict[str, Any]:
    """Return the known part of a ``config.json``, checked and completed; see `known_part` and `completed`.

    Raises:
        CheckpointError: not readable, no JSON object, or a value that a model cannot have.
    """
    return completed(known_part(read_object(file), MODEL_KEYS, file))


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a small file of a model folder.

    Raises:
        CheckpointError: not readable, or no JSON object.
    """
    try:
        found = json.loads(read_text(file))
        if not isinstance(found, dict):
            raise ValueError(tr("no object"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            tr("{file}: not valid JSON ({error})", file=file, error=reason),
            hint=tr("copy it from the published checkpoint"),
            code="checkpoint-config",
        ) from error
    return found


def known_part(values: Mapping[str, Any], keys: Mapping[str, Check], file: object) -> dict[str, Any]:
    """Return those of ``values`` that ``keys`` lists; the others are named in the log, once.

    Args:
        file: where they come from, for messages.

    Raises:
        CheckpointError: a value that a model cannot have.
    """
    known = {}
    _tell([str(key) for key in values if key not in keys and key not in _QUIET], file)
    for key, value in values.items():
        if key not in keys:
            continue
        is_right, expected = keys[key]
        if not is_right(value):
            raise wrong_value(file, key, value, tr(expected))
        known[key] = value
    if isinstance(known.get("vision_config"), dict):
        known["vision_config"] = known_part(known["vision_config"], VISION_KEYS, file)
    _check_ids(known, file)
    _check_quantised(known.get("quantization_config"), file)
    return known


def wrong_value(file: object, key: str, value: object, expected: str) -> CheckpointError:
    """Return the error for a value of a model's configuration."""
    return CheckpointError(
        tr("{file}: {key} is {value:.80}, expected was {expected}", file=file, key=key, value=json.dumps(value),
           expected=expected),
        hint=tr("copy it from the published checkpoint"),
        code="checkpoint-config",
    )  # fmt: skip


def _check_ids(known: Mapping[str, Any], file: object) -> None:
    """Check that the special tokens are within the vocabulary."""
    size = known.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id") if size is not None else ():
        value = known.get(key)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one >= size:
                raise wrong_value(file, key, value, tr("less than vocab_size, {size}", size=size))


def _check_quantised(found: Mapping[str, Any] | None, file: object) -> None:
    """Check that weights are stored in the model's own format, in bitsandbytes' 4 bits, or as a merge wrote them."""
    if found is None:
        return
    method = str(found["quant_method"])
    if method == OWN_METHOD:
        if found.get("format") not in EIGHT_BIT:
            raise wrong_value(file, "quantization_config.format", found.get("format"), tr(", ").join(EIGHT_BIT))
        return
    if method != "bitsandbytes":
        named = _METHODS.get(method.lower(), method[:80])
    elif found.get("load_in_8bit"):
        named = tr("bitsandbytes in 8 bits (load_in_8bit)")
    elif found.get("load_in_4bit") and found.get("bnb_4bit_quant_type", "fp4") not in FOUR_BIT:
        raise wrong_value(file, "bnb_4bit_quant_type", found["bnb_4bit_quant_type"], tr(", ").join(FOUR_BIT))
    else:
        return
    raise CheckpointError(
        tr("{file}: the weights are stored quantised by {named}; expected was bitsandbytes' 4 bits, or none at all",
           file=file, named=named),
        hint=tr("take the unquantised model with --quant.experts nf4, int8 or fp8, which quantises while loading; or"
                " the published 4-bit folder, `cogtune download model --variant int4`"),
        code="checkpoint-quantised",
    )  # fmt: skip


def _tell(left: list[str], file: object) -> None:
    if not left or (str(file), *left) in _told:
        return
    _told.add((str(file), *left))
    names, more = tr(", ").join(left[:_NAMED]), len(left) - _NAMED
    if more > 0:
        names = tr("{names} and {more} more", names=names, more=more)
    log.warning("%s", tr("{file}: left out, because cogtune does not read these keys: {names}", file=file, names=names))
