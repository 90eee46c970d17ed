"""What follows a run, each in its own process: answering with the result, and merging the adapter into the base."""

from __future__ import annotations

import math
from dataclasses import replace

from cogtune.plan.activations import decoder, glu_adapter, tower_forward
from cogtune.plan.calibration import HOST_PROCESS, LIBRARIES
from cogtune.plan.memory import FLOAT32, Phase, allocator, host_loading, weights
from cogtune.plan.setting import Setting
from cogtune.system.byte_sizes import MIB

NEW_TOKENS = 512
"""Length of an answer unless `cogtune chat` is told otherwise."""
_BLOCKS = 8 * 32 * MIB  # of rows in float32 that merging holds at a time


def answer(setting: Setting, rows: int = 1, new_tokens: int = NEW_TOKENS) -> Phase:
    """Answering ``rows`` prompts at once with one card, each as long as the setting's rows and with its images: the
    whole model with its tower, keys and values of prompt and answer, and the largest of the moments of the first pass.
    """
    images = 0 if setting.tower == "none" else math.ceil(setting.batch.images)
    own = replace(
        setting.with_batch(rows=rows, labelled=1, images=images),
        tower="live" if images else "none",
        engine="single", ranks=1, tensor=1, offload="none", decoder=frozenset(), blocks=frozenset(),
    )  # fmt: skip
    parts = weights(own, tower=True)
    parts["adapter"] = FLOAT32 * own.adapter_parameters(trained_only=False)
    cache = _cache(own, own.batch.tokens(own.sizes) + rows * new_tokens)
    parts["keys and values"] = cache
    passing = max(_first_pass(own), _tower(own) - cache)  # the tower is through before there is a cache
    parts["workspace"] = passing + LIBRARIES
    return Phase("answer", parts, allocator(own).slack(passing), host_loading(own))


def _cache(setting: Setting, tokens: int) -> int:
    """Of every layer; and one layer's twice, while it grows by a token."""
    sizes = setting.sizes
    layer = tokens * 2 * sizes.num_multi_query_heads * sizes.head_dim * setting.width
    return (sizes.num_hidden_layers + 1) * layer


def _tower(setting: Setting) -> int:
    """Pixels as they come and as they are fed, and one block."""
    if setting.tower == "none":
        return 0
    vision = setting.sizes.vision
    images = round(setting.batch.rows * setting.batch.images)
    pixels = images * vision.in_channels * vision.image_size**2 * (FLOAT32 + setting.width)
    return pixels + tower_forward(setting)


def _first_pass(setting: Setting) -> int:
    """The GLU adapter, a decoder layer, or the logits of each row's last token: in the model's format, in float32, and
    as they are sorted or scaled for drawing."""
    batch, sizes = setting.batch, setting.sizes
    features = round(batch.rows * batch.images * sizes.grid_tokens * sizes.vision.hidden_size * setting.width)
    layer = max(layer.forward for layer in decoder(setting))
    logits = batch.rows * sizes.vocab_size * (setting.width + 3 * FLOAT32)
    return features + max(glu_adapter(setting).forward, layer, logits)


def merge(setting: Setting) -> Phase:
    """Merging an adapter into a full model happens on the host, a block of rows at a time."""
    adapter = FLOAT32 * replace(setting, tensor=1).adapter_parameters(trained_only=False)
    host = {"process": HOST_PROCESS, "blocks": _BLOCKS, "adapter": adapter}
    return Phase("merge", {}, 0, host)
