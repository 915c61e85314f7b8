# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false
# (what `triton.jit` turns into kernels cannot be typed)
"""The kernels that `hydra_lab.ops.chunk_moe.kernels` launches.

| kernel                | one program                                    | writes                                    |
|-----------------------|------------------------------------------------|-------------------------------------------|
| `sort_pairs`          | an expert                                      | order, place, begin                       |
| `list_rows`           | rows                                           | token and weight of each row              |
| `gate_up`             | rows of one expert x columns of F              | `w silu(g) u`; for the backward pass g, u |
| `down`                | a chunk x columns of D, loops over its ranks   | y                                         |
| `activation_gradient` | rows of one expert x columns of F              | `w_down^T dy`                             |
| `swiglu_gradient`     | a few rows                                     | dg, du, d weights, `w silu(g) u` again    |
| `input_gradient`      | a chunk x columns of D, loops over its ranks   | dx                                        |
| `weight_gradient`     | a tile of one expert's matrix, loops over rows | d w_gate_up or d w_down                   |

Every element has one program that writes it: there are no atomic operations, and equal inputs give equal bits.

Shape suffixes:

    B rows      L positions    C chunks              K experts per chunk   T tokens per chunk
    E experts   D hidden size  F expert hidden size  P = B * C * K pairs   R = P * T rows
    M, N block of rows and of columns; S block of the dimension that is summed over
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_pairs", "C"])
def sort_pairs(
    experts_ptr, offset_ptr, length_ptr, order_ptr, place_ptr, begin_ptr,
    num_pairs, C, E, K: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stable sort of the pairs that have a token: each expert counts the pairs of those before it, then its own."""
    expert = tl.program_id(0)
    below = 0
    for first in range(0, num_pairs, BLOCK):
        _, chosen = _pairs(experts_ptr, offset_ptr, length_ptr, first, num_pairs, C, E, K, T, BLOCK)
        below += tl.sum((chosen < expert).to(tl.int32), axis=0)
    tl.store(begin_ptr + expert, below)
    for first in range(0, num_pairs, BLOCK):
        pair, chosen = _pairs(experts_ptr, offset_ptr, length_ptr, first, num_pairs, C, E, K, T, BLOCK)
        mine = (chosen == expert).to(tl.int32)
        position = below + tl.cumsum(mine, axis=0) - mine
        tl.store(order_ptr + position, pair, mask=mine > 0)
        tl.store(place_ptr + pair, position, mask=mine > 0)
        below += tl.sum(mine, axis=0)
    if expert == E - 1:
        tl.store(begin_ptr + E, below)


@triton.jit
def _pairs(
    experts_ptr, offset_ptr, length_ptr, first, num_pairs, C, E, K: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of pairs and their experts; E for a pair without a token."""
    pair = first + tl.arange(0, BLOCK)
    present = pair < num_pairs
    row = pair // K // C
    start = (pair // K % C) * T - tl.load(offset_ptr + row, mask=present, other=0)
    length = tl.load(length_ptr + row, mask=present, other=0)
    has_token = present & (start < length) & (length > 0)
    chosen = tl.load(experts_ptr + pair, mask=has_token, other=0)
    return pair, tl.where(has_token, chosen, E)


@triton.jit(do_not_specialize=["L", "C"])
def list_rows(
    order_ptr, begin_ptr, offset_ptr, length_ptr, weights_ptr, token_ptr, weight_ptr,
    L, C, E, K: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token of every row, -1 where the chunk's row has none, and the weight of the row's expert for it."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(begin_ptr + E) * T
    pair = tl.load(order_ptr + row // T, mask=inside, other=0)
    sequence = pair // K // C
    position = (pair // K % C) * T + row % T - tl.load(offset_ptr + sequence, mask=inside, other=0)
    valid = (position >= 0) & (position < tl.load(length_ptr + sequence, mask=inside, other=0))
    token = tl.where(valid, sequence.to(tl.int64) * L + position, -1)
    weight = tl.load(weights_ptr + token * K + pair % K, mask=valid, other=0.0)
    tl.store(token_ptr + row, token, mask=inside)
    tl.store(weight_ptr + row, weight, mask=inside)


@triton.jit
def _rows_of_tile(begin_ptr, tile, E, T: tl.constexpr, M: tl.constexpr, E_BLOCK: tl.constexpr):
    """Expert of a tile (E for a tile past the last one), its first row, and the end of the expert's rows."""
    e = tl.arange(0, E_BLOCK)
    begin = tl.load(begin_ptr + e, mask=e < E, other=0) * T
    stop = tl.load(begin_ptr + e + 1, mask=e < E, other=0) * T
    last_tile = tl.cumsum(tl.where(e < E, (stop - begin + M - 1) // M, 0), axis=0)
    earlier = (last_tile <= tile) & (e < E)
    expert = tl.sum(earlier.to(tl.int32), axis=0)
    tile_in_expert = tile - tl.max(tl.where(earlier, last_tile, 0), axis=0)
    first = tl.sum(tl.where(e == expert, begin, 0), axis=0) + tile_in_expert * M
    return expert, first, tl.sum(tl.where(e == expert, stop, 0), axis=0)


@triton.jit
def _both(mask, in_s, ALL: tl.constexpr):
    """Mask of a tile whose second axis is summed over; nothing to check there where ALL blocks are full."""
    if ALL:
        return mask
    else:
        return mask & in_s


@triton.jit
def gate_up(
    x_ptr, w_gate_up_ptr, begin_ptr, token_ptr, weight_ptr, activation_ptr, gate_up_ptr,
    T: tl.constexpr, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    E_BLOCK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """`weight * silu(g) * u`, with `[g; u] = w_gate_up[e] x`, for M rows of expert e and N columns.

    What is stored at rows without a token is never used.
    """
    COLUMN_TILES: tl.constexpr = (F + N - 1) // N
    column_tile = tl.program_id(0) % COLUMN_TILES
    expert, first, stop = _rows_of_tile(begin_ptr, tl.program_id(0) // COLUMN_TILES, E, T, M, E_BLOCK)
    if expert == E:
        return
    m = tl.arange(0, M)
    inside = first + m < stop
    token = tl.load(token_ptr + first + m, mask=inside, other=-1)
    valid = token >= 0
    if tl.sum(valid.to(tl.int32), axis=0) == 0:
        return

    column = column_tile * N + tl.arange(0, N)
    s = tl.arange(0, S)
    x_ptrs = x_ptr + tl.where(valid, token, 0)[:, None] * D + s[None, :]
    gate_ptrs = w_gate_up_ptr + expert.to(tl.int64) * (2 * F * D) + column[None, :] * D + s[:, None]
    gate = tl.zeros((M, N), dtype=tl.float32)
    up = tl.zeros((M, N), dtype=tl.float32)
    for first_s in range(0, D, S):
        in_s = s < D - first_s
        x = tl.load(x_ptrs, mask=_both(valid[:, None], in_s[None, :], D % S == 0), other=0.0)
        mask = _both(column[None, :] < F, in_s[:, None], D % S == 0)
        w_gate = tl.load(gate_ptrs, mask=mask, other=0.0)
        w_up = tl.load(gate_ptrs + F * D, mask=mask, other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
        x_ptrs += S
        gate_ptrs += S
    mask = inside[:, None] & (column[None, :] < F)
    # 64-bit arithmetic for the first row only: within the tile 32 bits do. What is stored first frees its registers:
    # in another order these accumulators spill.
    first_row = first.to(tl.int64)
    if SAVE:
        gate_up_ptrs = gate_up_ptr + first_row * (2 * F) + (m[:, None] * (2 * F) + column[None, :])
        tl.store(gate_up_ptrs, gate, mask=mask)
        tl.store(gate_up_ptrs + F, up, mask=mask)
    weight = tl.load(weight_ptr + first + m, mask=inside, other=0.0)
    activation = gate * tl.sigmoid(gate) * (up * weight[:, None])
    tl.store(activation_ptr + first_row * F + (m[:, None] * F + column[None, :]), activation, mask=mask)


@triton.jit
def _tokens_of_cell(offset_ptr, length_ptr, cell, cells_per_row, L, T: tl.constexpr, M: tl.constexpr):
    """The row and chunk of a cell, positions [M] in it, which of them the row has, and which hold a token."""
    sequence = cell // cells_per_row
    chunk = cell % cells_per_row
    i = tl.arange(0, M)
    position = chunk * T + i - tl.load(offset_ptr + sequence)
    inside = (i < T) & (position >= 0) & (position < L)
    return sequence, chunk, position, inside, inside & (position < tl.load(length_ptr + sequence))


@triton.jit(do_not_specialize=["L", "C", "cells_per_row"])
def down(
    activation_ptr, w_down_ptr, experts_ptr, place_ptr, offset_ptr, length_ptr, y_ptr,
    L, C, cells_per_row, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y = sum over ranks of w_down[e] (weighted activation)` for the tokens of a chunk and N columns.

    The ranks are one sum of K * F terms: a loop per rank would drain the pipeline of loads at each of them.
    """
    COLUMN_TILES: tl.constexpr = (D + N - 1) // N
    S_TILES: tl.constexpr = (F + S - 1) // S
    column_tile = tl.program_id(0) % COLUMN_TILES
    cell = tl.program_id(0) // COLUMN_TILES
    sequence, chunk, position, inside, valid = _tokens_of_cell(
        offset_ptr, length_ptr, cell, cells_per_row, L, T, M
    )
    pair = (sequence * C + chunk) * K
    num_steps = tl.where(tl.sum(valid.to(tl.int32), axis=0) > 0, K * S_TILES, 0)
    i = tl.arange(0, M)
    column = column_tile * N + tl.arange(0, N)
    s = tl.arange(0, S)
    # Rows without a token hold anything, but a row of a product knows no other rows; those past T are of another pair.
    activation_ptrs = activation_ptr + i[:, None] * F + s[None, :]
    w_ptrs = w_down_ptr + column[None, :] * F + s[:, None]
    y = tl.zeros((M, N), dtype=tl.float32)
    for step in range(0, num_steps):
        rank = step // S_TILES
        first_s = step % S_TILES * S
        expert = tl.load(experts_ptr + pair + rank)
        first_row = tl.load(place_ptr + pair + rank).to(tl.int64) * T
        in_s = s < F - first_s
        activation = tl.load(
            activation_ptrs + (first_row * F + first_s),
            mask=_both(i[:, None] < T, in_s[None, :], F % S == 0), other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptrs + (expert * (D * F) + first_s),
            mask=_both(column[None, :] < D, in_s[:, None], F % S == 0), other=0.0,
        )  # fmt: skip
        y = tl.dot(activation, w, y, input_precision=PRECISION)
    y = tl.where(valid[:, None], y, 0.0)
    row = sequence.to(tl.int64) * L + position
    tl.store(y_ptr + row[:, None] * D + column[None, :], y, mask=inside[:, None] & (column[None, :] < D))


@triton.jit
def activation_gradient(
    grad_y_ptr, w_down_ptr, begin_ptr, token_ptr, product_ptr,
    T: tl.constexpr, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """`p = w_down[e]^T dy` for M rows of expert e and N columns of F."""
    COLUMN_TILES: tl.constexpr = (F + N - 1) // N
    column_tile = tl.program_id(0) % COLUMN_TILES
    expert, first, stop = _rows_of_tile(begin_ptr, tl.program_id(0) // COLUMN_TILES, E, T, M, E_BLOCK)
    if expert == E:
        return
    m = tl.arange(0, M)
    inside = first + m < stop
    token = tl.load(token_ptr + first + m, mask=inside, other=-1)
    valid = token >= 0
    if tl.sum(valid.to(tl.int32), axis=0) == 0:
        return

    column = column_tile * N + tl.arange(0, N)
    s = tl.arange(0, S)
    grad_y_ptrs = grad_y_ptr + tl.where(valid, token, 0)[:, None] * D + s[None, :]
    w_ptrs = w_down_ptr + expert.to(tl.int64) * (D * F) + s[:, None] * F + column[None, :]
    product = tl.zeros((M, N), dtype=tl.float32)
    for first_s in range(0, D, S):
        in_s = s < D - first_s
        grad_y = tl.load(grad_y_ptrs, mask=_both(valid[:, None], in_s[None, :], D % S == 0), other=0.0)
        w = tl.load(w_ptrs, mask=_both(column[None, :] < F, in_s[:, None], D % S == 0), other=0.0)
        product = tl.dot(grad_y, w, product, input_precision=PRECISION)
        grad_y_ptrs += S
        w_ptrs += S * F
    product_ptrs = product_ptr + first.to(tl.int64) * F + (m[:, None] * F + column[None, :])
    tl.store(product_ptrs, product, mask=inside[:, None] & (column[None, :] < F))


@triton.jit
def swiglu_gradient(
    gate_up_ptr, product_ptr, weight_ptr, token_ptr, order_ptr, begin_ptr,
    grad_gate_up_ptr, grad_weights_ptr,
    K: tl.constexpr, T: tl.constexpr, F: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """With `a = silu(g) u` and `p = w_down^T dy`, for some rows and all of F:

        dg = weight p u (s + g s (1 - s)), du = weight p g s, s = sigmoid(g);   d weight = sum of a p

    `weight a`, the factor of d w_down, takes the place of p.
    """
    first = tl.program_id(0) * ROWS
    stop = tl.load(begin_ptr + E) * T
    if first >= stop:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < stop
    token = tl.load(token_ptr + row, mask=inside, other=-1)
    rank = tl.load(order_ptr + row // T, mask=inside, other=0) % K
    weight = tl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
    row = row.to(tl.int64)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first_column in range(0, F, N):
        column = first_column + tl.arange(0, N)
        mask = inside[:, None] & (column[None, :] < F)
        at = row[:, None] * F + column[None, :]
        at_gate = row[:, None] * (2 * F) + column[None, :]
        gate = tl.load(gate_up_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at_gate + F, mask=mask, other=0.0).to(tl.float32)
        product = tl.load(product_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(silu * up * product, axis=1)
        product *= weight
        tl.store(product_ptr + at, silu * up * weight, mask=mask)
        tl.store(grad_gate_up_ptr + at_gate, product * up * (sigmoid + silu * (1 - sigmoid)), mask=mask)
        tl.store(grad_gate_up_ptr + at_gate + F, product * silu, mask=mask)
    tl.store(grad_weights_ptr + token * K + rank, total, mask=token >= 0)


@triton.jit(do_not_specialize=["L", "C", "cells_per_row"])
def input_gradient(
    grad_gate_up_ptr, w_gate_up_ptr, experts_ptr, place_ptr, offset_ptr, length_ptr, grad_x_ptr,
    L, C, cells_per_row, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dx = sum over ranks of w_gate_up[e]^T [dg; du]` for the tokens of a chunk and N columns of D; G = 2F."""
    COLUMN_TILES: tl.constexpr = (D + N - 1) // N
    S_TILES: tl.constexpr = (G + S - 1) // S
    column_tile = tl.program_id(0) % COLUMN_TILES
    cell = tl.program_id(0) // COLUMN_TILES
    sequence, chunk, position, inside, valid = _tokens_of_cell(
        offset_ptr, length_ptr, cell, cells_per_row, L, T, M
    )
    pair = (sequence * C + chunk) * K
    has_token = tl.sum(valid.to(tl.int32), axis=0) > 0
    i = tl.arange(0, M)
    token = sequence.to(tl.int64) * L + position
    column = column_tile * N + tl.arange(0, N)
    s = tl.arange(0, S)
    grad_ptrs = grad_gate_up_ptr + i[:, None] * G + s[None, :]
    w_ptrs = w_gate_up_ptr + s[:, None] * D + column[None, :]
    grad_x = tl.zeros((M, N), dtype=tl.float32)
    for step in range(0, tl.where(has_token, K * S_TILES, 0)):
        rank = step // S_TILES
        first_s = step % S_TILES * S
        expert = tl.load(experts_ptr + pair + rank)
        first_row = tl.load(place_ptr + pair + rank).to(tl.int64) * T
        in_s = s < G - first_s
        grad = tl.load(
            grad_ptrs + (first_row * G + first_s),
            mask=_both(i[:, None] < T, in_s[None, :], G % S == 0), other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptrs + (expert * (D * G) + first_s * D),
            mask=_both(column[None, :] < D, in_s[:, None], G % S == 0), other=0.0,
        )  # fmt: skip
        grad_x = tl.dot(grad, w, grad_x, input_precision=PRECISION)
    grad_x = tl.where(valid[:, None], grad_x, 0.0)
    grad_x_ptrs = grad_x_ptr + token[:, None] * D + column[None, :]
    tl.store(grad_x_ptrs, grad_x, mask=inside[:, None] & (column[None, :] < D))


@triton.jit
def weight_gradient(
    left_ptr, right_ptr, begin_ptr, token_ptr, out_ptr,
    T: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LEFT_BY_TOKEN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[e] = sum over the rows of e of left^T right`: a tile of a matrix [LEFT, RIGHT], 0 where e has no rows.

    One of the factors is stored by row, the other by token.
    """
    LEFT_TILES: tl.constexpr = (LEFT + M - 1) // M
    RIGHT_TILES: tl.constexpr = (RIGHT + N - 1) // N
    m = tl.program_id(0) // RIGHT_TILES % LEFT_TILES * M + tl.arange(0, M)
    n = tl.program_id(0) % RIGHT_TILES * N + tl.arange(0, N)
    expert = tl.program_id(0) // (LEFT_TILES * RIGHT_TILES)
    first = tl.load(begin_ptr + expert) * T
    stop = tl.load(begin_ptr + expert + 1) * T
    s = tl.arange(0, S)
    out = tl.zeros((M, N), dtype=tl.float32)
    for first_s in range(first, stop, S):
        row = first_s + s
        token = tl.load(token_ptr + row, mask=row < stop, other=-1)
        valid = token >= 0
        left_row, right_row = row.to(tl.int64), token
        if LEFT_BY_TOKEN:
            left_row, right_row = right_row, left_row
        left_ptrs = left_ptr + left_row[:, None] * LEFT + m[None, :]
        right_ptrs = right_ptr + right_row[:, None] * RIGHT + n[None, :]
        left = tl.load(left_ptrs, mask=valid[:, None] & (m[None, :] < LEFT), other=0.0)
        right = tl.load(right_ptrs, mask=valid[:, None] & (n[None, :] < RIGHT), other=0.0)
        out = tl.dot(tl.trans(left), right, out, input_precision=PRECISION)
    at = (expert.to(tl.int64) * LEFT + m[:, None]) * RIGHT + n[None, :]
    tl.store(out_ptr + at, out, mask=(m[:, None] < LEFT) & (n[None, :] < RIGHT))
