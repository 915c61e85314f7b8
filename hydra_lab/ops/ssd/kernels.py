# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# (what `triton.jit` turns into kernels cannot be typed, nor can their calls)
"""The state-space recurrence on Triton's kernels, forward and backward.

Shape suffixes: see `chunk_kernels`.

A chunk of the caller that is longer than 64 positions is cut into equal tiles of at most 64, and states are passed from
tile to tile; the kernels see tiles only. The README says what each of them does.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.ssd import chunk_kernels
from hydra_lab.ops.ssd.output import SSDOutput, effective_log_decay, state_dtype
from hydra_lab.ops.ssd.state_kernels import StatePassing, pass_states, pass_states_backward, rows_of
from hydra_lab.ops.ssd.step_kernels import Step

TILE = 64
"""Most positions of a tile: the rows of one of Hopper's matrix instructions."""

PROGRAMS = 512
"""A group's heads are split among programs until there are as many as this, four for each of an H100's processors."""

MOST_HEADS = 16
"""Most heads that one program takes in turn."""

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class _Tiling(NamedTuple):
    """Sizes of a problem, and how it is cut up.

    Attributes:
        rows, length, heads, groups, head_dim, state_dim: B, L, H, G, P and N.
        chunk_size: positions of a chunk of the caller, at most L.
        tile_size: positions of a tile.
        tiles_per_chunk: tiles of a chunk; in the last chunk some may be empty.
        num_tiles: tiles of a row.
        heads_per_part, num_parts: how many heads of a group a program takes, and how many programs share a group.
        dtype: what matrix products are computed in; they are summed in float32.
    """

    rows: int
    length: int
    heads: int
    groups: int
    head_dim: int
    state_dim: int
    chunk_size: int
    tile_size: int
    tiles_per_chunk: int
    num_tiles: int
    heads_per_part: int
    num_parts: int
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> "_Tiling":
        rows, length, heads, head_dim = x.shape
        groups, state_dim = B.shape[2:]
        chunk_size = min(chunk_size, length)
        tiles_per_chunk = triton.cdiv(chunk_size, TILE)
        num_tiles = triton.cdiv(length, chunk_size) * tiles_per_chunk
        heads_per_group = heads // groups
        heads_per_part = min(heads_per_group, MOST_HEADS)
        while (
            heads_per_part > 1
            and rows * num_tiles * groups * triton.cdiv(heads_per_group, heads_per_part) < PROGRAMS
        ):
            heads_per_part = triton.cdiv(heads_per_part, 2)
        return _Tiling(
            rows=rows,
            length=length,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            state_dim=state_dim,
            chunk_size=chunk_size,
            tile_size=triton.cdiv(chunk_size, tiles_per_chunk),
            tiles_per_chunk=tiles_per_chunk,
            num_tiles=num_tiles,
            heads_per_part=heads_per_part,
            num_parts=triton.cdiv(heads_per_group, heads_per_part),
            dtype=torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype),
        )

    @property
    def geometry(self) -> tuple[int, ...]:
        return self.length, self.chunk_size, self.tile_size, self.tiles_per_chunk, self.num_tiles

    @property
    def sharing(self) -> tuple[int, ...]:
        return self.heads_per_part, self.num_parts

    @property
    def programs(self) -> tuple[int, int]:
        """Programs of a kernel that takes a tile and a part of a group's heads."""
        return self.rows * self.num_tiles, self.groups * self.num_parts

    @property
    def num_chunks(self) -> int:
        return self.num_tiles // self.tiles_per_chunk

    @property
    def single(self) -> bool:
        """Whether products are of float32 numbers, which tensor cores do not take as they are."""
        return self.dtype == torch.float32

    @property
    def large(self) -> bool:
        """Whether a state is larger than 64 by 128: it then takes smaller blocks to stay within the registers."""
        return self.head_dim * self.state_dim > 64 * 128

    @property
    def T(self) -> int:
        return _block(self.tile_size, TILE)

    @property
    def P(self) -> int:
        return _block(self.head_dim, 32 if self.single or self.large else 64)

    def N(self, most: int = 128) -> int:
        return _block(self.state_dim, 32 if self.single else 64 if self.large else most)

    def options(self, *, P: int | None = None, N: int | None = None) -> dict[str, Any]:
        """What the kernels are compiled for, in blocks of P by N of a state."""
        tensor_cores = torch.backends.cuda.matmul.allow_tf32 or not self.single
        return {
            "num_heads": self.heads,
            "num_groups": self.groups,
            "head_dim": self.head_dim,
            "state_dim": self.state_dim,
            "dtype": _TYPES[self.dtype],
            "precision": "tf32" if tensor_cores else "ieee",
            "T": self.T,
            "P": self.P if P is None else P,
            "N": self.N() if N is None else N,
            "num_warps": 4 if tensor_cores else 8,
            "num_stages": 2 if tensor_cores and not self.large else 1,
        }


def _block(size: int, most: int) -> int:
    """Smallest power of two that holds `size`, between what a matrix product needs and `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _sequence(tensor_BLXN: Tensor) -> Tensor:
    """The sequence with its last axis side by side, and positions so near that 32 bits count within a tile."""
    return rows_of(tensor_BLXN) if tensor_BLXN.stride(1) * TILE < 2**31 else tensor_BLXN.contiguous()


class _Sums(NamedTuple):
    """Running sums of log decays over tiles.

    Attributes:
        high, low: [B, C, H, T] the sum, in units of log 2, as two numbers.
        step: [B, C, H, T] step sizes.
        kept: [B, C, H] share of a state that is left after each tile.
    """

    high: Tensor
    low: Tensor
    step: Tensor
    kept: Tensor

    @property
    def of_positions(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.high, self.low, self.step


def _decay_sums(tiling: _Tiling, dt: Tensor, A: Tensor, log_decay: Tensor | None) -> _Sums:
    shape = (tiling.rows, tiling.num_tiles, tiling.heads)
    high, low, step = (dt.new_empty(*shape, tiling.T, dtype=torch.float32) for _ in range(3))
    kept = dt.new_empty(shape, dtype=torch.float32)
    heads = min(16, triton.next_power_of_2(tiling.heads))
    chunk_kernels.decay_sums_kernel[(tiling.rows * tiling.num_tiles, triton.cdiv(tiling.heads, heads))](
        dt,
        A,
        log_decay,
        high,
        low,
        step,
        kept,
        *dt.stride(),
        *((0, 0, 0) if log_decay is None else log_decay.stride()),
        *tiling.geometry,
        num_heads=tiling.heads,
        T=tiling.T,
        H=heads,
        num_warps=4,
    )
    return _Sums(high, low, step, kept)


def _tile_states(tiling: _Tiling, x: Tensor, B: Tensor, sums: _Sums, *, from_start: bool) -> Tensor:
    """[B, C, H, P, N] float32: what each tile adds, or (`from_start`, x = dy, B = C) its entering state's gradient."""
    shape = (tiling.rows, tiling.num_tiles, tiling.heads, tiling.head_dim, tiling.state_dim)
    states = x.new_empty(shape, dtype=torch.float32)
    P = _block(tiling.head_dim, 32 if tiling.single else 64)
    blocks = triton.cdiv(tiling.head_dim, P) * triton.cdiv(tiling.state_dim, tiling.N())
    chunk_kernels.tile_states_kernel[(tiling.rows * tiling.num_tiles, tiling.heads, blocks)](
        x,
        B,
        *sums.of_positions,
        states,
        *x.stride()[:3],
        *B.stride()[:3],
        *tiling.geometry,
        **tiling.options(P=P),
        from_start=from_start,
    )
    return states


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
    _check_dtypes(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, log_decay, initial_state)
    if starts is not None:
        log_decay = effective_log_decay(dt_BLH, A_H, log_decay, starts, torch.float32)
    if x_BLHP.shape[1] == 1:  # decoding
        at_0 = (x_BLHP[:, 0], dt_BLH[:, 0], A_H, B_BLGN[:, 0], C_BLGN[:, 0])
        log_decay_BH = None if log_decay is None else log_decay[:, 0]
        y, state, squares = Step.apply(*at_0, initial_state, D, log_decay_BH, squared_norms)
        at_end = state.unsqueeze(1) if chunk_states else None
        return SSDOutput(y.unsqueeze(1), state, None if squares is None else squares.unsqueeze(1), at_end)
    return SSDOutput(
        *_Scan.apply(
            x_BLHP,
            dt_BLH,
            A_H,
            B_BLGN,
            C_BLGN,
            D,
            log_decay,
            initial_state,
            chunk_size,
            squared_norms,
            chunk_states,
        )
    )


def _check_dtypes(*tensors: Tensor | None) -> None:
    if state_dtype(*tensors) == torch.float64:
        raise ValueError("ssd with backend='triton' computes in float32: float64 needs backend='torch'")


class _Scan(torch.autograd.Function):
    """Arguments as those of `ssd` -> y, final state, squared norms or None, chunk states or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        log_decay: Tensor | None,
        initial: Tensor | None,
        chunk_size: int,
        squared_norms: bool,
        chunk_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        tiling = _Tiling.of(x, B, C, chunk_size)
        x, B, C, A = _sequence(x), _sequence(B), _sequence(C), A.contiguous()
        D = None if D is None else D.contiguous()
        sums = _decay_sums(tiling, dt, A, log_decay)
        update = _tile_states(tiling, x, B, sums, from_start=False).flatten(3)
        passed = pass_states(
            update,
            sums.kept,
            None if initial is None else initial.contiguous().flatten(2),
            update if tiling.single else torch.empty_like(update, dtype=tiling.dtype),
            every=tiling.tiles_per_chunk,
            ends=chunk_states,
            squares=squared_norms,
        )
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        p_blocks = triton.cdiv(tiling.head_dim, tiling.P)
        chunk_kernels.scan_kernel[(*tiling.programs, p_blocks)](
            x,
            B,
            C,
            D,
            *sums.of_positions,
            passed.entering,
            y,
            *x.stride()[:3],
            *B.stride()[:3],
            *C.stride()[:3],
            *tiling.geometry,
            *tiling.sharing,
            **tiling.options(),
        )
        ctx.save_for_backward(x, A, B, C, D, *sums, passed.entering)
        ctx.tiling, ctx.gives_decay = tiling, log_decay is not None
        dtypes = [None if tensor is None else tensor.dtype for tensor in (dt, log_decay, initial)]
        ctx.dt_dtype, ctx.log_decay_dtype, ctx.initial_dtype = dtypes
        ctx.set_materialize_grads(False)
        if passed.squares is not None:
            ctx.mark_non_differentiable(passed.squares)
        matrix = (tiling.head_dim, tiling.state_dim)
        ends = None if passed.ends is None else passed.ends.unflatten(-1, matrix)
        return y, passed.final.unflatten(-1, matrix), passed.squares, ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, A, B, C, D, high, low, step, kept, entering = ctx.saved_tensors
        sums, tiling = _Sums(high, low, step, kept), ctx.tiling
        grad_y, grad_final, _, grad_ends = grad_outputs
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        grad_y = grad_y.contiguous()
        grad_final = None if grad_final is None else grad_final.contiguous()
        grad_ends = None if grad_ends is None else grad_ends.contiguous()

        grad_entering = _tile_states(tiling, grad_y, C, sums, from_start=True).flatten(3)
        grad_leaving = grad_entering if tiling.single else torch.empty_like(grad_entering, dtype=tiling.dtype)
        grad_kept, grad_initial = pass_states_backward(
            grad_entering, grad_final, grad_ends, kept, entering, grad_leaving, every=tiling.tiles_per_chunk
        )

        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_step, grad_within, grad_to_end = (torch.empty_like(step) for _ in range(3))
        grad_products = x.new_empty(*tiling.programs, tiling.T, tiling.T, dtype=tiling.dtype)
        grad_D = None if D is None else torch.empty_like(kept)
        strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3])
        chunk_kernels.grad_inputs_kernel[tiling.programs](
            x,
            grad_y,
            B,
            C,
            D,
            *sums.of_positions,
            grad_leaving,
            grad_x,
            grad_step,
            grad_to_end,
            *strides,
            *tiling.geometry,
            *tiling.sharing,
            **tiling.options(P=16 if tiling.single else None),
        )
        chunk_kernels.grad_pairs_kernel[tiling.programs](
            x,
            grad_y,
            B,
            C,
            *sums.of_positions,
            grad_within,
            grad_products,
            grad_D,
            *strides,
            *tiling.geometry,
            *tiling.sharing,
            **tiling.options(),
        )
        grad_B, _ = _grad_projection(tiling, x, grad_leaving, B, C, sums, grad_products, towards_C=False)
        grad_C, from_start = _grad_projection(
            tiling, grad_y, entering, C, B, sums, grad_products, towards_C=True
        )

        shape = x.shape[:3]
        grad_dt = torch.empty(shape, dtype=ctx.dt_dtype, device=x.device)
        grad_log_decay, grad_A = None, None
        if ctx.gives_decay:
            grad_log_decay = torch.empty(shape, dtype=ctx.log_decay_dtype, device=x.device)
        else:
            grad_A = torch.empty_like(kept)
        heads = min(16, triton.next_power_of_2(tiling.heads))
        chunk_kernels.grad_decays_kernel[(tiling.rows * tiling.num_tiles, triton.cdiv(tiling.heads, heads))](
            grad_step,
            grad_within,
            grad_to_end,
            from_start,
            grad_kept,
            step,
            A,
            grad_dt,
            grad_log_decay,
            grad_A,
            *tiling.geometry,
            grad_kept.shape[-1],
            num_heads=tiling.heads,
            n_blocks=from_start.shape[0],
            T=tiling.T,
            H=heads,
            num_warps=4,
        )
        return (
            grad_x,
            grad_dt,
            None if grad_A is None else grad_A.sum(dim=(0, 1)).to(A.dtype),
            grad_B,
            grad_C,
            None if D is None or grad_D is None else grad_D.sum(dim=(0, 1)).to(D.dtype),
            grad_log_decay,
            None
            if ctx.initial_dtype is None
            else grad_initial.to(ctx.initial_dtype).unflatten(-1, (tiling.head_dim, tiling.state_dim)),
            None,
            None,
            None,
        )


def _grad_projection(
    tiling: _Tiling,
    x: Tensor,
    states: Tensor,
    own: Tensor,
    other: Tensor,
    sums: _Sums,
    grad_products: Tensor,
    *,
    towards_C: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient [B, L, G, N] of B or C; with C, that of the running sums from entering states [blocks, B, C, H, T]."""
    N = tiling.N(64)
    blocks = triton.cdiv(tiling.state_dim, N)
    parts = tiling.num_parts
    dtype = own.dtype if parts == 1 else torch.float32
    grad = own.new_empty(tiling.rows, tiling.length, tiling.groups, parts, tiling.state_dim, dtype=dtype)
    from_start = sums.high.new_empty(blocks if towards_C else 0, *sums.high.shape)
    chunk_kernels.grad_projections_kernel[(*tiling.programs, blocks)](
        x,
        states,
        own,
        other,
        *sums.of_positions,
        grad_products,
        grad,
        from_start,
        *x.stride()[:3],
        *own.stride()[:3],
        *other.stride()[:3],
        *tiling.geometry,
        *tiling.sharing,
        **tiling.options(N=N),
        towards_C=towards_C,
    )
    grad = grad.squeeze(3) if parts == 1 else grad.sum(dim=3).to(own.dtype)
    return grad, from_start


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.ssd.ssd_step`."""
    _check_dtypes(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state, D)
    y_BHP, new_state, _ = Step.apply(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state, D, None, False)
    return y_BHP, new_state


def state_passing(update_BCHM: Tensor, log_decay_BCH: Tensor, initial_BHM: Tensor) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.ssd.state_passing`."""
    _check_dtypes(update_BCHM, log_decay_BCH, initial_BHM)
    return StatePassing.apply(update_BCHM, log_decay_BCH, initial_BHM)
