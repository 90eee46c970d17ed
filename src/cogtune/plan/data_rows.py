"""The lengths of a data set's rows: the longest row decides memory, the average row decides time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogtune.configuration.run_config import RunConfig
from cogtune.data.budget import Budget
from cogtune.data.rows import RowShape, plan_rows, shape_of
from cogtune.plan.setting import S400, MicroBatch
from cogtune.plan.sizes import ModelSizes
from cogtune.processing.token_file import find_token_file

TYPICAL_ROWS = 10_000


@dataclass(frozen=True)
class Rows:
    """Row lengths of a data set. ``largest`` and ``mean`` are batches of one row.

    ``typical``: no data was given, and `TYPICAL` rows are assumed. ``exact`` is False if lengths are estimated because
    the model's tokenizer is not available.
    """

    count: int
    pictures: int
    largest: MicroBatch
    mean: MicroBatch
    typical: bool = False
    exact: bool = True


TYPICAL = Rows(TYPICAL_ROWS, TYPICAL_ROWS, S400, S400, typical=True)


_CLIP = MicroBatch(images=24, text=330, labelled=256)
TYPICAL_CLIPS = Rows(TYPICAL_ROWS, 24 * TYPICAL_ROWS, _CLIP, _CLIP, typical=True)
"""For a video model: clips of 24 frames, numbered in the text, with a caption of 256 tokens."""


def summary(shapes: Sequence[RowShape], pictures: int, image_tokens: int) -> Rows:
    """Summarise the rows of a data set whose images take ``image_tokens`` positions each.

    Text between images is text.
    """
    if not shapes:
        return TYPICAL
    texts = [shape.tokens - shape.images * image_tokens for shape in shapes]
    count = len(shapes)
    largest = MicroBatch(
        images=max(shape.images for shape in shapes),
        text=max(texts),
        labelled=max(shape.labelled for shape in shapes),
    )
    mean = MicroBatch(
        images=sum(shape.images for shape in shapes) / count,
        text=round(sum(texts) / count),
        labelled=max(1, round(sum(shape.labelled for shape in shapes) / count)),
    )
    return Rows(count, pictures, largest, mean)


def read_rows(config: RunConfig, sizes: ModelSizes) -> Rows:
    """Tokenise the training data of ``config`` and plan its rows. Of the base model only the tokenizer is read; if it
    is not on this machine, lengths are estimated from the text.

    Raises:
        DataError, CheckpointError: the data or the tokenizer cannot be read.
    """
    from cogtune.data.split import read_and_split

    tokens = find_token_file(config.model.path, config.model.template, config.model.tokenizer)
    encoder = tokens.encoder()
    read = read_and_split(config.data, config.train.seed, max_images=encoder.max_images, clips=tokens.reads_clips)
    examples = read.train
    shapes = []
    for fitted in Budget(encoder, config.data).fit(examples):
        images = len(examples[fitted.index].images)
        head = encoder.head_tokens(images)
        one_random = config.data.turns == "one_random"
        for row in plan_rows(fitted, head=head, limit=config.data.max_row_tokens, one_random=one_random):
            shapes.append(shape_of(row, images=images, one_random=one_random))
    found = summary(shapes, sum(len(set(example.images)) for example in examples), sizes.image_tokens)
    return replace(found, exact=tokens.exact)
