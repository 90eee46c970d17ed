"""Write this version's checkpoint and adapter, which every later version must load

Run as ``python -m tests.golden.make_golden``. A folder that exists is never overwritten: it is the promise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import cogtune
from cogtune.adapters.attach import attach, save_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("saved-*"))


def probe() -> dict[str, torch.Tensor]:
    """The input whose logits are stored: one picture, five text tokens."""
    ids = torch.tensor([[256, *[258] * 6, 81, 58, 32, 104, 105]])
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).sin().view(1, 3, 8, 8)
    return {"input_ids": ids, "token_type_ids": (ids == 258).long(), "pixel_values": pixels}


def logits(model: torch.nn.Module) -> list[list[float]]:
    """The first eight logits at every position."""
    with torch.no_grad():
        return [[round(float(v), 6) for v in row[:8]] for row in model.eval()(**probe()).logits[0]]


def main() -> int:
    folder = HERE / f"saved-{cogtune.__version__}"
    if folder.exists():
        print(f"{folder} exists and is never rewritten", file=sys.stderr)
        return 2
    base = make_tiny(folder / "base", seed=2026, shards=2)
    model = load_model(base)
    stored = {"version": cogtune.__version__, "torch": torch.__version__, "base": logits(model)}
    lora = SimpleNamespace(
        targets=["experts", "glu-adapter", "vision-tower"], rank=2, alpha=8.0, dropout=0.0, rslora=False, dora=False,
        start_from=None, extra={},
    )  # fmt: skip
    adapted = attach(model, lora)
    generator = torch.Generator().manual_seed(2026)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    stored["adapter"] = logits(adapted)
    save_adapter(adapted, folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": "base"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    (folder / "logits.json").write_text(json.dumps(stored, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
