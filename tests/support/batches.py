"""Batches for the tiny model."""

from __future__ import annotations

import torch

IMAGE = [258] * 6


def picture_batch(seed: int = 0, *, labels: bool = False) -> dict[str, torch.Tensor]:
    """Two rows, the second shorter, each BOS, a picture and text; with ``labels`` the text's last tokens have one."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 250, (2, 9), generator=generator)
    ids = torch.cat([torch.tensor([[256, *IMAGE]] * 2), text], dim=1)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    batch = {
        "input_ids": ids,
        "token_type_ids": (ids == 258).long(),
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
    }
    if labels:
        wanted = torch.full_like(ids, -100)
        wanted[:, -6:-3] = ids[:, -6:-3]
        batch["labels"] = wanted
    return batch
