"""A run's rows for a training loop of one's own: the data set, and the function that joins rows to a batch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature

from cogtune.checkpoint.model_files import reading_rules
from cogtune.configuration.run_config import RunConfig
from cogtune.data.collate import collate
from cogtune.data.dataset import RowSample, TrainRows
from cogtune.data.split import read_and_split
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.processor import CogVLM2Processor

_FOR_THE_LOOP = ("routing", "record_ids", "skipped", "num_labels")
log = logging.getLogger("cogtune")


def load_rows(config: RunConfig, processor: CogVLM2Processor | None = None, split: str = "train") -> TrainRows:
    """Read a run's data as `train` does, and return its rows as a data set of torch.

    A row holds all questions about one picture. ``rows[i]`` decodes its pictures; `collate_rows` makes a batch.

    Example:
        >>> rows = cogtune.load_rows(config)
        >>> for batch in DataLoader(rows, batch_size=2, shuffle=True, collate_fn=cogtune.collate_rows):
        ...     loss = model(**batch.to(model.device)).loss

    Args:
        config: its ``data`` and ``model`` sections and ``train.seed`` count.
        processor: of the base; None: read from ``model.path``.
        split: ``train`` or ``validation``.

    Raises:
        InputError: files that cannot be read, data that does not fit the configuration, another split.
    """
    if split not in ("train", "validation"):
        raise InputError(tr("split is {split:.60}", split=repr(split)), hint=tr("it is train or validation"))
    if processor is None:
        processor = CogVLM2Processor.from_pretrained(config.model.path, tokenizer=config.model.tokenizer)
    encoder = copy.copy(processor.encoder)
    encoder.template = config.model.template or encoder.template
    found = read_and_split(config.data, config.train.seed, **reading_rules(config.model.path))
    examples = found.train if split == "train" else found.validation
    return TrainRows(
        examples, encoder, config.data, processor.image_size, seed=config.train.seed, required=split == "train"
    )


def collate_rows(rows: Sequence[RowSample]) -> BatchFeature:
    """Join rows of `load_rows`, padded on the right, into the model's arguments: int64 [B, L] (``segment_parents``:
    [B, S]), and ``pixel_values`` float32 [N, 3, side, side] if a row has pictures.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=cogtune.collate_rows)
    """
    batch: dict[str, Any] = collate(rows)
    for what in batch.get("skipped", ()):
        log.warning(what)
    return BatchFeature({name: value for name, value in batch.items() if name not in _FOR_THE_LOOP})
