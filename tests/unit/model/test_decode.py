"""A decode step over slots is the model's own forward after a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogtune.checkpoint.load import load_model
from cogtune.model.decode import decode, prefill, prefill_pictures, prefill_texts
from cogtune.model.extend import PlainLayer, extend
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.slots import SlotCache, SlotView
from cogtune.processing.processor import CogVLM2Processor

PICTURE_COLUMNS = 40


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> CogVLM2ForCausalLM:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def rows(model: CogVLM2ForCausalLM, tiny_checkpoint: Path) -> list[dict[str, Any]]:
    """Three prompts: two with a picture, one without."""
    processor = CogVLM2Processor.from_pretrained(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    found = []
    for query, seen in (("What is this?", True), ("Hello", False), ("And why is that so?", True)):
        encoded = processor.encode(query, images=int(seen))
        features = torch.randn(1, model.config.grid**2, model.model.vision.width, generator=generator)
        found.append({
            "input_ids": torch.tensor([encoded.input_ids]),
            "token_type_ids": torch.tensor([encoded.token_type_ids]),
            "image_features": features if seen else None,
        })  # fmt: skip
    return found


def _slots(model: CogVLM2ForCausalLM, slots: int, columns: int = 96) -> SlotCache:
    return SlotCache(model.config, slots, columns, torch.float32, "cpu")


@torch.no_grad()
def _whole(model: CogVLM2ForCausalLM, row: dict[str, Any], new: list[int]) -> torch.Tensor:
    """Logits behind the last of ``new`` tokens by one forward without a cache."""
    ids = torch.cat([row["input_ids"], torch.tensor([new], dtype=torch.long)], 1)
    types = torch.cat([row["token_type_ids"], torch.zeros(1, len(new), dtype=torch.long)], 1)
    return model(ids, types, image_features=row["image_features"]).logits[0, -1]


def test_prefill_and_steps_give_the_logits_of_whole_forwards(
    model: CogVLM2ForCausalLM, rows: list[dict[str, Any]]
) -> None:
    cache = _slots(model, 4)
    slots = [3, 0, 2]
    new: list[list[int]] = [[], [], []]
    positions, lengths = [], []
    for slot, row, taken in zip(slots, rows, new, strict=True):
        view = SlotView(cache, slot)
        logits, position = prefill(model, view, **row)
        torch.testing.assert_close(logits, _whole(model, row, []), rtol=1e-4, atol=1e-5)  # float32, another order
        taken.append(int(logits.argmax()))
        positions.append(position)
        lengths.append(view.length)
    for step in range(5):
        at = torch.tensor([position + step for position in positions])
        held = torch.tensor([length + step for length in lengths])
        logits = decode(model, cache, torch.tensor(slots), torch.tensor([t[-1] for t in new]), at, held, 96)
        for row, taken, found in zip(rows, new, logits, strict=True):
            torch.testing.assert_close(found, _whole(model, row, taken), rtol=1e-4, atol=1e-5)
            taken.append(int(found.argmax()))


@pytest.mark.parametrize("padded", [0, 9])
def test_text_of_fixed_shape_is_the_prefill(model: CogVLM2ForCausalLM, rows: list[dict[str, Any]], padded: int) -> None:
    """Behind a picture in a slot between others; padding touches nothing that is read, and decoding goes on."""
    cache, row = _slots(model, 3), rows[2]
    head = int(row["token_type_ids"][0].nonzero().max()) + 1
    wanted, position = prefill(model, SlotView(cache, 0), **row)
    view = SlotView(cache, 1)
    prefill(model, view, row["input_ids"][:, :head], row["token_type_ids"][:, :head], row["image_features"])
    before = cache.keys.clone()
    text = row["input_ids"][0, head:]
    count, start = len(text), position - len(text)
    tokens = torch.cat([text, torch.zeros(padded, dtype=torch.long)])
    layers = [PlainLayer(layer) for layer in model.model.layers]
    numbers = (torch.tensor([number]) for number in (start, head, count - 1))
    embed = model.model.embed_tokens
    found = extend(model, embed, layers, cache, torch.tensor([1]), tokens[None], *numbers)
    found = model.lm_head(found)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # float32, another order
    torch.testing.assert_close(
        cache.keys[:, 1, :, : head + count], cache.keys[:, 0, :, : head + count], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(cache.keys[:, 2], before[:, 2])
    assert torch.equal(cache.keys[:, 1, :, :head], before[:, 1, :, :head])
    newest = torch.tensor([int(wanted.argmax())] * 2)
    both = decode(
        model, cache, torch.tensor([0, 1]), newest, torch.tensor([position] * 2), torch.tensor([head + count] * 2), 96
    )
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("captured", [False, True])
def test_texts_of_several_slots_in_one_pass(
    model: CogVLM2ForCausalLM, rows: list[dict[str, Any]], captured: bool
) -> None:
    """Behind two pictures and the longest in an empty slot, in any order; padding that does not fit goes to a slot's
    last column. Then decoding goes on. ``captured``: in the pass of fixed shape, whose last row repeats another.
    """
    lone, cache = _slots(model, 3), _slots(model, 4)
    slots, texts, starts, lengths, wanted = [3, 0, 2], [], [], [], []
    order = [2, 1, 0]
    for slot, row in zip(slots, order, strict=True):
        view = SlotView(lone, row)
        given = rows[row]
        if not given["token_type_ids"].any():
            given = given | {name: given[name].repeat(1, 3) for name in ("input_ids", "token_type_ids")}
        logits, position = prefill(model, view, **given)
        ids, types = given["input_ids"], given["token_type_ids"]
        head = int(types[0].nonzero().max()) + 1 if types.any() else 0
        if head:
            cache.put(slot, lone.copy_out(row, head))
        texts.append(ids[0, head:].tolist())
        starts.append(position - len(texts[-1]))
        lengths.append(head)
        wanted.append((logits, position, view.length))
    small = SlotCache.__new__(SlotCache)  # of so few columns that padding does not fit behind every text
    small.keys, small.values = (
        whole[:, :, :, : max(end for *_, end in wanted) + 1] for whole in (cache.keys, cache.values)
    )
    if captured:
        layers = [PlainLayer(layer) for layer in model.model.layers]
        width = max(map(len, texts)) + 3
        tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        numbers = [slots, starts, lengths, [len(text) - 1 for text in texts]]
        where, at, held, last = (torch.tensor([*each, each[0]]) for each in numbers)
        tokens = torch.cat([tokens, tokens[:1]])
        found = extend(model, model.model.embed_tokens, layers, small, where, tokens, at, held, last)[:3]
    else:
        found = prefill_texts(model, small, slots, texts, starts, lengths)
    found = model.lm_head(found)
    for logits, slot, row, (alone, _, end) in zip(found, slots, order, wanted, strict=True):
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)  # float32, another order
        torch.testing.assert_close(cache.keys[:, slot, :, :end], lone.keys[:, row, :, :end], rtol=1e-4, atol=1e-5)
    assert not cache.keys[:, 1].any()
    at, held = (torch.tensor([one[place] for one in wanted]) for place in (1, 2))
    newest = found.argmax(-1)
    alone = decode(model, lone, torch.tensor(order), newest, at, held)
    together = decode(model, cache, torch.tensor(slots), newest, at, held)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_pictures_of_several_slots_in_one_pass(model: CogVLM2ForCausalLM, rows: list[dict[str, Any]]) -> None:
    lone, cache = _slots(model, 2), _slots(model, 3)
    head = 1 + model.config.num_image_tokens
    for slot, row in enumerate((rows[0], rows[2])):
        prefill(model, SlotView(lone, slot), row["input_ids"][:, :head], row["token_type_ids"][:, :head],
                row["image_features"])  # fmt: skip
    ids, types = (
        torch.cat([row[name][:, :head] for row in (rows[0], rows[2])]) for name in ("input_ids", "token_type_ids")
    )
    prefill_pictures(model, cache, [2, 0], ids, types, torch.cat([row["image_features"] for row in (rows[0], rows[2])]))
    for slot, alone in ((2, 0), (0, 1)):
        for one, other in ((cache.keys, lone.keys), (cache.values, lone.values)):
            torch.testing.assert_close(one[:, slot, :, :head], other[:, alone, :, :head], rtol=1e-4, atol=1e-5)
    assert not cache.keys[:, 1].any()


def test_a_kept_beginning_is_the_whole_prompts_beginning(model: CogVLM2ForCausalLM, rows: list[dict[str, Any]]) -> None:
    """In another slot, behind another guest, with only the text computed."""
    cache = _slots(model, 2)
    row, beginning = rows[0], 1 + model.config.num_image_tokens
    ids, types = row["input_ids"], row["token_type_ids"]
    whole = SlotView(cache, 0)
    wanted, _ = prefill(model, whole, **row)
    prefill(model, SlotView(cache, 1), **rows[2])  # the slot's first guest
    prefix_view = SlotView(cache, 1)
    prefill(model, prefix_view, ids[:, :beginning], types[:, :beginning], row["image_features"])
    kept = cache.copy_out(1, beginning)
    torch.testing.assert_close(kept.keys, cache.keys[:, 0, :, :beginning], rtol=1e-4, atol=1e-5)
    prefill(model, SlotView(cache, 1), **rows[1])
    cache.put(1, kept)
    view = SlotView(cache, 1, kept.columns)
    found, position = prefill(model, view, ids[:, beginning:], types[:, beginning:], start=4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (view.length, position) == (whole.length, 4 + ids.shape[1] - beginning)
    assert kept.nbytes == beginning * SlotCache.bytes_per_column(model.config, torch.float32)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.empty_rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[0] == 0:
            self.empty_rows += 1
        return result


def test_a_step_reads_nothing_back_and_calls_nothing_on_zero_rows(
    model: CogVLM2ForCausalLM, rows: list[dict[str, Any]]
) -> None:
    cache = _slots(model, 1)
    view = SlotView(cache, 0)
    _, position = prefill(model, view, **rows[0])
    slot, token = torch.tensor([0]), torch.tensor([5])
    at, held = torch.tensor([position]), torch.tensor([view.length])
    with _Operators() as seen:
        decode(model, cache, slot, token, at, held)
    assert not [name for name in seen.names if "local_scalar" in name or "nonzero" in name]
    assert seen.empty_rows == 0
    step = len([name for name in seen.names if "linear" in name or "addmm" in name or "aten.mm" in name])
    assert step == 5 * model.config.num_hidden_layers + 1  # the language expert's and the head, each once


def test_what_does_not_fit_is_refused(model: CogVLM2ForCausalLM, rows: list[dict[str, Any]]) -> None:
    cache = _slots(model, 1, columns=8)
    with pytest.raises(ValueError, match="do not fit in a slot of 8"):
        prefill(model, SlotView(cache, 0), **rows[0])
    with pytest.raises(ValueError, match="only text follows a kept beginning"):
        prefill(model, SlotView(cache, 0, 4), **rows[0])
    with pytest.raises(ValueError, match="does not fit in a slot"):
        cache.put(0, _slots(model, 1).copy_out(0, 40))
    with pytest.raises(ValueError, match="at least 1"):
        _slots(model, 0)
