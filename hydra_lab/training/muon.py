"""Muon for the matrices and AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
semi-orthogonal matrix, so that every direction of it moves by the same amount. Scaled by `0.2 sqrt(max(rows,
columns))` the update has the size of one of AdamW's (arXiv 2502.16982, eq. 4), so that both share a learning rate.
torch's own `torch.optim.Muon` takes 2-D parameters only; the weights of experts are stacked into 3-D ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration; they take every singular value to about 1 (0.7 to 1.2), not to 1."""
NUM_ITERATIONS = 5
ADAMW_SIZE = 0.2
"""Root mean square of a typical AdamW update at learning rate 1."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly the semi-orthogonal factor U V^T of each matrix U S V^T, by Newton-Schulz iteration in bfloat16.

    Args:
        matrices: [..., rows, columns].

    Returns:
        the same shape, bfloat16; zero for a zero matrix.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with `muon=True`, fused AdamW for the others.

    Args:
        groups: as for any optimizer, each with its own `lr`, `weight_decay` and `muon`.
        betas, eps: of AdamW.
        momentum: of Muon, in Nesterov's form.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": 0.0,
            "muon": False,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        same_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            same_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, alike in same_shape.items():
            updates = torch.stack([self._nesterov(parameter, group["momentum"]) for parameter in alike])
            size = ADAMW_SIZE * max(shape[-2:]) ** 0.5
            for parameter, update in zip(alike, orthogonalize(updates), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
