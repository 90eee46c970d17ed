"""Muon, the optimiser for pretraining the demo's base: momentum with orthogonalised update matrices.

It needs about half of AdamW's steps here (measured at equal sizes), and the base must be trainable on a laptop. torch's
own Muon orthogonalises in bfloat16, which is slow on most CPUs; this one uses the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_LIKE_ADAM = 0.2  # scales an update to the size of an AdamW step, so that learning rates are comparable


class Muon(torch.optim.Optimizer):
    """For 2D weights of hidden layers; use AdamW for embeddings, head, norms and biases.

    Args:
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(state["momentum"], group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _LIKE_ADAM * max(parameter.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with its singular values brought close to 1 by Newton-Schulz iterations."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
