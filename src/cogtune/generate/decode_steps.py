"""Decode steps with their state on the device, as CUDA graphs on a GPU.

For every slot the device holds the newest token, its position, the slot's length, its adapter and the sampling
settings. A step reads them, decodes, samples and writes them back; the host only says which slots take part. One graph
per power-of-two number of rows is captured on first use. Rows that pad a graph use a spare slot that holds no request.

A step with guesses (`generate.prompt_lookup`) decodes adjacent tokens of one slot and keeps those guessed right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cogtune.generate.decoding import Decoding
from cogtune.generate.sampling import SamplingRows, choose, seed_of
from cogtune.generate.text_graphs import TextGraphs
from cogtune.model.decode import decode
from cogtune.model.head_offload import fetch_head, head_offload
from cogtune.model.kernels import kernel_available
from cogtune.model.slots import SlotCache
from cogtune.model.stacked_adapters import NONE, StackedAdapters
from cogtune.model.tensor_parallel import group_of


class Begun(NamedTuple):
    """A prefilled slot: the next position, the number of columns that it holds, and how its answer is decoded.

    ``adapter``: index of the one that computes.
    """

    slot: int
    position: int
    length: int
    decoding: Decoding
    seed: int = 0
    adapter: int = NONE


class CopiedTokens:
    """Tokens [R] on their way from the device, whose work goes on meanwhile."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._arrived: Any = None
        if not tokens.is_cuda:
            self._tokens = tokens.clone()
            return
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._tokens.copy_(tokens, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def wait(self) -> list[int]:
        """Return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


_TOKEN, _ADAPTER, _STEP = 0, 3, 6


class DecodeSteps:
    """Runs steps over the slots of ``cache``.

    Attributes:
        text: prefill of text as graphs; None without graphs, and where the head waits in host memory meanwhile: those
            passes keep memory of their own, and end with the head.
    """

    _whole: torch.Tensor  # [7, S + 1], of every slot: newest token, position, length, adapter, top_k, seed, step
    _parts: torch.Tensor  # [2, S + 1]: temperature, top_p

    def __init__(self, model: Any, cache: SlotCache, *, graphs: bool, adapters: StackedAdapters | None = None) -> None:
        self._model = model
        self._adapters = adapters
        self._group = group_of(model)
        self._fused = _fused(model) if graphs else None
        self._host_lengths: list[int] = []
        self.use(cache)

    def use(self, cache: SlotCache) -> None:
        """Switch to another cache, at least as large, that starts with the content of the last one."""
        rows, device = cache.slots + 1, cache.keys.device  # the last row is the spare slot that pads a graph
        whole = torch.zeros(7, rows, dtype=torch.int64, device=device)
        parts = torch.zeros(2, rows, device=device)
        if self._host_lengths:
            kept = self._whole.shape[1] - 1
            whole[:, :kept], parts[:, :kept] = self._whole[:, :-1], self._parts[:, :-1]
        whole[_ADAPTER, -1] = NONE
        self._step_adds = torch.tensor([[0], [1], [1], [0], [0], [0], [1]], device=device)
        self._cache, self._whole, self._parts = cache, whole, parts
        self._host_lengths += [0] * (cache.slots - len(self._host_lengths))
        self._forget()
        self.text = None
        if self._fused is not None and head_offload(self._model) is None:
            self.text = TextGraphs(self._model, cache, self._fused, self._adapters)

    def _forget(self, head: int = 0) -> None:
        """Forget captured steps. ``head``: where the next ones read the head, if it comes and goes."""
        self._recorded: dict[tuple[int, str], _Recorded] = {}
        self._memory: Any = None
        self._head = head

    def begin(self, logits_RV: torch.Tensor, begun: Sequence[Begun]) -> torch.Tensor:
        """Start prefilled slots: sample their first tokens [R], and store their decoding state."""
        device = self._whole.device
        where = torch.tensor([one.slot for one in begun]).to(device, non_blocking=True)
        numbers = [
            (0, one.position, one.length, one.adapter, one.decoding.top_k, seed_of(one.seed), 0) for one in begun
        ]
        settings = [(one.decoding.temperature if one.decoding.sample else 0.0, one.decoding.top_p) for one in begun]
        whole = torch.tensor(numbers).t().contiguous().to(device, non_blocking=True)
        parts = torch.tensor(settings).t().contiguous().to(device, non_blocking=True)
        sampling = _sampling(whole, parts) if any(one.decoding.sample for one in begun) else None
        tokens = self._chosen(logits_RV, sampling)
        for one in begun:
            self._host_lengths[one.slot] = one.length
        whole[_TOKEN] = tokens
        whole[_STEP] += 1
        self._whole[:, where], self._parts[:, where] = whole, parts
        return tokens

    def step(self, slots: list[int], sample: bool) -> torch.Tensor:
        """Return the next token of each of ``slots`` [R].

        ``sample``: does any of them sample? If not, all are greedy.
        """
        columns = max(self._host_lengths[slot] for slot in slots) + 1
        for slot in slots:
            self._host_lengths[slot] += 1
        if self._fused is None:
            return self._computed(torch.tensor(slots, device=self._whole.device), columns, sample)
        rows = 1 << (len(slots) - 1).bit_length()
        filled = slots + [self._cache.slots] * (rows - len(slots))
        kind = "sampled" if sample else "greedy"
        return self._replayed(kind, filled, lambda inputs: self._computed(inputs, None, sample))[: len(slots)]

    def fits(self, slot: int, guesses: int) -> bool:
        """Return whether a slot has room for its newest token and so many guesses after it."""
        return self._host_lengths[slot] + guesses < self._cache.columns

    def look_up(self, slot: int, guesses: Sequence[int], most: int) -> list[int]:
        """Take a greedy slot's step with guesses of the tokens after its newest one; waits for the result.

        Args:
            most: guesses that every step has room for (`fits`); what is missing is filled up.

        Returns:
            The next tokens: those guessed right, and one more.
        """
        columns = self._host_lengths[slot] + 1 + most
        numbers = [slot, *guesses, *[-1] * (most - len(guesses))]
        if self._fused is None:
            found = self._verified(torch.tensor(numbers, device=self._whole.device), columns)
        else:
            found = self._replayed("guessed", numbers, lambda inputs: self._verified(inputs, None))
        *tokens, right = CopiedTokens(found).wait()
        self._host_lengths[slot] += right + 1
        return tokens[: right + 1]

    def _replayed(
        self, kind: str, numbers: Sequence[int], compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Replay a captured step with other inputs; capture it on first use."""
        head = fetch_head(self._model)
        if head != self._head:
            self._forget(head)
        recorded = self._recorded.get((len(numbers), kind))
        if recorded is None:
            recorded = self._recorded[len(numbers), kind] = self._record(len(numbers), compute)
        recorded.inputs.copy_(torch.tensor(numbers).pin_memory(), non_blocking=True)
        recorded.graph.replay()
        return recorded.tokens

    def _record(self, count: int, compute: Callable[[torch.Tensor], torch.Tensor]) -> _Recorded:
        """Capture a step, after two warm-up runs on the spare slot that compile its kernels."""
        inputs = torch.full((count,), self._cache.slots, device=self._whole.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                compute(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile, for pictures for example; that is not part of the step
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            tokens = compute(inputs)
        self._memory = graph.pool()
        return _Recorded(graph, inputs, tokens)

    def _computed(self, slots_R: torch.Tensor, columns: int | None, sample: bool) -> torch.Tensor:
        whole = self._whole[:, slots_R]
        logits = self._logits(slots_R, whole[:4], columns)
        chosen = self._chosen(logits, _sampling(whole, self._parts[:, slots_R]) if sample else None)
        whole = whole + self._step_adds
        whole[_TOKEN] = chosen
        self._whole[:, slots_R] = whole
        return chosen

    def _verified(self, inputs: torch.Tensor, columns: int | None) -> torch.Tensor:
        """Decode a slot's newest token and guesses after it; returns the token chosen after each, and the number of
        guesses that were right.

        Args:
            inputs: the slot, then the guesses, -1 where there is none.
        """
        slot, guesses = inputs[:1], inputs[1:]
        whole = self._whole[:, slot]
        rows = whole[:4].repeat(1, inputs.shape[0])
        rows[_TOKEN, 1:] = guesses.clamp(min=0)
        rows[1:3] += torch.arange(inputs.shape[0], device=inputs.device)
        chosen = self._chosen(self._logits(slot.repeat(inputs.shape[0]), rows, columns, adjacent=True), None)
        right = (chosen[:-1] == guesses).long().cumprod(0).sum(0, keepdim=True)
        whole = whole + self._step_adds * (right + 1)
        whole[_TOKEN] = chosen[right]
        self._whole[:, slot] = whole
        return torch.cat([chosen, right])

    def _chosen(self, logits_RV: torch.Tensor, rows: SamplingRows | None) -> torch.Tensor:
        """Return the chosen tokens [R]; ranks that share the model take the first one's."""
        tokens = choose(logits_RV, rows)
        return tokens if self._group is None else self._group.agree(tokens)

    def _logits(
        self, slots_R: torch.Tensor, rows_R: torch.Tensor, columns: int | None, *, adjacent: bool = False
    ) -> torch.Tensor:
        """Return the logits [R, V] after tokens; ``rows_R`` [4, R]: token, position, length, adapter."""
        tokens, positions, lengths, adapters = rows_R
        with nullcontext() if self._adapters is None else self._adapters.rows(adapters):
            if self._fused is None:
                return decode(self._model, self._cache, slots_R, tokens, positions, lengths, columns)
            found: torch.Tensor = self._fused(self._cache, slots_R, tokens, positions, lengths, adjacent=adjacent)
            return found


def _sampling(whole: torch.Tensor, parts: torch.Tensor) -> SamplingRows:
    return SamplingRows(parts[0], parts[1], *whole[4:])


@dataclass(frozen=True)
class _Recorded:
    """A captured step: its inputs (slots, or a slot and guesses) and its output."""

    graph: Any
    inputs: torch.Tensor
    tokens: torch.Tensor


def captures(model: Any) -> bool:
    """Return whether steps of ``model`` are replayed as CUDA graphs: on a GPU, unless ranks share the model. Their sums
    inside of a graph have not run on cards yet (docs/log.md, 2026-11-30)."""
    return model.device.type == "cuda" and group_of(model) is None


def _fused(model: Any) -> Any:
    """Return the step with fused kernels, if they support this model."""
    if not kernel_available(next(model.parameters())):
        return None
    from cogtune.model.fused_decode import FusedDecode

    return FusedDecode(model) if FusedDecode.fits(model) else None
