"""Small parts that the paths share: root-mean-square normalisation and the silent output projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """`RMSNorm(x * silu(gate))` over groups of the last axis: Mamba-2's output norm (arXiv 2405.21060, sec. 7)."""

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        gated = x.float() * F.silu(gate.float())
        size = gated.shape[-1] // self.num_groups
        grouped = torch.unflatten(gated, -1, (self.num_groups, size))
        normed = F.rms_norm(grouped, (size,), None, self.eps).flatten(-2)
        return (normed * self.weight.float()).to(gate.dtype)


class OutputProjection(nn.Linear):
    """The last layer of an optional path. It starts at zero, so that the path joins without noise: one that does not
    teaches its gates to shut before it has learned anything."""
