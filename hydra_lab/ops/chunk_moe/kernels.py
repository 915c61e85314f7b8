# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# (the kernels cannot be typed, nor can their calls)
"""The mixture of experts on Triton's kernels: tiles of tokens that share an expert, read where they lie.

Only the (chunk, rank) *pairs* are put in order of their experts, a few hundred integers; tokens are neither copied nor
padded to a capacity. A pair has T rows, one per token of its chunk, and what lies between the matrix products is stored
in that order: the rows of an expert are consecutive, those of a pair begin at `place[pair] * T`.

Shape suffixes:

    B rows      L positions    C chunks              K experts per chunk   T tokens per chunk
    E experts   D hidden size  F expert hidden size  P = B * C * K pairs   R = P * T rows
    M, N block of rows and of columns; S block of the dimension that is summed over
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hydra_lab.ops.chunk_moe import expert_kernels

MAX_CHUNK_SIZE = 128
"""A program of `down` holds a whole chunk."""

SORT_BLOCK = 1024
ROWS_BLOCK = 256


def chunk_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    chunk_size: int,
    offset: Tensor,
    length: Tensor,
) -> Tensor:
    """See `hydra_lab.ops.chunk_moe.chunk_moe`.

    The products are computed in the dtype of autocast where that is on, else in the dtype of `x`; gradients have the
    dtype of what they belong to, and those of fp32 parameters are not rounded on the way.

    Raises:
        ValueError: `chunk_size` is above 128, or a dtype is none of float32, bfloat16 and float16.
    """
    if chunk_size > MAX_CHUNK_SIZE:
        raise ValueError(f"backend 'triton' has chunks of at most {MAX_CHUNK_SIZE} tokens, got {chunk_size}")
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    floats = {"x": x, "weights": weights, "w_gate_up": w_gate_up, "w_down": w_down}
    for name, tensor in floats.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"backend 'triton' has no {tensor.dtype}, which is the dtype of {name}")
    if x.shape[1] == 1:  # the token is in the first chunk: group the rows' tokens as chunks of one token
        chunk_size, experts, offset = 1, experts[:, :1], torch.zeros_like(offset)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats.values())
    return _ChunkMoE.apply(
        x, weights, w_gate_up, w_down, experts, offset, length, chunk_size, compute, trains
    )


class _Blocks(NamedTuple):
    """Tile of a matrix product, and how it runs: M x N results per program, S summands at a time."""

    m: int
    n: int
    s: int
    warps: int
    stages: int

    def fitted(self, columns: int, summands: int, m: int | None = None) -> "_Blocks":
        """These blocks, no wider than a problem of that size needs."""
        block_m = self.m if m is None else min(self.m, m)
        return _Blocks(
            block_m,
            min(self.n, _power_of_two(columns)),
            min(self.s, _power_of_two(summands)),
            self.warps if block_m >= self.m else min(self.warps, 4),
            self.stages,
        )


# Half precision, for Hopper. What bounds a product of tiles there is the way from the L2 cache: a 64 x 256 tile does 52
# operations per byte that it reads, a 128 x 256 tile 87. So two chunks of 64 tokens share a program wherever the
# order of the pairs is free; `down` and `input_gradient`, whose programs own the tokens of one chunk, cannot.
_GROUPED = _Blocks(m=128, n=128, s=64, warps=8, stages=3)  # two accumulators, which are 256 columns together
_GROUPED_WIDE = _Blocks(m=128, n=256, s=64, warps=8, stages=3)
_PER_CHUNK = _Blocks(m=64, n=256, s=64, warps=4, stages=6)
_PER_WEIGHT = _Blocks(m=128, n=256, s=64, warps=8, stages=6)
# fp32 outside the tensor cores ("ieee"): small tiles, or the registers do not hold them.
_SINGLE_GROUPED = _Blocks(m=32, n=32, s=32, warps=4, stages=2)
_SINGLE = _Blocks(m=64, n=64, s=32, warps=4, stages=2)


def _power_of_two(size: int) -> int:
    """Smallest block for `size` entries that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


class _Order(NamedTuple):
    """The pairs by expert; int32.

    Attributes:
        order: [P] pairs, ascending by expert; only the first begin[E] entries are written: pairs with a token.
        place: [P] where a pair stands in `order`; written for the same pairs.
        begin: [E + 1] where each expert's pairs begin in `order`, and where the last one's end.
    """

    order: Tensor
    place: Tensor
    begin: Tensor


class _ChunkMoE(torch.autograd.Function):
    """Saves x, g and u [R, F]; what follows from them (w silu(g) u, [R, F]) is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        experts: Tensor,
        offset: Tensor,
        length: Tensor,
        chunk_size: int,
        compute: torch.dtype,
        trains: bool,
    ) -> Tensor:
        shape, out_dtype = _Shape.of(x, experts, w_gate_up, chunk_size), x.dtype
        ctx.dtypes = [tensor.dtype for tensor in (x, weights, w_gate_up, w_down)]
        x, w_gate_up, w_down = (tensor.to(compute).contiguous() for tensor in (x, w_gate_up, w_down))
        weights, experts = weights.contiguous(), experts.contiguous()
        offset, length = offset.contiguous(), length.contiguous()

        order = _sort_pairs(shape, experts, offset, length)
        rows = shape.pairs * shape.T
        token_R = experts.new_empty(rows)
        weight_R = x.new_empty(rows, dtype=torch.float32)
        expert_kernels.list_rows[(triton.cdiv(rows, ROWS_BLOCK),)](
            order.order, order.begin, offset, length, weights, token_R, weight_R,
            shape.L, shape.C, shape.E, shape.K, shape.T, BLOCK=ROWS_BLOCK, num_warps=4,
        )  # fmt: skip
        activation_RF = x.new_empty(rows, shape.F)
        gate_up_R2F = x.new_empty(rows if trains else 0, 2 * shape.F)
        blocks = shape.grouped(_GROUPED, compute, columns=shape.F, summands=shape.D)
        expert_kernels.gate_up[(shape.num_tiles(blocks.m) * triton.cdiv(shape.F, blocks.n),)](
            x, w_gate_up, order.begin, token_R, weight_R, activation_RF, gate_up_R2F,
            shape.T, shape.D, shape.F, shape.E, E_BLOCK=_power_of_two(shape.E), SAVE=trains, **_options(blocks),
        )  # fmt: skip

        y = x.new_empty(shape.B, shape.L, shape.D, dtype=out_dtype)
        blocks = shape.per_chunk(compute, columns=shape.D, summands=shape.F)
        expert_kernels.down[(shape.num_cells * triton.cdiv(shape.D, blocks.n),)](
            activation_RF, w_down, experts, order.place, offset, length, y,
            shape.L, shape.C, shape.num_cells // shape.B, shape.K, shape.T, shape.D, shape.F, **_options(blocks),
        )  # fmt: skip
        if trains:
            ctx.save_for_backward(
                x, w_gate_up, w_down, experts, offset, length, *order, gate_up_R2F, token_R, weight_R
            )
            ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, w_gate_up, w_down, experts, offset, length, *saved = ctx.saved_tensors
        order, (gate_up_R2F, token_R, weight_R) = _Order(*saved[:3]), saved[3:]
        shape: _Shape = ctx.shape
        x_dtype, weights_dtype, gate_up_dtype, down_dtype = ctx.dtypes
        compute, rows = x.dtype, shape.pairs * shape.T
        grad_y = grad_y.to(compute).contiguous()

        product_RF = x.new_empty(rows, shape.F)
        blocks = shape.grouped(_GROUPED_WIDE, compute, columns=shape.F, summands=shape.D)
        expert_kernels.activation_gradient[(shape.num_tiles(blocks.m) * triton.cdiv(shape.F, blocks.n),)](
            grad_y, w_down, order.begin, token_R, product_RF,
            shape.T, shape.D, shape.F, shape.E, E_BLOCK=_power_of_two(shape.E), **_options(blocks),
        )  # fmt: skip
        grad_gate_up_R2F = torch.empty_like(gate_up_R2F)
        grad_weights = x.new_zeros(shape.B, shape.L, shape.K, dtype=weights_dtype)
        columns = min(1024, _power_of_two(shape.F))
        rows_together = 2048 // columns
        expert_kernels.swiglu_gradient[(triton.cdiv(rows, rows_together),)](
            gate_up_R2F, product_RF, weight_R, token_R, order.order, order.begin, grad_gate_up_R2F, grad_weights,
            shape.K, shape.T, shape.F, shape.E, ROWS=rows_together, N=columns, num_warps=4,
        )  # fmt: skip
        activation_RF = product_RF  # that is what the kernel left there

        grad_x = grad_w_gate_up = grad_w_down = None
        if ctx.needs_input_grad[0]:
            grad_x = x.new_empty(shape.B, shape.L, shape.D, dtype=x_dtype)
            blocks = shape.per_chunk(compute, columns=shape.D, summands=2 * shape.F)
            expert_kernels.input_gradient[(shape.num_cells * triton.cdiv(shape.D, blocks.n),)](
                grad_gate_up_R2F, w_gate_up, experts, order.place, offset, length, grad_x,
                shape.L, shape.C, shape.num_cells // shape.B, shape.K, shape.T, shape.D, 2 * shape.F,
                **_options(blocks),
            )  # fmt: skip
        if ctx.needs_input_grad[2]:
            grad_w_gate_up = torch.empty_like(w_gate_up, dtype=gate_up_dtype)
            _weight_gradient(shape, grad_gate_up_R2F, x, order, token_R, grad_w_gate_up, left_by_token=False)
        if ctx.needs_input_grad[3]:
            grad_w_down = torch.empty_like(w_down, dtype=down_dtype)
            _weight_gradient(shape, grad_y, activation_RF, order, token_R, grad_w_down, left_by_token=True)
        return (grad_x, grad_weights, grad_w_gate_up, grad_w_down, *[None] * 6)


class _Shape(NamedTuple):
    """Sizes of a problem."""

    B: int
    L: int
    C: int
    K: int
    T: int
    D: int
    F: int
    E: int

    @classmethod
    def of(cls, x: Tensor, experts: Tensor, w_gate_up: Tensor, chunk_size: int) -> "_Shape":
        return cls(
            *x.shape[:2],
            *experts.shape[1:],
            chunk_size,
            x.shape[2],
            w_gate_up.shape[1] // 2,
            w_gate_up.shape[0],
        )

    @property
    def pairs(self) -> int:
        return self.B * self.C * self.K

    @property
    def num_cells(self) -> int:
        """Chunks that positions of the rows may fall into, whatever the offsets."""
        return self.B * triton.cdiv(self.L + self.T - 1, self.T)

    def num_tiles(self, block: int) -> int:
        """Most tiles of `block` rows: every expert that has rows may end in a tile that is not full."""
        return self.pairs * self.T // block + min(self.E, self.pairs)

    def grouped(self, blocks: _Blocks, dtype: torch.dtype, columns: int, summands: int) -> _Blocks:
        """Blocks of a kernel whose rows are those of an expert, as large as the share of an expert is."""
        share = _power_of_two(triton.cdiv(self.B * self.L * self.K, self.E))
        return (_SINGLE_GROUPED if dtype == torch.float32 else blocks).fitted(columns, summands, m=share)

    def per_chunk(self, dtype: torch.dtype, columns: int, summands: int) -> _Blocks:
        """Blocks of a kernel whose rows are the tokens of a chunk."""
        blocks = _SINGLE if dtype == torch.float32 else _PER_CHUNK
        block_m = _power_of_two(self.T)
        if block_m > blocks.m:
            blocks = blocks._replace(n=blocks.n // 2)
        return blocks._replace(m=block_m).fitted(columns, summands)


def _options(blocks: _Blocks) -> dict[str, Any]:
    """What every matrix product is launched with."""
    return {
        "M": blocks.m,
        "N": blocks.n,
        "S": blocks.s,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",  # fp32 inputs only
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _sort_pairs(shape: _Shape, experts: Tensor, offset: Tensor, length: Tensor) -> _Order:
    order, place = (experts.new_empty(shape.pairs, dtype=torch.int32) for _ in range(2))
    begin = experts.new_empty(shape.E + 1, dtype=torch.int32)
    expert_kernels.sort_pairs[(shape.E,)](
        experts, offset, length, order, place, begin, shape.pairs, shape.C, shape.E, shape.K, shape.T,
        BLOCK=min(SORT_BLOCK, _power_of_two(shape.pairs)), num_warps=4,
    )  # fmt: skip
    return _Order(order, place, begin)


def _weight_gradient(
    shape: _Shape,
    left: Tensor,
    right: Tensor,
    order: _Order,
    token_R: Tensor,
    out: Tensor,
    left_by_token: bool,
) -> None:
    """out[e] = sum over the rows of e of left^T right; one of them is [.., rows], the other [.., tokens]."""
    num_left, num_right = out.shape[1:]
    blocks = _SINGLE if left.dtype == torch.float32 else _PER_WEIGHT
    blocks = blocks.fitted(num_right, blocks.s)
    blocks = blocks._replace(m=min(blocks.m, _power_of_two(num_left)))
    grid = (shape.E * triton.cdiv(num_left, blocks.m) * triton.cdiv(num_right, blocks.n),)
    expert_kernels.weight_gradient[grid](
        left, right, order.begin, token_R, out, shape.T, num_left, num_right,
        LEFT_BY_TOKEN=left_by_token, **_options(blocks),
    )  # fmt: skip
