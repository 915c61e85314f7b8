# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false
# (what `triton.jit` turns into kernels cannot be typed)
"""Triton implementation of `hydra_lab.ops.sparse_attention`, forward and backward. See the README beside this.

Shape suffixes: B rows, C tiles of `TILE` queries, G key-value heads, W width of the plan's lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.sparse_attention import attention_kernels, gradient_kernels
from hydra_lab.ops.sparse_attention.output import AttentionOutput
from hydra_lab.ops.sparse_attention.select_kernels import block_means as block_means
from hydra_lab.ops.sparse_attention.select_kernels import select_blocks as select_blocks

TILE: int = attention_kernels.TILE.value
_PIECE = 16
"""Fewest tiles that a block's gradient is split by."""
_SPLIT_OWNERS = 32
"""Key-value heads of all rows from which on no block's gradient is split: the sink, which all tiles list, is then added
up by enough programs. So the memory of the parts does not grow with the rows."""
_DECODE_PROGRAMS = 264
"""Programs that a decoding step is shared out among, two for each multiprocessor of an H100."""
_MAX_SPLITS = 64
"""Most programs that share one row's key-value head while decoding: one program then holds all their parts."""

_SUMMED = 16
"""Keys whose gradients a program of `sum_kernel` adds up."""
_STAGES = 3
"""Slices in flight, as Triton counts them."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    start: Tensor | None,
    window: int,
    block_size: int,
    scale: float,
    mass: bool,
) -> AttentionOutput:
    """See `hydra_lab.ops.sparse_attention.sparse_attention`."""
    problem = _Problem.of(q, k, v, start, window, block_size, scale)
    if q.shape[1] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return problem.decode(q, k, v, blocks, start, mass)
    apply = cast(
        Callable[..., tuple[Tensor, Tensor | None]],
        _SparseAttention.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    return AttentionOutput(*apply(q, k, v, blocks, start, problem, mass))


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor,
        start: Tensor | None,
        problem: "_Problem",
        mass: bool,
    ) -> tuple[Tensor, Tensor | None]:
        plan = problem.plan(blocks, start)
        y, log_sum, shares = problem.forward(q, k, v, start, plan, mass)
        ctx.save_for_backward(q, k, v, start, y, log_sum, *plan)
        ctx.problem = problem
        if shares is not None:
            ctx.mark_non_differentiable(shares)
        return y, shares

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, start, y, log_sum, *plan = ctx.saved_tensors
        d_q, d_k, d_v = ctx.problem.backward(grad_outputs[0], q, k, v, start, _Plan(*plan), y, log_sum)
        return d_q, d_k, d_v, None, None, None, None


class _Plan(NamedTuple):
    """The blocks that each tile of queries lists: the sink and those that a query selected, where some query that
    sees them has a key of theirs outside its window. All None where there cannot be any.

    Attributes:
        ids: [B, C, G, W] int32 blocks, ascending, the sink first; garbage past the list.
        bits: [B, C, G, W] int64; the bits of `bits[e + 1] - bits[e]` tell which queries selected `ids[e]`.
        counts: [B, C, G, 2] int32 entries of the list, and how many of them no query's window touches (the first
            ones).
    """

    ids: Tensor | None
    bits: Tensor | None
    counts: Tensor | None


class _Tiling(NamedTuple):
    """What a program works on.

    Attributes:
        own: queries or keys whose results the program accumulates.
        keys: keys that a program which owns queries goes through at once.
        queries: queries that a program which owns keys goes through at once; the fewer, since it accumulates two
            gradients.
        num_warps: as Triton has it.
    """

    own: int
    keys: int
    queries: int
    num_warps: int


@dataclass(frozen=True)
class _Problem:
    """Sizes and options of one call, and what its passes launch."""

    num_rows: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_key_heads: int
    head_size: int
    window: int
    block_size: int
    scale: float
    dot_dtype: torch.dtype
    has_blocks: bool

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        window: int,
        block_size: int,
        scale: float,
    ) -> "_Problem":
        dot_dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        if dot_dtype not in _DTYPES:
            raise ValueError(
                f"the Triton kernels have no {dot_dtype}, got q {q.dtype}, k {k.dtype}, v {v.dtype}"
            )
        last = (q.shape[1] if start is None else k.shape[1]) - 1
        return cls(
            *q.shape[:2],
            k.shape[1],
            q.shape[2],
            k.shape[2],
            q.shape[3],
            window,
            block_size,
            scale,
            dot_dtype,
            has_blocks=last >= window,
        )

    @property
    def num_tiles(self) -> int:
        return triton.cdiv(self.num_queries, TILE)

    @property
    def num_blocks(self) -> int:
        return triton.cdiv(self.num_keys, self.block_size)

    @property
    def num_owners(self) -> int:
        return self.num_rows * self.num_key_heads

    @property
    def num_splits(self) -> int:
        """Programs that a block's gradient is shared by at most."""
        return max(1, min(_SPLIT_OWNERS // max(1, self.num_owners), triton.cdiv(self.num_tiles, _PIECE)))

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.head_size))

    @property
    def sizes(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "GROUP": self.num_heads // self.num_key_heads,
            "HEAD_SIZE": self.head_size,
            "BLOCK_D": self.block_d,
            "DOT": _DTYPES[self.dot_dtype],
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",  # of fp32 inputs only
        }

    @property
    def tiling(self) -> _Tiling:
        """Sizes that keep a kernel's matrices in its registers."""
        if self.dot_dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
            return _Tiling(own=16, keys=16, queries=16, num_warps=8)  # outside the tensor cores
        row_bytes = self.block_d * self.dot_dtype.itemsize
        if row_bytes <= 128:
            return _Tiling(own=64, keys=64, queries=32, num_warps=4)
        if row_bytes <= 256:
            return _Tiling(own=64, keys=32, queries=16, num_warps=4)
        return _Tiling(own=32, keys=16, queries=16, num_warps=4)

    def for_queries(self) -> dict[str, Any]:
        """Sizes of the kernels that own queries and go through keys."""
        tiling = self.tiling
        return self.sizes | {
            "NUM_HEADS": self.num_heads,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_I": tiling.own,
            "BLOCK_N": tiling.keys,
            "BLOCK_B": self.block_part(tiling.keys),
            "num_warps": tiling.num_warps,
            "num_stages": _STAGES,
        }

    def block_part(self, keys: int) -> int:
        """Keys of a block that are worked on at once where at most `keys` are."""
        return min(keys, max(16, triton.next_power_of_2(self.block_size)))

    def plan(self, blocks: Tensor, start: Tensor | None) -> _Plan:
        """List the blocks of every tile."""
        if not self.has_blocks:
            return _Plan(None, None, None)
        num_selected = blocks.shape[3]
        width = min(TILE * num_selected + 1, self.num_blocks) + 1
        shape = (self.num_rows, self.num_tiles, self.num_key_heads)
        ids = torch.empty(*shape, width, dtype=torch.int32, device=blocks.device)
        bits = torch.empty(*shape, width, dtype=torch.int64, device=blocks.device)
        counts = torch.empty(*shape, 2, dtype=torch.int32, device=blocks.device)
        num_pairs = triton.next_power_of_2(TILE * max(1, num_selected))
        attention_kernels.plan_kernel[(self.num_owners * self.num_tiles,)](
            blocks,
            start,
            ids,
            bits,
            counts,
            self.num_queries,
            self.num_tiles,
            self.window,
            width,
            *blocks.stride(),
            NUM_KEY_HEADS=self.num_key_heads,
            NUM_SELECTED=num_selected,
            BLOCK_SIZE=self.block_size,
            X=num_pairs,
            num_warps=4 if num_pairs <= 1024 else 8,
        )
        return _Plan(ids, bits, counts)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, plan: _Plan, mass: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output in the dtype of q, log-sum-exp in base 2 [B, Lq, Hq], share of each part [B, Lq, Hq, 3] or None."""
        q, k, v = _with_whole_rows(q, k, v)
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        shares = torch.empty(*q.shape[:3], 3, dtype=torch.float32, device=q.device) if mass else None
        sizes = self.for_queries()
        num_tiles = self.num_tiles * (TILE // sizes["BLOCK_I"])
        attention_kernels.forward_kernel[(self.num_rows * num_tiles * self.num_heads,)](
            q,
            k,
            v,
            start,
            *plan,
            y,
            log_sum,
            shares,
            self.num_queries,
            self.num_tiles,
            self.window,
            _width(plan),
            self.scale * _LOG2_E,
            *_strides(q, k, v),
            **sizes,
        )
        return y, log_sum, shares

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, start: Tensor | None, mass: bool
    ) -> AttentionOutput:
        """One query per row, no gradients. Two launches; only the window and the listed blocks are read."""
        q, k, v = _with_whole_rows(q, k, v)
        num_selected, group = blocks.shape[3], self.num_heads // self.num_key_heads
        tiling = self.tiling
        window_steps = triton.cdiv(min(self.window, self.num_keys), tiling.keys)
        num_steps = window_steps
        if self.has_blocks:
            num_steps += (num_selected + 1) * triton.cdiv(self.block_size, tiling.keys)
        num_splits = max(
            1, min(_DECODE_PROGRAMS // max(1, self.num_owners), triton.cdiv(num_steps, 2), _MAX_SPLITS)
        )
        steps_per_split = triton.cdiv(num_steps, num_splits)
        num_splits = triton.cdiv(num_steps, steps_per_split)

        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        shares = torch.empty(*q.shape[:3], 3, dtype=torch.float32, device=q.device) if mass else None
        parts = torch.empty(
            self.num_owners * num_splits * group, self.head_size + 4, dtype=torch.float32, device=q.device
        ).flatten()
        acc, top, sums = parts.split(
            [parts.numel() // (self.head_size + 4) * n for n in (self.head_size, 1, 3)]
        )
        attention_kernels.decode_kernel[(self.num_owners * num_splits,)](
            q,
            k,
            v,
            blocks,
            start,
            acc,
            top,
            sums,
            self.window,
            window_steps,
            num_steps,
            steps_per_split,
            num_splits,
            self.scale * _LOG2_E,
            q.stride(0),
            q.stride(2),
            *_strides(k, v),
            blocks.stride(0),
            blocks.stride(2),
            blocks.stride(3),
            NUM_KEY_HEADS=self.num_key_heads,
            BLOCK_SIZE=self.block_size,
            NUM_SELECTED=num_selected,
            BLOCK_K=max(2, triton.next_power_of_2(num_selected)),
            BLOCK_N=tiling.keys,
            BLOCK_Q=max(16, triton.next_power_of_2(group)),
            num_warps=4,
            num_stages=_STAGES,
            **self.sizes,
        )
        attention_kernels.combine_kernel[(self.num_rows * self.num_heads,)](
            acc,
            top,
            sums,
            y,
            shares,
            num_splits,
            GROUP=group,
            HEAD_SIZE=self.head_size,
            BLOCK_D=self.block_d,
            BLOCK_S=max(2, triton.next_power_of_2(num_splits)),
            num_warps=4,
        )
        return AttentionOutput(y, shares)

    def backward(
        self,
        d_y: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        plan: _Plan,
        y: Tensor,
        log_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their dtypes."""
        q, k, v = _with_whole_rows(q, k, v)
        d_y = d_y.contiguous()
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(log_sum)
        scale_log2, strides, width = self.scale * _LOG2_E, _strides(q, k, v), _width(plan)
        sizes = self.for_queries()
        num_tiles = self.num_tiles * (TILE // sizes["BLOCK_I"])
        gradient_kernels.query_kernel[(self.num_rows * num_tiles * self.num_heads,)](
            q,
            k,
            v,
            start,
            *plan,
            y,
            d_y,
            log_sum,
            delta,
            d_q,
            self.num_queries,
            self.num_tiles,
            self.window,
            width,
            self.scale,
            scale_log2,
            *strides,
            **sizes,
        )

        tiling = self.tiling
        sizes = self.sizes | {
            "NUM_HEADS": self.num_heads,
            "BLOCK_I": tiling.queries,
            "num_warps": tiling.num_warps,
            "num_stages": _STAGES,
        }
        num_slices = triton.cdiv(self.num_keys, tiling.own)
        # Parts: what a key gets as one of the window, then what it gets as one of a block.
        padded = self.num_blocks * self.block_size
        shape = (1 + self.num_splits, self.num_rows, self.num_key_heads, padded, self.head_size)
        if plan.ids is None:
            d_k_window, d_v_window = d_k.transpose(1, 2), d_v.transpose(1, 2)
        else:
            d_k_parts, d_v_parts = (
                torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2)
            )
            d_k_window, d_v_window = d_k_parts[0], d_v_parts[0]
        gradient_kernels.key_kernel[(num_slices * self.num_owners,)](
            q,
            k,
            v,
            start,
            d_y,
            log_sum,
            delta,
            d_k_window,
            d_v_window,
            self.num_queries,
            self.num_keys,
            self.window,
            self.num_owners,
            self.scale,
            scale_log2,
            *strides,
            d_k_window.stride(0),
            d_k_window.stride(2),
            d_k_window.stride(1),
            BLOCK_N=tiling.own,
            **sizes,
        )
        if plan.ids is None:
            return d_q, d_k, d_v

        order, bounds = self.invert(plan)
        block_part = self.block_part(tiling.own)
        num_parts = triton.cdiv(self.block_size, block_part)
        gradient_kernels.block_kernel[(self.num_blocks * self.num_splits * num_parts * self.num_owners,)](
            q,
            k,
            v,
            start,
            order,
            bounds,
            plan.bits,
            d_y,
            log_sum,
            delta,
            d_k_parts[1:],
            d_v_parts[1:],
            self.num_queries,
            self.num_tiles,
            self.num_blocks,
            self.window,
            width,
            self.num_splits,
            self.num_owners,
            self.scale,
            scale_log2,
            *strides,
            BLOCK_B=block_part,
            TILE_PARTS=TILE // tiling.queries,
            BLOCK_SIZE=self.block_size,
            PIECE=_PIECE,
            **sizes,
        )
        gradient_kernels.sum_kernel[(triton.cdiv(self.num_keys, _SUMMED) * self.num_owners,)](
            bounds,
            d_k_parts,
            d_v_parts,
            d_k,
            d_v,
            self.num_keys,
            self.num_blocks,
            self.num_splits,
            self.num_owners,
            NUM_KEY_HEADS=self.num_key_heads,
            HEAD_SIZE=self.head_size,
            BLOCK_SIZE=self.block_size,
            BLOCK_D=self.block_d,
            BLOCK_N=_SUMMED,
            PIECE=_PIECE,
            num_warps=4,
        )
        return d_q, d_k, d_v

    def invert(self, plan: _Plan) -> tuple[Tensor, Tensor]:
        """The plan by blocks: (entries of all lists, by row, key-value head and block; where those of each begin)."""
        assert plan.ids is not None and plan.counts is not None
        device = plan.ids.device
        num_targets = self.num_owners * self.num_blocks
        row = torch.arange(self.num_rows, device=device, dtype=torch.int32)[:, None, None, None]
        head = torch.arange(self.num_key_heads, device=device, dtype=torch.int32)[:, None]
        target = (row * self.num_key_heads + head) * self.num_blocks + plan.ids
        is_entry = torch.arange(plan.ids.shape[3], device=device) < plan.counts[..., :1]
        target, order = target.masked_fill_(~is_entry, num_targets).flatten().sort(stable=True)
        every = torch.arange(num_targets + 1, device=device, dtype=torch.int32)
        return order, torch.searchsorted(target, every)


_LOG2_E = 1.4426950408889634


def _width(plan: _Plan) -> int:
    return 0 if plan.ids is None else plan.ids.shape[3]


def _with_whole_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors with contiguous channels, which the kernels need."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]
