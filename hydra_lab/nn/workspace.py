"""The workspace path: a few slots per sequence, written once per chunk by a recurrence that trains in parallel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hydra_lab.chunks import ChunkGrid, Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.layers import OutputProjection, RMSNorm
from hydra_lab.ops.ssd import state_passing
from hydra_lab.ops.workspace import workspace_read
from hydra_lab.taps import Tap, WorkspaceRead, WorkspaceWrite

LONGEST_MEMORY = 64.0
"""Longest half-life, in chunks, that the slots' retention starts from."""


class WorkspaceState(NamedTuple):
    """What the path keeps of earlier tokens.

    Attributes:
        slots: [B, S, V] fp32 slots after the last complete chunk.
        open_keys: [B, T, k] write keys of the chunk that is open, zero where no token has fallen yet.
        open_values: [B, T, V] its write values, likewise.
        open_sum: [B, D] fp32 sum of its inputs.
    """

    slots: Tensor
    open_keys: Tensor
    open_values: Tensor
    open_sum: Tensor


class WorkspacePath(nn.Module):
    """S slots with `M_{c+1} = f_c M_c + (1 - f_c) U_c`.

    `U_c` is each slot's attention over the tokens of chunk c, `f_c` in (0, 1) depends on the chunk's mean and a bias
    per slot that spreads the slots over short and long memories. Tokens of chunk c attend over `M_c`, which only
    earlier chunks wrote, times a read gate. No gate looks at the slots, so the recurrence is a linear scan.
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        size, key_size, slot_size = config.hidden_size, config.workspace_key_size, config.workspace_slot_size
        self.num_slots = config.workspace_num_slots
        self.chunk_size = config.workspace_chunk_size
        self.key_scale = key_size**-0.5
        self.initial_slots = nn.Parameter(torch.empty(self.num_slots, slot_size))
        self.write_query = nn.Parameter(torch.empty(self.num_slots, key_size))
        self.write_key = nn.Linear(size, key_size, bias=False)
        self.write_value = nn.Linear(size, slot_size, bias=False)
        self.forget_gate = nn.Linear(size, self.num_slots)
        self.read_query = nn.Linear(size, key_size, bias=False)
        self.slot_norm = RMSNorm(slot_size, config.norm_eps)
        self.slot_key = nn.Linear(slot_size, key_size, bias=False)
        self.slot_name = nn.Parameter(torch.empty(self.num_slots, key_size))
        self.read_gate = nn.Linear(size, 1)
        self.out_proj = OutputProjection(slot_size, size, bias=False)
        self.write = Tap()
        self.read = Tap()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spread the slots' half-lives from 1 to `LONGEST_MEMORY` chunks; open the read gate half-way."""
        for parameter in (self.write_query, self.slot_name):
            init.normal_(parameter, std=1.0)
        init.normal_(self.initial_slots, std=1.0)
        half_life = torch.logspace(0, math.log2(LONGEST_MEMORY), self.num_slots, base=2.0)
        keep = 0.5 ** (1 / half_life)
        init.copy_(self.forget_gate.bias, torch.log(keep / (1 - keep)))
        init.zeros_(self.read_gate.bias)

    def forward(
        self, hidden_BLD: Tensor, span: Span, state: WorkspaceState | None
    ) -> tuple[Tensor, WorkspaceState]:
        batch = hidden_BLD.shape[0]
        grid = ChunkGrid(span, self.chunk_size, batch, hidden_BLD.device)
        key_BCTk = grid.to_grid(self.write_key(hidden_BLD))
        value_BCTV = grid.to_grid(self.write_value(hidden_BLD))
        sum_BCD = grid.to_grid(hidden_BLD).sum(dim=2, dtype=torch.float32)
        slots_BSV = self.initial_slots.float().expand(batch, -1, -1)
        if state is not None:
            slots_BSV = state.slots
            if grid.offset_B is not None:
                # The first chunk of this piece began in an earlier one.
                is_open_B = grid.offset_B > 0
                key_BCTk = _add_to_first(key_BCTk, state.open_keys, is_open_B)
                value_BCTV = _add_to_first(value_BCTV, state.open_values, is_open_B)
                sum_BCD = _add_to_first(sum_BCD, state.open_sum, is_open_B)

        written = self.write(self._address(key_BCTk, sum_BCD, grid))
        slots_BCSV, final_BSV = self._recur(value_BCTV, written, grid, slots_BSV)
        update = self._read(hidden_BLD, slots_BCSV, grid)
        last = (grid.at_last(per_chunk) for per_chunk in (key_BCTk, value_BCTV, sum_BCD))
        return update, WorkspaceState(final_BSV, *last)

    def _address(self, key_BCTk: Tensor, sum_BCD: Tensor, grid: ChunkGrid) -> WorkspaceWrite:
        seen_BCT = grid.seen_BCT
        query_Sk = self.write_query.to(key_BCTk.dtype)
        scores_BCST = torch.einsum("sk,bctk->bcst", query_Sk, key_BCTk).float() * self.key_scale
        scores_BCST = scores_BCST.masked_fill(~seen_BCT[:, :, None], -torch.inf)
        empty = ~seen_BCT.any(dim=-1)[..., None, None]
        address_BCST = scores_BCST.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
        count_BC = seen_BCT.sum(dim=-1).clamp(min=1)
        mean_BCD = (sum_BCD / count_BC[..., None]).to(key_BCTk.dtype)
        gate_BCS = torch.sigmoid(-self.forget_gate(mean_BCD).float())
        return WorkspaceWrite(address_BCST, gate_BCS)

    def _recur(
        self, value_BCTV: Tensor, written: WorkspaceWrite, grid: ChunkGrid, slots_BSV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The slots that enter each chunk, and those after the last complete one."""
        candidate_BCSV = torch.einsum(
            "bcst,bctv->bcsv", written.address.to(value_BCTV.dtype), value_BCTV
        ).float()
        complete = grid.complete_BC[..., None]
        gate_BCS = torch.where(complete, written.gate, 0.0)
        return state_passing(gate_BCS[..., None] * candidate_BCSV, torch.log1p(-gate_BCS), slots_BSV)

    def _read(self, hidden_BLD: Tensor, slots_BCSV: Tensor, grid: ChunkGrid) -> Tensor:
        slots_BCSV = self.slot_norm(slots_BCSV).to(hidden_BLD.dtype)
        slot_key = self.slot_key(slots_BCSV) + self.slot_name.to(hidden_BLD.dtype)
        query_BCTK = grid.to_grid(self.read_query(hidden_BLD))
        scores_BCTS = torch.einsum("bctk,bcsk->bcts", query_BCTK, slot_key.to(query_BCTK.dtype)).float()
        address_BLS = (grid.from_grid(scores_BCTS) * self.key_scale).softmax(dim=-1)
        gate_BL1 = torch.sigmoid(self.read_gate(hidden_BLD).float())
        read: WorkspaceRead = self.read(WorkspaceRead(address_BLS, gate_BL1))
        address_BLS = read.address
        if grid.span.valid_BL is not None:  # padding reads nothing
            address_BLS = address_BLS.where(grid.span.valid_BL[..., None], 0.0)
        value_BLV = workspace_read(
            address_BLS, read.gate, slots_BCSV, chunk_size=self.chunk_size, offset=grid.offset_B
        )
        return self.out_proj(value_BLV)


def _add_to_first(cells_BC: Tensor, open_B: Tensor, is_open_B: Tensor) -> Tensor:
    """[B, C, ...] with what earlier pieces put into a row's first chunk; cells that they filled are zero here."""
    kept_B = torch.where(is_open_B.reshape(-1, *[1] * (open_B.ndim - 1)), open_B, open_B.new_zeros(()))
    return torch.cat([(cells_BC[:, 0] + kept_B)[:, None], cells_BC[:, 1:]], dim=1)
