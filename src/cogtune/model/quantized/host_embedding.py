"""A token embedding that stays in host memory: 1.05 GB at full size that the GPU need not hold."""

from __future__ import annotations

import torch
from torch import nn


class HostEmbedding(nn.Module):
    """Looks ids up on the CPU and sends the rows to the ids' device. Frozen.

    The table is a plain attribute: it is no part of what moves with the model, is sharded or exchanged between ranks.
    """

    def __init__(self, table_VD: torch.Tensor) -> None:
        super().__init__()
        on_gpu = torch.cuda.is_available()
        self.table = (table_VD.pin_memory() if on_gpu else table_VD).detach()
        self.num_embeddings, self.embedding_dim = table_VD.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids of any shape -> their rows [..., D] on the same device.

        Most of a batch are image positions, all with one id, so each id's row is sent once.
        """
        if ids.device.type == "cpu":
            return nn.functional.embedding(ids, self.table)
        distinct, place = ids.unique(return_inverse=True)
        rows = torch.empty(distinct.shape[0], self.embedding_dim, dtype=self.table.dtype, pin_memory=True)
        torch.index_select(self.table, 0, distinct.cpu(), out=rows)
        return nn.functional.embedding(place, rows.to(ids.device, non_blocking=True))
