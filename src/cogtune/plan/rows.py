"""How long a data set's rows are: the longest decides memory, the average decides time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.configuration.run import RunConfig
from cogtune.data.budget import Budget
from cogtune.data.rows import RowShape, plan_rows, shape_of
from cogtune.errors import CheckpointError
from cogtune.plan.setting import S400, Batch
from cogtune.plan.sizes import ModelSizes

TYPICAL_ROWS = 10_000


@dataclass(frozen=True)
class Rows:
    """``largest`` and ``mean`` are batches of one row. ``typical``: no data was given, and the rows are this project's
    usual sample."""

    count: int
    pictures: int
    largest: Batch
    mean: Batch
    typical: bool = False


TYPICAL = Rows(TYPICAL_ROWS, TYPICAL_ROWS, S400, S400, typical=True)


def summary(shapes: Sequence[RowShape], pictures: int, image_tokens: int) -> Rows:
    """The rows of a data set whose pictures take ``image_tokens`` positions each."""
    if not shapes:
        return TYPICAL
    texts = [shape.tokens - shape.picture * image_tokens for shape in shapes]
    with_picture = sum(shape.picture for shape in shapes)
    count = len(shapes)
    largest = Batch(
        images=1 if with_picture else 0,
        text=max(texts),
        labelled=max(shape.labelled for shape in shapes),
        tree=any(shape.answers > 1 for shape in shapes),
    )
    mean = Batch(
        images=with_picture / count,
        text=round(sum(texts) / count),
        labelled=max(1, round(sum(shape.labelled for shape in shapes) / count)),
    )
    return Rows(count, pictures, largest, mean)


def read_rows(config: RunConfig, sizes: ModelSizes) -> Rows:
    """Tokenise the training data of ``config`` and plan its rows, with the base's tokenizer and nothing else of it.

    Raises:
        DataError, CheckpointError: the data or the tokenizer cannot be read.
    """
    from cogtune.data.split import read_and_split

    encoder: Any = _Encoder(Path(config.model.path), config.model.template)
    pictures = read_and_split(config.data, config.train.seed).train
    shapes = []
    for fitted in Budget(encoder, config.data).fit(pictures):
        picture = pictures[fitted.index].image is not None
        head = 1 + (sizes.image_tokens if picture else 0)
        one_random = config.data.turns == "one_random"
        for row in plan_rows(fitted, head=head, limit=config.data.max_row_tokens, one_random=one_random):
            shapes.append(shape_of(row, picture=picture, one_random=one_random))
    return summary(shapes, sum(picture.image is not None for picture in pictures), sizes.image_tokens)


class _Encoder:
    """What the budgets ask of an encoder: its template and its tokenizer, without transformers."""

    def __init__(self, folder: Path, template: str | None) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(
                f"{file}: the tokenizer cannot be read ({error})",
                hint="copy tokenizer.json from the published checkpoint, or plan without --data",
                code="checkpoint-tokenizer",
            ) from error
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.template = template or str(config.get("template_version", "chat"))

    def tokenizer(self, texts: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        found = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in found]}
