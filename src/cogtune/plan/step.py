"""Memory over a training step: what is held at the end of the forward pass, and the peak.

The backward pass frees a layer's activations when it is done with them. So the peak is in the tower's pass at the
start, in the loss, or in the backward pass of some layer while the layers before it still hold their activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.plan.activations import Kept, decoder, glu_adapter, head, tower_block, tower_forward
from cogtune.plan.setting import Setting
from cogtune.plan.sharding import NOTHING, Gathered, Gathering


@dataclass(frozen=True)
class Moment:
    """Bytes beyond weights and optimiser at one moment of a step.

    They are saved activations, the adapter's gradients so far, logits and their gradients, and the running operation's
    temporary tensors. ``again``: the part that a recomputed layer has just computed again. ``gathered``: all-gathered
    weights of a sharded run, not part of the rest.
    """

    name: str
    activations: int
    gradients: int
    logits: int
    workspace: int
    again: int = 0
    gathered: Gathered = NOTHING

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.logits + self.workspace

    @property
    def with_gathered(self) -> int:
        return self.total + self.gathered.whole + self.gathered.buffers


def moments(setting: Setting) -> list[Moment]:
    """Return the moments of one micro-batch that can be the peak. With accumulation, all gradients exist throughout."""
    layers = decoder(setting)
    kept = [_kept(layer, index in setting.decoder, setting.offloading) for index, layer in enumerate(layers)]
    moving = max((each.entry for each in layers), default=0) if setting.offloading and setting.decoder else 0
    gradients = 4 * setting.adapter_parameters()
    before = gradients if setting.accumulation > 1 else 0
    ends, gathering = head(setting), Gathering(setting)
    vision = _vision(setting)
    held = vision.saved  # the batch itself and the picture embeddings are small and counted separately
    found = [Moment("start", 0, before, 0, 0, gathered=gathering.start())]
    if vision.forward:
        found.append(Moment("tower", held, before, 0, vision.forward, gathered=gathering.tower()))
    running = held
    for index, layer in enumerate(layers):
        needs = layer.forward if index in setting.decoder else max(layer.forward, layer.growing)
        found.append(Moment(f"forward {index}", running, before, 0, needs, gathered=gathering.forward(index)))
        running += kept[index]
    loss = max(ends.forward, ends.backward)
    found.append(Moment("loss", running + moving, before, ends.saved, loss, gathered=gathering.loss()))
    for index, layer in reversed(list(enumerate(layers))):
        running -= kept[index]
        recomputed = index in setting.decoder
        own = layer.saved + (layer.entry if recomputed else 0)
        again = layer.saved + layer.backward if recomputed else 0
        share = gradients if setting.accumulation > 1 else round(gradients * (len(layers) - index) / len(layers))
        if layer.saved:
            whole = gathering.backward(index)
            ahead = moving if index - 1 in setting.decoder else 0  # the next input is coming
            found.append(Moment(f"backward {index}", running + own + ahead, share, 0, layer.backward, again, whole))
    if vision.backward:
        found.append(Moment("vision backward", held, gradients, 0, vision.backward))
    return found


def peak(setting: Setting) -> Moment:
    """Return the moment of a step with the most bytes."""
    return max(moments(setting), key=lambda moment: moment.with_gathered)


def end_of_forward(setting: Setting) -> int:
    """Return the bytes of activations and logits at the end of the forward pass."""
    loss = next(moment for moment in moments(setting) if moment.name == "loss")
    return loss.activations + loss.logits


def offloaded(setting: Setting) -> list[int]:
    """Return the bytes of each input that waits in host memory during a step (``setting.offloading``)."""
    if not setting.offloading:
        return []
    blocks = len(setting.blocks) if setting.tower == "live" and setting.tower_trains else 0
    inputs = [layer.entry for index, layer in enumerate(decoder(setting)) if index in setting.decoder]
    return [size for size in inputs + blocks * [tower_block(setting).entry] if size]


def _kept(layer: Kept, recomputed: bool, offloading: bool) -> int:
    if not recomputed:
        return layer.saved
    return 0 if offloading else layer.entry


def _vision(setting: Setting) -> Kept:
    """Add up the tower and the GLU adapter."""
    if setting.tower == "none" or not setting.batch.images:
        return Kept()
    adapter = glu_adapter(setting)
    if setting.tower == "cached":
        return adapter
    if not setting.tower_trains:
        return Kept(adapter.entry, adapter.saved, adapter.backward, max(tower_forward(setting), adapter.forward))
    block, blocks = tower_block(setting), setting.sizes.vision.num_hidden_layers
    recomputed = len(setting.blocks)
    inputs = min(recomputed, 2) if setting.offloading else recomputed
    saved = inputs * block.entry + (blocks - recomputed) * block.saved
    again = block.saved if recomputed else 0
    return Kept(0, adapter.saved + saved, again + block.backward, max(block.forward, adapter.forward))
