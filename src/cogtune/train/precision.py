"""Which number format a run computes in, decided before any weight is read."""

from __future__ import annotations

import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import SetupError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FIRST_WITH_BFLOAT16 = (8, 0)  # Ampere


def choose_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights and of the computation.

    ``auto`` is bfloat16 on a GPU and float32 on a CPU; what a DeepSpeed file says of it is in ``config`` already.

    Raises:
        SetupError: bfloat16 on a card that cannot compute in it.
    """
    dtype = _DTYPES.get(config.model.dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == torch.bfloat16 and device.type == "cuda":
        check_bfloat16(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return dtype


def check_bfloat16(card: str, capability: tuple[int, int]) -> None:
    """Raise SetupError, with what can be done, for a card older than compute capability 8.0."""
    if capability < _FIRST_WITH_BFLOAT16:
        raise SetupError(
            f"{card} (compute capability {capability[0]}.{capability[1]}) does not compute in bfloat16; "
            f"cards from {_FIRST_WITH_BFLOAT16[0]}.{_FIRST_WITH_BFLOAT16[1]} on do",
            hint="use --model.dtype float16 (loss scaling is switched on; its narrow range can still give NaN), "
            "--model.dtype float32 (twice the memory), or a newer card",
            code="no-bfloat16",
        )


def float16_warning(dtype: torch.dtype) -> str | None:
    """What to tell a user who trains in float16."""
    if dtype != torch.float16:
        return None
    return (
        "float16: losses are scaled and steps with overflowing gradients are skipped, but this model was trained in "
        "bfloat16 and its activations can exceed float16's range: the loss can become NaN, and the run then stops"
    )
