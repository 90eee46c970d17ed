"""Memory of what follows a run, each in its own process: answering, and merging the adapter into the base model."""

from __future__ import annotations

import math
from dataclasses import replace

from cogtune.plan.activations import decoder, glu_adapter, tower_forward
from cogtune.plan.calibration import HOST_PROCESS, LIBRARIES
from cogtune.plan.memory import GLU_ADAPTER, HEAD, TOWER, Phase, allocator, host_loading, weights
from cogtune.plan.setting import Setting
from cogtune.plan.streaming import FLOAT32, Streaming, large_bytes
from cogtune.system.byte_sizes import MIB

NEW_TOKENS = 512
"""Tokens of an answer, unless `cogtune chat` sets another limit."""
_BLOCKS = 8 * 32 * MIB  # rows in float32 that a merge holds at a time


def answer(setting: Setting, rows: int = 1, new_tokens: int = NEW_TOKENS) -> Phase:
    """Return the memory of generating answers to ``rows`` prompts in one batch on one card.

    Every prompt is as long as the setting's rows and has its images. The card holds the whole model with the tower, the
    KV cache of prompt and answer, and the largest temporary tensors of the prefill. Where all layers are streamed but
    the language experts, it holds the head or what a picture needs (`model.head_offload`), whichever is more.
    """
    images = 0 if setting.tower == "none" else math.ceil(setting.batch.images)
    if setting.resident is not None:  # here the tower keeps the same share; in a run, what filling the cache allows
        setting = setting.streaming(setting.resident)
    own = replace(
        setting.with_batch(rows=rows, labelled=1, images=images),
        tower="live" if images else "none",
        engine="single", ranks=1, tensor=1, offload="none", decoder=frozenset(), blocks=frozenset(),
    )  # fmt: skip
    parts = weights(replace(own, resident=None), tower=True)
    experts, visiting = Streaming.of_experts(own), 0
    if own.resident is not None:
        glu = [linear for linear in own.sizes.linears if linear.part == "glu_adapter"]
        visiting = sum(large_bytes(linear, "none", own.dtype) for linear in glu)
        less = {"experts": experts.saved, GLU_ADAPTER: visiting}
        parts |= {name: parts[name] - size for name, size in less.items()}
    parts["adapter"] = FLOAT32 * own.adapter_parameters(trained_only=False)
    cache = _cache(own, own.batch.tokens(own.sizes) + rows * new_tokens)
    parts["keys and values"] = cache
    blocks, head = Streaming.of_tower(own), 0
    # the tower has finished before the KV cache is allocated
    passing = max(_first_pass(own, visiting), _tower(own) - cache)
    if own.resident == 0 and own.quant.stream != "all":
        head = own.sizes.parameters("head") * own.width
        passing = max(_first_pass(own, visiting), _tower(own))  # a slot is allocated before
        buffers = experts.buffers + blocks.buffers
        if passing + buffers > head + _logits(own):  # the peak is at a picture, while the head waits in host memory
            less = {HEAD: head}
        else:
            less, passing = {"experts": experts.buffers, TOWER: blocks.buffers}, _logits(own)
        parts |= {name: parts[name] - size for name, size in less.items() if name in parts}
    parts["workspace"] = passing + LIBRARIES
    host = host_loading(own)
    if streamed := experts.host + blocks.host + visiting + head:
        host["weights"] = streamed
    return Phase("answer", parts, allocator(own).slack(passing), host)


def slots(setting: Setting, count: int, columns: int) -> Phase:
    """Return the memory of `InferenceEngine` with ``count`` slots of ``columns`` tokens, prompt and answer together.

    Prompts are prefilled one at a time. While the slots double, the smaller half is there twice.
    """
    text = columns - math.ceil(setting.batch.images) * setting.sizes.image_tokens
    one = answer(setting.with_batch(text=max(1, text)), new_tokens=0)
    sizes = setting.sizes
    each = columns * 2 * sizes.num_hidden_layers * sizes.num_multi_query_heads * sizes.head_dim * setting.width
    return replace(one, parts={**one.parts, "keys and values": count * each + count // 2 * each})


def _cache(setting: Setting, tokens: int) -> int:
    """Return the KV cache's bytes; one layer's cache exists twice while it grows by a token."""
    sizes = setting.sizes
    layer = tokens * 2 * sizes.num_multi_query_heads * sizes.head_dim * setting.width
    return (sizes.num_hidden_layers + 1) * layer


def _tower(setting: Setting) -> int:
    """Return the tower's bytes: pixels as loaded and in the model's format, and one layer."""
    if setting.tower == "none":
        return 0
    vision = setting.sizes.vision
    images = round(setting.batch.rows * setting.batch.images)
    pixels = images * vision.in_channels * vision.image_size**2 * (FLOAT32 + setting.width)
    return pixels + tower_forward(setting)


def _first_pass(setting: Setting, visiting: int = 0) -> int:
    """Return the temporary bytes of the prefill: the GLU adapter, a decoder layer, or the last token's logits.

    ``visiting``: bytes of the GLU adapter's weights, where they are on the card only while it computes.

    """
    batch, sizes = setting.batch, setting.sizes
    features = round(batch.rows * batch.images * sizes.grid_tokens * sizes.vision.hidden_size * setting.width)
    layer = max(layer.forward for layer in decoder(setting))
    return features + max(glu_adapter(setting).forward + visiting, layer, _logits(setting))


def _logits(setting: Setting) -> int:
    """Return the bytes of the last tokens' logits: in the model's format, in float32, and sorted or scaled for
    sampling."""
    return setting.batch.rows * setting.sizes.vocab_size * (setting.width + 3 * FLOAT32)


def merge(setting: Setting) -> Phase:
    """Return the memory of merging an adapter into a full model: on the host, one block of rows at a time."""
    adapter = FLOAT32 * replace(setting, tensor=1).adapter_parameters(trained_only=False)
    host = {"process": HOST_PROCESS, "blocks": _BLOCKS, "adapter": adapter}
    return Phase("merge", {}, 0, host)
