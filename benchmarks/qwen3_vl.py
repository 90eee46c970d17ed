"""Qwen3-VL-8B with random weights: the published configuration, a batch of one shape, and its operations by formula.

The comparison with another trainer (``benchmarks/peer_8b.py``) trains it. A picture of 1,536 x 1,536 pixels takes 2,304
positions between two marks, and 401 tokens of text follow: 2,707 positions, as in cogtune's S400.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.flops import Flops
from cogtune.configuration.shapes import IGNORED_LABEL

GRID, TEXT, LABELS = 96, 401, 200
"""Patches on a picture's side, tokens of text behind it, and how many of those, the last ones, have labels."""

DECODER = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
    },
}  # fmt: skip
TOWER = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
TINY_DECODER = DECODER | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
    },
}  # fmt: skip
TINY_TOWER = TOWER | {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip


def configuration(tiny: bool = False) -> Any:
    """The configuration as published, or with the same classes and small sizes."""
    from transformers import Qwen3VLConfig

    decoder, tower = (TINY_DECODER, TINY_TOWER) if tiny else (DECODER, TOWER)
    first = 508 if tiny else 151652
    marks = {"vision_start": first, "vision_end": first + 1, "image": first + 3, "video": 2 if tiny else first + 4}
    return Qwen3VLConfig(
        text_config=decoder, vision_config=tower, tie_word_embeddings=False,
        **{f"{name}_token_id": number for name, number in marks.items()},
    )  # fmt: skip


def random_model(config: Any, device: torch.device, attention: str = "sdpa") -> Any:
    """The model with random bf16 weights on ``device``."""
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    with device:
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def tokenizer(config: Any) -> Any:
    """A tokenizer with a word for each token and the model's marks."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    marks = {
        "image_token": ("<|image_pad|>", config.image_token_id),
        "vision_start_token": ("<|vision_start|>", config.vision_start_token_id),
        "vision_end_token": ("<|vision_end|>", config.vision_end_token_id),
        "video_token": ("<|video_pad|>", config.video_token_id),
    }
    special = {number: word for word, number in marks.values()} | {0: "<|im_end|>", 1: "<|endoftext|>"}
    words = {special.get(number, f"w{number}"): number for number in range(config.text_config.vocab_size)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<|endoftext|>")), unk_token="<|endoftext|>",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=[word for word, _ in marks.values()],
    )  # fmt: skip
    for name, (word, number) in marks.items():
        setattr(made, name, word)
        setattr(made, f"{name}_id", number)
    return made


def write_processor(config: Any, folder: Path) -> None:
    """Write the model's tokenizer and picture processor."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tower = config.vision_config
    sizes = {"patch_size": tower.patch_size, "merge_size": tower.spatial_merge_size}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, temporal_patch_size=tower.temporal_patch_size),
        tokenizer=tokenizer(config), video_processor=Qwen3VLVideoProcessor(), chat_template="{{ messages }}",
    ).save_pretrained(folder)  # fmt: skip


def write_model(config: Any, folder: Path) -> None:
    """Write the folder that a trainer loads the model from: the weights are zeros, in a file that takes no space."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def fill(model: Any) -> None:
    """Put random weights in the place of what was loaded, norms at one and biases at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def batch(config: Any, rows: int, device: torch.device, *, grid: int = GRID, seed: int = 0) -> dict[str, torch.Tensor]:
    """A collated batch, as the model's processor gives it.

    Tokens and labels are [rows, positions], patches [rows * grid * grid, values of a patch].
    """
    tower = config.vision_config
    generator = torch.Generator().manual_seed(seed)
    positions = (grid // tower.spatial_merge_size) ** 2
    values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    start, picture, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    text = torch.randint(3, start, (rows, TEXT), generator=generator)
    head = torch.tensor([start, *positions * [picture], end]).expand(rows, -1)
    ids = torch.cat([head, text], dim=1)
    labels = ids.clone()
    labels[:, :-LABELS] = IGNORED_LABEL
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == picture).int(),
        "labels": labels,
        "pixel_values": torch.randn(rows * grid * grid, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, grid, grid]]).expand(rows, -1).contiguous(),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def forward_flops(config: Any, made: Mapping[str, torch.Tensor]) -> Flops:
    """Forward operations by part, counted as ``cogtune.bench.flops`` counts its own model's.

    Two for each weight and token, four for each head width and pair of positions that see each other; the head on
    labelled tokens.
    """
    decoder, tower = config.text_config, config.vision_config
    rows, length = made["input_ids"].shape
    hidden, heads = decoder.hidden_size, decoder.num_attention_heads * decoder.head_dim
    cached = decoder.num_key_value_heads * decoder.head_dim
    layer = 2 * hidden * heads + 2 * hidden * cached + 3 * hidden * decoder.intermediate_size
    pairs = rows * length * (length + 1) // 2

    patches, width = len(made["pixel_values"]), tower.hidden_size
    patches_of_one = patches // rows
    block = 4 * width**2 + 2 * width * tower.intermediate_size
    cell = width * tower.spatial_merge_size**2
    merged = patches // tower.spatial_merge_size**2
    mergers = 1 + len(tower.deepstack_visual_indexes)
    return Flops(
        tower=tower.depth * (2 * patches * block + 4 * width * patches * patches_of_one)
        + 2 * patches * made["pixel_values"].shape[1] * width,
        glu_adapter=mergers * 2 * merged * (cell**2 + cell * tower.out_hidden_size),
        decoder_layer=2 * rows * length * layer + 4 * heads * pairs,
        layers=decoder.num_hidden_layers,
        head=2 * int((made["labels"] != IGNORED_LABEL).sum()) * hidden * decoder.vocab_size,
    )
