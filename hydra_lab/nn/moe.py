"""The mixture-of-experts path: all tokens of a chunk use the same experts, chosen from what its first token knows."""

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from hydra_lab.chunks import ChunkGrid, Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.layers import RMSNorm
from hydra_lab.ops.chunk_moe import chunk_moe
from hydra_lab.ops.ssd import state_passing
from hydra_lab.taps import Routing, Tap


class MoEState(NamedTuple):
    """What the path keeps of earlier tokens.

    Attributes:
        average: [B, D] fp32 exponential average of the means of the complete chunks.
        open_sum: [B, D] fp32 sum of the inputs of the chunk that is open.
        open_logits, open_experts: [B, E] and [B, K] decision of that chunk.
    """

    average: Tensor
    open_sum: Tensor
    open_logits: Tensor
    open_experts: Tensor


class AuxiliaryLosses(NamedTuple):
    """Unweighted losses over the decisions of the chunks of one block (scalars)."""

    load_balance: Tensor
    router_z: Tensor


class MoEPath(nn.Module):
    """Chunk-level mixture of SwiGLU experts.

    `u_c = [h_first ; norm(m_{c-1})]`, `z_c = W_r u_c`, experts = top-k(z_c), and token t of the chunk weighs them by
    `softmax over those k of z_c + W_t h_t`; m is an exponential average of the means of the earlier chunks. With
    `moe_chunk_pooling="first"`, chunks of one token and W_t = 0 this is Mixtral's routing (arXiv 2401.04088).
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.num_experts = config.moe_num_experts
        self.top_k = config.moe_top_k
        self.chunk_size = config.moe_chunk_size
        self.pooling = config.moe_chunk_pooling
        self.log_decay = math.log(config.moe_ema_decay)
        if self.pooling == "mean":
            warnings.warn(
                'moe_chunk_pooling="mean" routes a chunk by its own mean, so its tokens see their future; '
                "use it only to study that leak",
                stacklevel=2,
            )
        size = config.hidden_size
        self.average_norm = RMSNorm(size, config.norm_eps) if self.pooling == "ema" else None
        self.router = nn.Linear(2 * size if self.pooling == "ema" else size, self.num_experts, bias=False)
        self.token_router = nn.Linear(size, self.num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * config.moe_hidden_size, size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, config.moe_hidden_size))
        self.routing = Tap()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Experts as a linear layer would start, their output and the tokens' own say in the weights at zero."""
        init.normal_(self.gate_up_proj, std=self.gate_up_proj.shape[-1] ** -0.5)
        init.zeros_(self.down_proj)
        init.zeros_(self.token_router.weight)

    def forward(
        self, hidden_BLD: Tensor, span: Span, state: MoEState | None
    ) -> tuple[Tensor, MoEState, AuxiliaryLosses]:
        batch, _, size = hidden_BLD.shape
        grid = ChunkGrid(span, self.chunk_size, batch, hidden_BLD.device)
        if state is None:
            state = MoEState(
                average=hidden_BLD.new_zeros(batch, size, dtype=torch.float32),
                open_sum=hidden_BLD.new_zeros(batch, size, dtype=torch.float32),
                open_logits=hidden_BLD.new_zeros(batch, self.num_experts, dtype=torch.float32),
                open_experts=torch.zeros(batch, self.top_k, dtype=torch.long, device=hidden_BLD.device),
            )
        is_open = None if grid.offset_B is None else (grid.offset_B > 0)[:, None]

        with torch.autocast(hidden_BLD.device.type, enabled=False):
            cells_BCTD = grid.to_grid(hidden_BLD).float()
            sums_BCD = cells_BCTD.sum(dim=2)
            if is_open is not None:
                sums_BCD = _with_first(sums_BCD, sums_BCD[:, 0] + torch.where(is_open, state.open_sum, 0.0))
            complete_BC = grid.complete_BC
            means_BCD = torch.where(complete_BC[..., None], sums_BCD / self.chunk_size, 0.0)
            earlier_BCD, average_BD = self._average(means_BCD, complete_BC, state.average)
            logits_BCE = self._route(cells_BCTD, sums_BCD, earlier_BCD, grid)
            token_logits_BLE = F.linear(hidden_BLD.float(), self.token_router.weight.float())
        carried = None if self.pooling == "mean" else is_open
        if carried is not None:
            logits_BCE = _with_first(logits_BCE, torch.where(carried, state.open_logits, logits_BCE[:, 0]))
        experts_BCK = logits_BCE.topk(self.top_k, dim=-1).indices
        if carried is not None:
            experts_BCK = _with_first(
                experts_BCK, torch.where(carried, state.open_experts, experts_BCK[:, 0])
            )
        experts_BLK = grid.to_tokens(experts_BCK)
        scores_BLK = (grid.to_tokens(logits_BCE) + token_logits_BLE).gather(-1, experts_BLK)
        decision: Routing = self.routing(Routing(logits_BCE, experts_BCK, scores_BLK.softmax(dim=-1)))

        update = chunk_moe(
            hidden_BLD,
            decision.experts,
            decision.weights.to(hidden_BLD.dtype),
            self.gate_up_proj,
            self.down_proj,
            chunk_size=self.chunk_size,
            offset=grid.offset_B,
            length=span.length,
        )
        last_is_open = ~grid.at_last(complete_BC)[:, None]
        new_state = MoEState(
            average=average_BD,
            open_sum=torch.where(last_is_open, grid.at_last(sums_BCD), 0.0),
            open_logits=grid.at_last(decision.logits),
            open_experts=grid.at_last(decision.experts),
        )
        return update, new_state, self._losses(decision, grid)

    def _average(self, means_BCD: Tensor, complete_BC: Tensor, average_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The average entering each chunk and the one after the last: m_c = a m_{c-1} + (1 - a) mean_c."""
        log_decay_BC1 = torch.where(complete_BC, self.log_decay, 0.0)[..., None]
        entering, final = state_passing(
            ((1 - math.exp(self.log_decay)) * means_BCD)[:, :, None], log_decay_BC1, average_BD[:, None]
        )
        return entering[:, :, 0], final[:, 0]

    def _route(self, cells_BCTD: Tensor, sums_BCD: Tensor, earlier_BCD: Tensor, grid: ChunkGrid) -> Tensor:
        if self.pooling == "mean":
            pooled = sums_BCD / grid.seen_BCT.sum(dim=-1).clamp(min=1)[..., None]
        elif self.average_norm is not None:
            pooled = torch.cat([cells_BCTD[:, :, 0], self.average_norm(earlier_BCD)], dim=-1)
        else:
            pooled = cells_BCTD[:, :, 0]
        return F.linear(pooled, self.router.weight.float())

    def _losses(self, decision: Routing, grid: ChunkGrid) -> AuxiliaryLosses:
        """Switch load balance (arXiv 2101.03961, eq. 4) and router z-loss (arXiv 2202.08906, eq. 5)."""
        counted_BC = grid.present_BCT.any(dim=-1)
        num_chunks = counted_BC.sum().clamp(min=1)
        probability_E = (decision.logits.softmax(dim=-1) * counted_BC[..., None]).sum(dim=(0, 1)) / num_chunks
        chosen_BCE = torch.zeros_like(decision.logits).scatter(-1, decision.experts, 1.0)
        share_E = (chosen_BCE * counted_BC[..., None]).sum(dim=(0, 1)) / (num_chunks * self.top_k)
        z_BC = decision.logits.logsumexp(dim=-1).square()
        return AuxiliaryLosses(
            load_balance=self.num_experts * (share_E * probability_E).sum(),
            router_z=(z_BC * counted_BC).sum() / num_chunks,
        )


def _with_first(per_chunk: Tensor, first: Tensor) -> Tensor:
    """`per_chunk` [B, C, ...] with its first chunk replaced by `first` [B, ...]."""
    return torch.cat([first[:, None], per_chunk[:, 1:]], dim=1)
