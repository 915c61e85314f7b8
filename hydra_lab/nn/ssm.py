"""The state-space path: Mamba-2's mixer (arXiv 2405.21060) with the names and meaning of its published weights."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from hydra_lab.chunks import ChunkGrid, Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn import state_edits
from hydra_lab.nn.layers import GatedRMSNorm
from hydra_lab.ops.causal_conv import causal_conv
from hydra_lab.ops.ssd import SSDOutput, ssd
from hydra_lab.taps import ChunkStates, RequestedTap, StateSummary, Tap


class SSMState(NamedTuple):
    """What the path keeps of earlier tokens.

    Attributes:
        conv: [B, channels, W-1] last inputs of the convolution.
        state: [B, H, P, N] fp32 state of every head.
    """

    conv: Tensor
    state: Tensor


class ScanInputs(NamedTuple):
    """What the recurrence works on: `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T`, `y_t = S_t C_t + D x_t`.

    Attributes:
        x: [B, L, H, P] inputs, after the convolution.
        dt: [B, L, H] fp32 step sizes; 0 at padding, which leaves the state as it is.
        B, C: [B, L, G, N] what each token writes to its group's states and reads them with.
    """

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


class SSMPath(nn.Module):
    """Mamba-2 mixer.

    `[z, xBC, dt] = in_proj(h)`; `x, B, C = silu(conv(xBC))`; `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T`;
    `out_proj(norm((S_t C_t + D x_t) * silu(z_t)))`. State dicts of mamba_ssm's `Mamba2` and of transformers'
    `Mamba2Mixer` load unchanged.
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.inner_size = config.ssm_inner_size
        self.num_heads = config.ssm_num_heads
        self.head_dim = config.ssm_head_dim
        self.num_groups = config.ssm_num_groups
        self.state_size = config.ssm_state_size
        self.chunk_size = config.ssm_chunk_size
        channels = self.inner_size + 2 * self.num_groups * self.state_size
        self.in_proj = nn.Linear(config.hidden_size, self.inner_size + channels + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.ssm_conv_kernel, groups=channels)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(self.inner_size, self.num_groups, config.norm_eps)
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size, bias=False)
        self.state = Tap()
        self.states = RequestedTap()
        self.readout = RequestedTap()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start decays and step sizes as Mamba-2 does: A uniform in [1, 16], dt log-uniform in [0.001, 0.1]."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        init.ones_(self.D)
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        assert self.conv1d.bias is not None
        init.zeros_(self.conv1d.bias)

    def forward(self, hidden_BLD: Tensor, span: Span, state: SSMState | None) -> tuple[Tensor, SSMState]:
        z, channels, dt = self._project(hidden_BLD)
        y_BLD, new_state = self._mix(channels, dt, span, state)
        return self.out_proj(self.norm(y_BLD, z)), new_state

    def scan_inputs(self, hidden_BLD: Tensor, span: Span) -> ScanInputs:
        """What the recurrence works on when a sequence begins with the normalised `hidden_BLD`."""
        _, channels, dt = self._project(hidden_BLD)
        return self._convolve(channels, dt, span, None)[0]

    def _project(self, hidden_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.inner_size, self.conv1d.in_channels, self.num_heads]
        z, channels, dt = self.in_proj(hidden_BLD).split(sizes, dim=-1)
        return z, channels, dt

    def _convolve(
        self, channels: Tensor, dt: Tensor, span: Span, state: SSMState | None
    ) -> tuple[ScanInputs, Tensor]:
        """The inputs of the recurrence, and what the convolution keeps for the next piece."""
        channels, conv_state = causal_conv(
            channels,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if state is None else state.conv,
            length=span.length,
            activation="silu",
        )
        group_size = self.num_groups * self.state_size
        x, B, C = torch.split(channels, [self.inner_size, group_size, group_size], dim=-1)
        x_BLHP = torch.unflatten(x, -1, (self.num_heads, self.head_dim))
        B_BLGN = torch.unflatten(B, -1, (self.num_groups, self.state_size))
        C_BLGN = torch.unflatten(C, -1, (self.num_groups, self.state_size))
        dt_BLH = F.softplus(dt.float() + self.dt_bias.float())
        if span.valid_BL is not None:
            dt_BLH = dt_BLH * span.valid_BL[..., None]
        return ScanInputs(x_BLHP, dt_BLH, B_BLGN, C_BLGN), conv_state

    def _mix(
        self, channels: Tensor, dt: Tensor, span: Span, state: SSMState | None
    ) -> tuple[Tensor, SSMState]:
        """Convolution and recurrence; what they need is free again when the output norm asks for memory."""
        inputs, conv_state = self._convolve(channels, dt, span, state)
        dt_BLH, C_BLGN = inputs.dt, inputs.C
        A_H = -torch.exp(self.A_log.float())

        grid = ChunkGrid(span, self.chunk_size, dt.shape[0], dt.device)
        initial = None if state is None else state.state
        scan = self._scan(grid, inputs, A_H, None, initial)
        assert scan.squared_norms is not None
        measured_BCH = scan.squared_norms.sqrt()
        summary = StateSummary(measured_BCH.clone(), dt_BLH * A_H)
        versions = [None if field.is_inference() else field._version for field in summary]
        decided: StateSummary = self.state(summary)
        unwritten = (measured_BCH, dt_BLH * A_H)
        written = [_was_written(*each) for each in zip(decided, summary, versions, unwritten, strict=True)]
        scale_BCH = None
        if any(written):
            scale_BCH = decided.norms / measured_BCH.clamp(min=torch.finfo(torch.float32).tiny)
            boundary_BLH = self._leaving_scale(grid, scale_BCH)
            scan = self._scan(grid, inputs, A_H, decided.decay + boundary_BLH, initial)
            scan = scan._replace(final_state=scan.final_state * grid.at_last(scale_BCH)[..., None, None])
        if scan.chunk_states is not None:
            scan = self._with_written_states(scan, grid, C_BLGN, decided.decay, scale_BCH)
        return scan.y.flatten(-2), SSMState(conv_state, scan.final_state)

    def _with_written_states(
        self,
        scan: SSDOutput,
        grid: ChunkGrid,
        C_BLGN: Tensor,
        decay_BLH: Tensor,
        scale_BCH: Tensor | None,
    ) -> SSDOutput:
        """What the scan makes of the states that were written at the taps `readout` and `states`."""
        read_BCHPN = scan.chunk_states
        assert read_BCHPN is not None
        if self.readout.num_requests:
            written: ChunkStates = self.readout(ChunkStates(read_BCHPN.clone()))
            scan = scan._replace(y=state_edits.read_out(scan.y, read_BCHPN, written.states, C_BLGN, grid))
        if self.states.num_requests:
            leaving_BCHPN = read_BCHPN if scale_BCH is None else read_BCHPN * scale_BCH[..., None, None]
            written = self.states(ChunkStates(leaving_BCHPN.clone()))
            y, added = state_edits.carry(
                scan.y, leaving_BCHPN, written.states, C_BLGN, decay_BLH, scale_BCH, grid
            )
            scan = scan._replace(y=y, final_state=scan.final_state + added)
        return scan

    def _scan(
        self,
        grid: ChunkGrid,
        inputs: ScanInputs,
        A_H: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
    ) -> SSDOutput:
        """The recurrence over the piece, in chunks that lie on the grid; a written decay takes the place of `dt A`."""
        aligned = grid.offset_B is None or grid.span.size == 1
        if not aligned:
            inputs = ScanInputs(*(grid.to_grid(tensor).flatten(1, 2) for tensor in inputs))
            log_decay = None if log_decay is None else grid.to_grid(log_decay).flatten(1, 2)
        x, dt, B, C = inputs
        out = ssd(
            x,
            dt,
            A_H,
            B,
            C,
            D=self.D,
            log_decay=log_decay,
            initial_state=initial,
            chunk_size=self.chunk_size,
            squared_norms=True,
            chunk_states=self.states.num_requests + self.readout.num_requests > 0,
        )
        if aligned:
            return out
        cells = torch.unflatten(out.y, 1, (grid.num_chunks, self.chunk_size))
        return out._replace(y=grid.from_grid(cells))

    def _leaving_scale(self, grid: ChunkGrid, scale_BCH: Tensor) -> Tensor:
        """[B, L, H] log factor that a written norm adds to the decay: the state that leaves chunk c is multiplied by
        `scale[:, c]` (the written norm over the measured one) at the first token of chunk c + 1, and stays so."""
        chunk_BL = grid.chunk_of_BL.expand(scale_BCH.shape[0], -1)
        enters_BL = torch.zeros_like(chunk_BL, dtype=torch.bool)
        enters_BL[:, 1:] = chunk_BL[:, 1:] != chunk_BL[:, :-1]
        log_scale_BCH = scale_BCH.clamp(min=torch.finfo(torch.float32).tiny).log()
        log_scale_BLH = grid.to_tokens(torch.roll(log_scale_BCH, 1, dims=1))
        return log_scale_BLH * enters_BL[..., None]


def _was_written(new: Tensor, old: Tensor, version: int | None, unwritten: Tensor) -> bool:
    """Whether a tap gave back something else than it was given: another tensor, or this one written in place."""
    if version is None:  # tensors made in inference mode do not count the writes into them
        return not torch.equal(new, unwritten)
    return new is not old or new._version != version
