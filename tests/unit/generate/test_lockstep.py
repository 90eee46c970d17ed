"""The first rank's engine when a rank fails: what waits for it ends with the reason, and nothing waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cogtune.errors import OutOfMemoryError, RunError
from cogtune.generate import lockstep
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.requests import Request
from cogtune.generate.slot_work import SlotWork
from cogtune.processing.processor import CogVLM2Processor

LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49352. This is typically caused by ..."


def _failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Let the third step, of one rank alone, fail before or while it is computed."""
    monkeypatch.setattr(lockstep, "announced", lambda call: call)
    owner: Any = SlotWork if name == "step" else lockstep
    original: Callable[..., Any] = getattr(owner, name)
    calls = []

    def fail(*given: Any) -> Any:
        is_step = name == "step" or (given[0] or {}).get("name") == "step"
        calls.extend([1] * is_step)
        if len(calls) == 3:
            raise error
        return original(*given)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("name", ["announced", "step"])
@pytest.mark.parametrize(
    ("error", "wanted", "code"),
    [
        (RuntimeError(LOST), RunError, "peer-lost"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError, "out-of-memory"),
    ],
)
def test_whatever_waits_ends_with_the_reason(
    parts: tuple[Any, CogVLM2Processor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
    wanted: type[Exception],
    code: str,
) -> None:
    """The answers under way, those without a slot, and what is asked later."""
    _failing(monkeypatch, name, error)
    engine = InferenceEngine(*parts, slots=2, columns=400, leads=True)
    request = Request(engine.processor.encode("Hello"), (), Decoding(max_new_tokens=24))
    running = [engine.submit(request) for _ in range(5)]
    for ask in [*(pending.text for pending in running), lambda: engine.submit(request)]:
        with pytest.raises(wanted) as caught:
            ask()
        assert caught.value.code == code
        assert caught.value.hint
    assert not engine.alive
    engine.close()
