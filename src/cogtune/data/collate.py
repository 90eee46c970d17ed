"""Collate rows into a batch: right-padded tensors, and the routing that every layer uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cogtune.configuration.shapes import IGNORED_LABEL, UNUSED_PARENT
from cogtune.data.dataset import RowSample
from cogtune.model.routing import Routing

# attention_mask 0 drops padding before the first layer, so its id is never looked up.
_PADDING_ID = 0
_PADDING_SEGMENT = -1


def collate(rows: Sequence[RowSample], column_multiple: int = 1, *, vision_experts: bool = True) -> dict[str, Any]:
    """Return keyword arguments for the model, plus ``record_ids`` (list), ``num_labels`` (int) and, where rows were
    replaced, ``skipped`` (list) for the training loop.

    int64 [B, L]: ``input_ids``, ``token_type_ids``, ``attention_mask``, ``labels``, ``segment_ids``; int64 [B, S]:
    ``segment_parents``; float32 [N, 3, H, W]: ``pixel_values`` of all rows' images, row after row, or [N, Q, W]:
    ``image_features`` where those come from the cache; both absent when there is none.

    ``vision_experts``: as in `Routing.build`.
    """
    input_ids = _padded([sample.row.input_ids for sample in rows], _PADDING_ID)
    lengths = torch.tensor([len(sample.row.input_ids) for sample in rows])
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "token_type_ids": _padded([sample.row.token_type_ids for sample in rows], 0),
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "labels": _padded([sample.row.labels for sample in rows], IGNORED_LABEL),
        "segment_ids": _padded([sample.row.segment_ids for sample in rows], _PADDING_SEGMENT),
        "segment_parents": _padded([sample.row.segment_parents for sample in rows], UNUSED_PARENT),
    }
    batch["routing"] = Routing.build(
        batch["token_type_ids"],
        batch["attention_mask"],
        segment_ids=batch["segment_ids"],
        segment_parents=batch["segment_parents"],
        labels=batch["labels"],
        column_multiple=column_multiple,
        vision_experts=vision_experts,
    )
    for name in ("pixel_values", "image_features"):
        images = [image for sample in rows for image in getattr(sample, name)]
        if images:
            batch[name] = torch.stack(images)
    batch["record_ids"] = [identity for sample in rows for identity in sample.record_ids]
    if skipped := [what for sample in rows for what in sample.skipped]:
        batch["skipped"] = skipped
    batch["num_labels"] = int((batch["labels"] != IGNORED_LABEL).sum())
    return batch


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.int64)
