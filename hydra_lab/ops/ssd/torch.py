"""The state-space recurrence in chunks: matrix products within a chunk, one short recurrence over the chunks.

Shape suffixes beyond those of the package: T positions of one chunk (i reading, j written), R heads of one
group (H = G R), Q values of one group's heads (Q = R P).

Forward and backward are written by hand. What autograd would keep and walk over, several arrays of [B, C, H, T, T],
is computed a few chunks at a time in scratch memory that stays in the processor's cache, and computed again in
the backward pass.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hydra_lab.ops.ssd.output import SSDOutput, effective_log_decay, state_dtype

CHUNKS_AT_ONCE = 64
"""Chunks whose states come from one triangular matrix product; longer sequences loop over such spans."""

LOG2_E = math.log2(math.e)
"""Decays inside a chunk are powers of 2: torch's `exp2` costs the same for every exponent, its `exp` up to 40 times as
much where the result underflows, as that of most pairs of distant positions does."""

LEAST_LOG_DECAY = -1e6
"""A decay below this forgets everything; the bound lets -inf mean the same."""

SLICE_ELEMENTS = 1 << 17
"""On a CPU, the size of the largest intermediate: a few of them fit the second-level cache of one core."""


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    squared_norms: bool,
    chunk_states: bool,
) -> SSDOutput:
    """See `hydra_lab.ops.ssd.ssd`."""
    rows, length, heads, head_dim = x_BLHP.shape
    dtype = state_dtype(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, initial_state)
    dt_BLH = dt_BLH.to(dtype)
    log_decay_BLH = effective_log_decay(dt_BLH, A_H, log_decay, starts, dtype)
    if initial_state is None:
        initial_state = x_BLHP.new_zeros(rows, heads, head_dim, B_BLGN.shape[-1], dtype=dtype)
    if length == 1:  # decoding
        at_0 = (x_BLHP[:, 0], dt_BLH[:, 0], log_decay_BLH[:, 0], B_BLGN[:, 0], C_BLGN[:, 0])
        y_BHP, state = _step(*at_0, initial_state, D, dtype)
        return _output(y_BHP.unsqueeze(1), state.unsqueeze(1), squared_norms, chunk_states)
    size = min(chunk_size, length)
    chunks = -(-length // size)
    sequences = [x_BLHP, dt_BLH, log_decay_BLH, B_BLGN, C_BLGN]
    if chunks * size > length:  # padding has dt = 0 and log decay 0: it touches no state
        missing = chunks * size - length
        sequences = [F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing)) for tensor in sequences]
    chunked = [tensor.reshape(rows, chunks, size, *tensor.shape[2:]) for tensor in sequences]
    scan = cast(Callable[..., tuple[Tensor, Tensor]], _ChunkScan.apply)  # pyright: ignore[reportUnknownMemberType]
    y_BCTHP, states_BCHPN = scan(*chunked, D, initial_state.to(dtype))
    return _output(y_BCTHP.flatten(1, 2)[:, :length], states_BCHPN[:, 1:], squared_norms, chunk_states)


def _output(y_BLHP: Tensor, states_BCHPN: Tensor, squared_norms: bool, chunk_states: bool) -> SSDOutput:
    """From the outputs and the state at the end of each chunk. The final state gets memory of its own, so that a decode
    cache that keeps it does not keep them all."""
    squares_BCH = None
    if squared_norms:
        norm = cast(Callable[..., Tensor], torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
        squares_BCH = norm(states_BCHPN.detach(), dim=(-2, -1)).square()
    final_BHPN = states_BCHPN[:, -1].clone()
    return SSDOutput(y_BLHP, final_BHPN, squares_BCH, states_BCHPN if chunk_states else None)


class _ChunkScan(torch.autograd.Function):
    """The recurrence over chunks of equal size.

    x [B, C, T, H, P] in any precision, dt and log_decay [B, C, T, H], B and C [B, C, T, G, N] in any precision,
    D [H] or None, initial [B, H, P, N] -> y [B, C, T, H, P] in the dtype of x, states [B, C + 1, H, P, N], the
    initial one first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, chunks = x.shape[:2]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        states = initial.new_empty(rows, chunks + 1, *initial.shape[1:])
        scratch = _Scratch(initial)
        with torch.autocast(x.device.type, enabled=False):
            for row in range(rows):
                inputs = _Row(x[row], dt[row], log_decay[row], B[row], C[row], D, scratch)
                _scan_row(inputs, initial[row], y[row], states[row])
        ctx.save_for_backward(x, dt, log_decay, B, C, D, states)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "ssd with backend='torch' has no second derivative: use backend='reference'"
            )
        x, dt, log_decay, B, C, D, states = ctx.saved_tensors
        grad_y: Tensor = torch.zeros_like(x) if grad_outputs[0] is None else grad_outputs[0]
        grad_states: Tensor | None = grad_outputs[1]
        scratch = _Scratch(states)
        grads = _Gradients(
            x=torch.empty(x.shape, dtype=x.dtype, device=x.device),
            dt=torch.empty_like(dt, memory_format=torch.contiguous_format),
            log_decay=torch.empty_like(dt, memory_format=torch.contiguous_format),
            B=torch.empty(B.shape, dtype=states.dtype, device=x.device),
            C=torch.empty(C.shape, dtype=states.dtype, device=x.device),
            D=None if D is None else torch.zeros(D.shape, dtype=states.dtype, device=x.device),
            initial=torch.empty_like(states[:, 0]),
        )
        with torch.autocast(x.device.type, enabled=False):
            for row in range(x.shape[0]):
                inputs = _Row(x[row], dt[row], log_decay[row], B[row], C[row], D, scratch)
                grad_states_CHPN = None if grad_states is None else grad_states[row]
                _scan_row_backward(inputs, states[row], grad_y[row], grad_states_CHPN, grads.row(row))
        grad_D = None if D is None or grads.D is None else grads.D.to(D.dtype)
        return (
            grads.x,
            grads.dt,
            grads.log_decay,
            grads.B.to(B.dtype),
            grads.C.to(C.dtype),
            grad_D,
            grads.initial,
        )


class _Scratch:
    """Named memory that is used again from slice to slice: fresh pages cost more than the arithmetic on them."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised tensor of this shape; it is the same memory whenever the name is the same."""
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)


class _Gradients:
    """Gradients of the arguments of `_ChunkScan`, of all rows or of one; D's is a sum over the rows."""

    def __init__(
        self,
        *,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor,
    ) -> None:
        self.x, self.dt, self.log_decay, self.B, self.C, self.D, self.initial = (
            x,
            dt,
            log_decay,
            B,
            C,
            D,
            initial,
        )

    def row(self, row: int) -> "_Gradients":
        per_row = {name: getattr(self, name)[row] for name in ("x", "dt", "log_decay", "B", "C", "initial")}
        return _Gradients(**per_row, D=self.D)


class _Row:
    """One row's inputs and what both passes derive from its step sizes and decays.

    Attributes:
        x: [C, T, H, P] in the caller's precision; all others are in that of the states.
        dt: [C, T, H].
        B, C: [C, T, G, N].
        D: [H] or None.
        from_start: [C, T, H] share of the entering state that is left at each position.
        to_end: [C, T, H] share of what is written at each position that is left at the chunk's end.
        chunk_log_decay: [C, H] logarithm of what is left of the entering state at the chunk's end.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        scratch: _Scratch,
    ) -> None:
        dtype = scratch.like.dtype
        self.x, self.dt, self.scratch = x, dt.contiguous(), scratch
        self.B, self.C = B.to(dtype), C.to(dtype)
        self.D = None if D is None else D.to(dtype)
        # Running sums of decays grow large, and what counts is their small differences: sum in double precision and
        # keep the sum as a pair of numbers, whose differences are exact where the decay is not negligible.
        sum_CTH = torch.cumsum(log_decay.double().clamp(min=LEAST_LOG_DECAY), dim=1)
        self.chunk_log_decay = sum_CTH[:, -1].to(dtype)
        sum_CTH = sum_CTH * LOG2_E
        self.from_start = sum_CTH.to(dtype).exp2()
        self.to_end = (sum_CTH[:, -1:] - sum_CTH).to(dtype).exp2()
        sum_CHT = sum_CTH.transpose(1, 2)
        self.sum_high = sum_CHT.to(dtype).contiguous()
        self.sum_low = (sum_CHT - self.sum_high.double()).to(dtype)
        chunk_size = x.shape[1]
        self.above_diagonal = x.new_full((chunk_size, chunk_size), float("-inf"), dtype=dtype).triu(1)

    def slices(self) -> Iterator[slice]:
        """Chunks to work on at once."""
        chunks, chunk_size, heads, head_dim = self.x.shape
        per_chunk = heads * chunk_size * max(chunk_size, head_dim)
        step = max(1, SLICE_ELEMENTS // per_chunk) if self.x.device.type == "cpu" else chunks
        return (slice(start, min(start + step, chunks)) for start in range(0, chunks, step))

    def decay(self, at: slice) -> Tensor:
        """[C, H, T, T] share of what was written at j that is left at i; 0 for j > i."""
        high, low = self.sum_high[at], self.sum_low[at]
        decay = self.scratch("decay", *high.shape, high.shape[-1])
        torch.sub(high.unsqueeze(-1), high.unsqueeze(-2), out=decay)
        decay.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
        return decay.add_(self.above_diagonal).exp2_()

    def products(self, at: slice) -> Tensor:
        """[C, G, 1, T, T] products C_i . B_j, which the heads of a group share."""
        return (self.C[at].transpose(1, 2) @ self.B[at].permute(0, 2, 3, 1)).unsqueeze(2)

    def by_group(self, of_heads_CHTT: Tensor) -> Tensor:
        """The same numbers as [C, G, R, T, T]."""
        chunks, heads, *positions = of_heads_CHTT.shape
        groups = self.B.shape[2]
        return of_heads_CHTT.view(chunks, groups, heads // groups, *positions)

    def times_x(self, name: str, factor_CTH: Tensor, at: slice) -> Tensor:
        """[C, T, H, P] a factor per position and head times x."""
        x = self.x[at]
        return torch.mul(x, factor_CTH.unsqueeze(-1), out=self.scratch(name, *x.shape))

    def dt_x_by_head(self, at: slice) -> Tensor:
        """[C, H, T, P] dt x."""
        x_CHTP, dt_CHT = self.x[at].transpose(1, 2), self.dt[at].transpose(1, 2)
        return torch.mul(x_CHTP, dt_CHT.unsqueeze(-1), out=self.scratch("dt_x", *x_CHTP.shape))

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Each group and its part of an axis of heads times head dimension."""
        groups = self.B.shape[2]
        values = self.x.shape[2] * self.x.shape[3] // groups
        return ((group, slice(group * values, (group + 1) * values)) for group in range(groups))


def _scan_row(row: _Row, initial_HPN: Tensor, y_CTHP: Tensor, states_CHPN: Tensor) -> None:
    """Fill in one row's outputs and states."""
    chunks, chunk_size, heads, head_dim = row.x.shape
    state_dim = row.B.shape[-1]
    scratch = row.scratch

    # What each chunk adds to the state: sum over t of exp(decay from t to the end) dt_t x_t B_t^T.
    update_CVN = scratch("update", chunks, heads * head_dim, state_dim)  # V: heads times head dimension
    for at in row.slices():
        weighted_CTV = row.times_x("by_position", row.dt[at] * row.to_end[at], at).flatten(2)
        for group, values in row.groups():
            B_CTN = row.B[at, :, group]
            torch.bmm(weighted_CTV[..., values].transpose(1, 2), B_CTN, out=update_CVN[at, values])
    states_CHM = states_CHPN.flatten(2)
    _run_states(update_CVN.view(chunks, heads, -1), row.chunk_log_decay, initial_HPN.flatten(1), states_CHM)
    entering_CVN = states_CHPN[:-1].flatten(1, 2)

    for at in row.slices():
        # From the entering state: y_i = exp(decay from the start to i) C_i h.
        y = scratch("by_position", at.stop - at.start, chunk_size, heads, head_dim)
        for group, values in row.groups():
            h_CNQ = entering_CVN[at, values].transpose(1, 2)
            torch.bmm(row.C[at, :, group], h_CNQ, out=y.flatten(2)[..., values])
        y.mul_(row.from_start[at].unsqueeze(-1))
        # Within the chunk: y_i += sum over j <= i of (C_i . B_j) exp(decay from j to i) dt_j x_j.
        scores_CHTT = row.decay(at)
        row.by_group(scores_CHTT).mul_(row.products(at))
        dt_x_CHTP = row.dt_x_by_head(at)
        within = scratch("within", *dt_x_CHTP.shape)
        torch.bmm(scores_CHTT.flatten(0, 1), dt_x_CHTP.flatten(0, 1), out=within.flatten(0, 1))
        y.add_(within.transpose(1, 2))
        if row.D is not None:
            y.addcmul_(row.x[at], row.D.unsqueeze(-1))
        y_CTHP[at] = y


def _scan_row_backward(
    row: _Row, states_CHPN: Tensor, grad_y_CTHP: Tensor, grad_states_CHPN: Tensor | None, grads: _Gradients
) -> None:
    """Fill in one row's gradients, and add to that of D."""
    chunks, _, heads, head_dim = row.x.shape
    state_dim = row.B.shape[-1]
    scratch = row.scratch
    entering_CVN = states_CHPN[:-1].flatten(1, 2)
    grad_sum_CTH = torch.empty_like(row.dt)  # gradient of the running sum of log decays

    # y_i = exp(decay from the start to i) C_i h, towards C, the decay and the entering states.
    grad_states_CVN = scratch("grad_states", chunks + 1, heads * head_dim, state_dim)
    if grad_states_CHPN is None:
        grad_states_CVN.zero_()
    else:
        grad_states_CVN.copy_(grad_states_CHPN.flatten(1, 2))
    for at in row.slices():
        grad_y = grad_y_CTHP[at]
        carried = scratch("carried", *grad_y.shape)
        decayed_grad = scratch("by_position", *grad_y.shape)
        torch.mul(grad_y, row.from_start[at].unsqueeze(-1), out=decayed_grad)
        for group, values in row.groups():
            C_CTN, h_CQN = row.C[at, :, group], entering_CVN[at, values]
            grad_CTQ = decayed_grad.flatten(2)[..., values]
            torch.bmm(C_CTN, h_CQN.transpose(1, 2), out=carried.flatten(2)[..., values])
            torch.bmm(grad_CTQ, h_CQN, out=grads.C[at, :, group])
            grad_states_CVN[at, values].baddbmm_(grad_CTQ.transpose(1, 2), C_CTN)
        grad_sum_CTH[at] = carried.mul_(decayed_grad).sum(-1)

    # h_{c+1} = exp(decay of chunk c) h_c + update_c, towards the updates, the decays and the initial state.
    total_CVN = scratch("total_states", *grad_states_CVN.shape)
    total_CHM = total_CVN.view(chunks + 1, heads, -1)
    _run_states_backward(grad_states_CVN.view(total_CHM.shape), row.chunk_log_decay, total_CHM)
    grads.initial.copy_(total_CVN[0].view(heads, head_dim, state_dim))
    grad_chunk_CH = _grad_of_log_decay(
        states_CHPN.flatten(2), total_CHM, row.chunk_log_decay, grad_states_CVN
    )
    grad_update_CVN = total_CVN[1:]

    for at in row.slices():
        x, dt, grad_y = row.x[at], row.dt[at], grad_y_CTHP[at]

        # y_i = sum over j of scores_ij dt_j x_j, scores_ij = (C_i . B_j) decay_ij, towards all four.
        decay_CHTT, products_CG1TT = row.decay(at), row.products(at)
        scores_CHTT = scratch("scores", *decay_CHTT.shape)
        torch.mul(row.by_group(decay_CHTT), products_CG1TT, out=row.by_group(scores_CHTT))
        dt_x_CHTP = row.dt_x_by_head(at)
        grad_y_CHTP = scratch("within", *dt_x_CHTP.shape).copy_(grad_y.transpose(1, 2))
        grad_scores_CHTT = scratch("grad_scores", *decay_CHTT.shape)
        torch.bmm(
            grad_y_CHTP.flatten(0, 1),
            dt_x_CHTP.flatten(0, 1).transpose(1, 2),
            out=grad_scores_CHTT.flatten(0, 1),
        )
        grad_dt_x_CHTP = dt_x_CHTP  # its values are no longer needed
        torch.bmm(
            scores_CHTT.flatten(0, 1).transpose(1, 2),
            grad_y_CHTP.flatten(0, 1),
            out=grad_dt_x_CHTP.flatten(0, 1),
        )
        grad_exponent_CHTT = scores_CHTT.mul_(grad_scores_CHTT)
        grad_exponent_CHTT.diagonal(dim1=-2, dim2=-1).zero_()  # nothing decays from a position to itself
        grad_sum_CTH[at] += (grad_exponent_CHTT.sum(-1) - grad_exponent_CHTT.sum(-2)).transpose(1, 2)
        grad_products_CGTT = row.by_group(grad_scores_CHTT.mul_(decay_CHTT)).sum(2)
        grads.C[at] += (grad_products_CGTT @ row.B[at].transpose(1, 2)).transpose(1, 2)
        grads.B[at] = (grad_products_CGTT.transpose(2, 3) @ row.C[at].transpose(1, 2)).transpose(1, 2)

        # update = sum over t of weighted_t B_t^T, weighted_t = exp(decay from t to the end) dt_t x_t, likewise.
        weighted_CTV = row.times_x("by_position", dt * row.to_end[at], at).flatten(2)
        grad_weighted = scratch("carried", *x.shape)
        for group, values in row.groups():
            grad_CQN, B_CTN = grad_update_CVN[at, values], row.B[at, :, group]
            grads.B[at, :, group] += torch.bmm(weighted_CTV[..., values], grad_CQN)
            torch.bmm(B_CTN, grad_CQN.transpose(1, 2), out=grad_weighted.flatten(2)[..., values])
        products = scratch("by_position", *x.shape)
        grad_to_end_CTH = torch.mul(grad_weighted, x, out=products).sum(-1) * dt * row.to_end[at]
        grad_sum_CTH[at] -= grad_to_end_CTH
        grad_sum_CTH[at, -1] += grad_to_end_CTH.sum(1) + grad_chunk_CH[at]

        # Both together towards dt and x.
        grad_dt_x = grad_weighted.mul_(row.to_end[at].unsqueeze(-1)).add_(grad_dt_x_CHTP.transpose(1, 2))
        grads.dt[at] = torch.mul(grad_dt_x, x, out=products).sum(-1)
        grad_x = grad_dt_x.mul_(dt.unsqueeze(-1))
        if row.D is not None and grads.D is not None:
            grad_x.addcmul_(grad_y, row.D.unsqueeze(-1))
            grads.D += torch.mul(grad_y, x, out=products).sum(dim=(0, 1, 3))
        grads.x[at] = grad_x
    # Each decay is part of every running sum from its own position to the end of its chunk.
    grads.log_decay.copy_(grad_sum_CTH.flip(1).cumsum(1).flip(1))


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.ssd.ssd_step`."""
    dtype = state_dtype(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state)
    dt_BH = dt_BH.to(dtype)
    return _step(x_BHP, dt_BH, dt_BH * A_H.to(dtype), B_BGN, C_BGN, state, D, dtype)


def _step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    log_decay_BH: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    state: Tensor,
    D: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One position: its output, in the dtype of x, and the new state."""
    rows, heads, head_dim = x_BHP.shape
    groups, state_dim = B_BGN.shape[1:]
    with torch.autocast(x_BHP.device.type, enabled=False):
        x, B, C = x_BHP.to(dtype), B_BGN.to(dtype), C_BGN.to(dtype)
        dt_x_BGQ1 = (x * dt_BH[..., None]).reshape(rows, groups, -1, 1)
        decayed_BHPN = torch.exp(log_decay_BH)[..., None, None] * state.to(dtype)
        state_BGQN = torch.addcmul(
            decayed_BHPN.reshape(rows, groups, -1, state_dim), dt_x_BGQ1, B[:, :, None]
        )
        y_BHP = (state_BGQN @ C[..., None]).reshape(rows, heads, head_dim)
        if D is not None:
            y_BHP = torch.addcmul(y_BHP, x, D.to(dtype)[:, None])
    return y_BHP.to(x_BHP.dtype), state_BGQN.reshape(rows, heads, head_dim, state_dim)


def state_passing(update_BCHM: Tensor, log_decay_BCH: Tensor, initial_BHM: Tensor) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.ssd.state_passing`."""
    dtype = state_dtype(update_BCHM, log_decay_BCH, initial_BHM)
    run = cast(Callable[..., Tensor], _StatePassing.apply)  # pyright: ignore[reportUnknownMemberType]
    states_BCHM = run(update_BCHM.to(dtype), log_decay_BCH.to(dtype), initial_BHM.to(dtype))
    return states_BCHM[:, :-1], states_BCHM[:, -1]


class _StatePassing(torch.autograd.Function):
    """update [B, C, H, M], log_decay [B, C, H], initial [B, H, M] -> states [B, C + 1, H, M], the initial one first."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, log_decay: Tensor, initial: Tensor) -> Tensor:
        rows, chunks, heads, values = update.shape
        states = update.new_empty(rows, chunks + 1, heads, values)
        with torch.autocast(update.device.type, enabled=False):
            for row in range(rows):
                _run_states(update[row], log_decay[row], initial[row], states[row])
        ctx.save_for_backward(log_decay, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("state_passing with backend='torch' has no second derivative")
        log_decay, states = ctx.saved_tensors
        total, grad_log_decay = torch.empty_like(states), torch.empty_like(log_decay)
        with torch.autocast(states.device.type, enabled=False):
            for row in range(states.shape[0]):
                _run_states_backward(grad_outputs[0][row], log_decay[row], total[row])
                scratch = torch.empty_like(total[row])
                grad_log_decay[row] = _grad_of_log_decay(states[row], total[row], log_decay[row], scratch)
        return total[:, 1:], grad_log_decay, total[:, 0]


def _spans(chunks: int) -> list[slice]:
    """Spans of chunks; a span of chunks s..e goes from state s to state e."""
    return [slice(start, min(start + CHUNKS_AT_ONCE, chunks)) for start in range(0, chunks, CHUNKS_AT_ONCE)]


def _span_decay(log_decay_CH: Tensor) -> Tensor:
    """[H, C + 1, C + 1] share of state k that is left in state c, for the states before and after each chunk of a span.

    Sums of decays are taken from each k on, not as differences of one long running sum, which would lose the
    small decays that follow a large one.
    """
    states = log_decay_CH.shape[0] + 1
    step_HC = F.pad(log_decay_CH.t(), (1, 0))  # decay of the step that leads to each state
    lower = torch.ones(states, states, dtype=torch.bool, device=log_decay_CH.device).tril()
    steps_HCC = step_HC.unsqueeze(-1).expand(-1, -1, states).masked_fill(~lower.tril(-1), 0)
    return torch.exp(torch.cumsum(steps_HCC, dim=1)) * lower


def _run_states(update_CHM: Tensor, log_decay_CH: Tensor, initial_HM: Tensor, states_CHM: Tensor) -> None:
    """Fill in the states of one row: `states[0] = initial`, `states[c+1] = exp(log_decay[c]) states[c] + update[c]`."""
    states_CHM[0] = initial_HM
    for span in _spans(update_CHM.shape[0]):
        decay_HCC = _span_decay(log_decay_CH[span])
        after_HCM = states_CHM[span.start + 1 : span.stop + 1].transpose(0, 1)
        torch.bmm(decay_HCC[:, 1:, 1:], update_CHM[span].transpose(0, 1), out=after_HCM)
        after_HCM.addcmul_(decay_HCC[:, 1:, :1], states_CHM[span.start].unsqueeze(1))


def _run_states_backward(grad_states_CHM: Tensor, log_decay_CH: Tensor, total_CHM: Tensor) -> None:
    """Fill in the gradient towards each state through all states that follow from it: the same run, backwards."""
    total_CHM[-1] = grad_states_CHM[-1]
    for span in reversed(_spans(log_decay_CH.shape[0])):
        decay_HCC = _span_decay(log_decay_CH[span])
        before_HCM = total_CHM[span].transpose(0, 1)
        own_HCM = grad_states_CHM[span].transpose(0, 1)
        torch.bmm(decay_HCC[:, :-1, :-1].transpose(1, 2), own_HCM, out=before_HCM)
        before_HCM.addcmul_(decay_HCC[:, -1, :-1].unsqueeze(-1), total_CHM[span.stop].unsqueeze(1))


def _grad_of_log_decay(
    states_CHM: Tensor, total_CHM: Tensor, log_decay_CH: Tensor, scratch: Tensor
) -> Tensor:
    """[C, H] gradient of each chunk's log decay: what it leaves of a state, times the gradient of the next state."""
    products = scratch.view(total_CHM.shape)[1:]
    return torch.mul(states_CHM[:-1], total_CHM[1:], out=products).sum(-1) * torch.exp(log_decay_CH)
