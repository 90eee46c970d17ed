"""Rows joined to a batch in transformers' form: lists or tensors, padded as asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.encode import TEXT, Encoded

_PADDING: dict[Any, str] = {None: "none", False: "none", "do_not_pad": "none", True: "longest"}
_PADDING |= {"longest": "longest", "max_length": "max_length"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "videos": (None,),
    "audio": (None,),
    "add_special_tokens": (None, True, False),
    "truncation": (None, True, False, "do_not_truncate", "longest_first"),
    "return_attention_mask": (None, True),
    "return_token_type_ids": (None, True),
    "return_mm_token_type_ids": (None, False),
    "return_assistant_tokens_mask": (None, False),
    "return_length": (None, False),
    "tools": (None, []),
    "documents": (None, []),
    "sanitize_control_tokens": (None, False),
    "load_audio_from_video": (None, False),
}
"""Options of transformers' processors that change nothing here, and the values with which they do not.

Every row begins with BOS, and nothing is ever truncated: a row longer than ``max_length`` is an error.
"""


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that is unknown or would change something."""
    for name, value in options.items():
        if name not in _NEUTRAL or not any(value == neutral for neutral in _NEUTRAL[name]):
            raise InputError(
                tr("the processor has no option {name}={value:.60}", name=name, value=repr(value)),
                hint=tr("leave it out; help(CogVLM2Processor.__call__) lists the options"),
            )


def images_of(texts: int, images: Any) -> list[list[Any]]:
    """Return each text's images, from one image or None for each text, or from a list for each.

    Raises:
        InputError: not one entry for each text.
    """
    if images is None:
        return [[] for _ in range(texts)]
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    if texts == 1 and not any(isinstance(one, (list, tuple)) for one in given):
        given = [given]
    rows = [list(one) if isinstance(one, (list, tuple)) else [one] for one in given]
    if len(rows) != texts:
        raise InputError(
            tr("pictures for {rows} texts are given, and {texts} texts", rows=len(rows), texts=texts),
            hint=tr("give for each text a picture, a list of pictures, or None"),
        )
    return [[image for image in row if image is not None] for row in rows]


def joined(
    rows: Sequence[Encoded],
    pixels: torch.Tensor | None,
    *,
    pad_id: int,
    labels: bool,
    padding: bool | str | None = False,
    max_length: int | None = None,
    padding_side: str = "left",
    return_tensors: str | None = None,
) -> BatchFeature:
    """Return the rows' inputs for the model; the options are those of `CogVLM2Processor`.

    Args:
        pixels: of all rows' images, [N, 3, S, S].
        labels: whether to return labels.

    Raises:
        InputError: a value that an option does not take, rows longer than ``max_length``, or of different lengths where
            tensors are asked for without padding.
    """
    _check("padding", padding, list(_PADDING))
    _check("padding_side", padding_side, ["left", "right"])
    _check("return_tensors", return_tensors, [None, "pt", "np"])
    lengths = [len(row) for row in rows]
    if max_length is not None and max(lengths) > max_length:
        raise InputError(
            tr("row {row} has {tokens} tokens, max_length is {most}", row=lengths.index(max(lengths)),
               tokens=max(lengths), most=max_length),
            hint=tr("raise max_length or leave it out: a prompt is never cut"),
        )  # fmt: skip
    wanted = {"none": 0, "longest": max(lengths), "max_length": max_length}[_PADDING[padding]]
    if wanted is None:
        raise InputError(tr("padding is max_length, and max_length is not given"))
    fill = {"input_ids": pad_id, "token_type_ids": TEXT, "attention_mask": 0, "labels": IGNORED_LABEL}
    data: dict[str, Any] = {name: [] for name in fill if labels or name != "labels"}
    for row in rows:
        of_row = {**vars(row), "attention_mask": [1] * len(row)}
        for name, values in data.items():
            more = [fill[name]] * (wanted - len(row))
            values.append(more + of_row[name] if padding_side == "left" else of_row[name] + more)
    if return_tensors is not None and len({len(ids) for ids in data["input_ids"]}) > 1:
        raise InputError(
            tr("rows of {lengths} tokens do not make one tensor", lengths=", ".join(map(str, lengths))),
            hint=tr("pass padding=True"),
        )
    if pixels is not None:
        data["pixel_values"] = list(pixels.numpy()) if return_tensors is None else pixels
    return BatchFeature(_in_order(data), tensor_type=return_tensors)


def _in_order(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with labels at the end."""
    return {name: data[name] for name in sorted(data, key=lambda name: name == "labels")}


def _check(name: str, value: Any, known: list[Any]) -> None:
    if value not in known:
        raise InputError(
            tr("{name} is {value:.60}", name=name, value=repr(value)),
            hint=tr("it is one of {known}", known=", ".join(repr(one) for one in known)),
        )
