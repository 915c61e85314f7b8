# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (what `triton.jit` turns into kernels cannot be typed)
"""The recurrence within chunks: matrix products over tiles of at most 64 positions, forward and backward.

Shape suffixes: B rows, L positions, C tiles, H heads, G groups, S parts of a group's heads, P head dimension, N state
dimension, T positions of one tile (i reading, j written), K blocks of a state; of what these kernels write for each
other, the last axis is padded to a power of two.

One program takes one tile and a part of a group's heads, in turn: the products C_i . B_j, or the sum of their
gradients, stay in registers over those heads. `s` is the running sum of log decays within the tile in units of log 2,
as a pair of float32 numbers.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))

LEAST_LOG_DECAY = tl.constexpr(-1e6)
"""A decay below this forgets everything; the bound lets -inf mean the same."""

GEOMETRY = [
    "length",
    "chunk_size",
    "tile_size",
    "tiles_per_chunk",
    "num_tiles",
    "heads_per_part",
    "num_parts",
]
"""Sizes that change from call to call: no kernel is compiled anew for them."""


@triton.jit
def _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk):
    """First position of a tile and its number of positions, 0 or less where the tile lies past the end."""
    chunk = tile // tiles_per_chunk
    first = chunk * chunk_size + (tile % tiles_per_chunk) * tile_size
    end = tl.minimum((chunk + 1) * chunk_size, length)
    return first, tl.minimum(end - first, tile_size).to(tl.int32)


@triton.jit
def _part_of_heads(num_heads, num_groups, heads_per_part, num_parts):
    """Group, first head and number of heads of this program; its second id counts parts within groups."""
    pid = tl.program_id(1).to(tl.int64)
    group = pid // num_parts
    heads_per_group = num_heads // num_groups
    first = (pid % num_parts) * heads_per_part
    count = tl.minimum(heads_per_part, heads_per_group - first)
    return group, group * heads_per_group + first, count.to(tl.int32)


@triton.jit
def _load(base, rows, columns, row_stride, num_rows, num_columns):
    """[rows, columns] of a matrix whose columns lie side by side; zero outside of it."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, columns, row_stride, num_rows, num_columns, values):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], values, mask=inside)


@triton.jit(do_not_specialize=GEOMETRY)
def decay_sums_kernel(
    dt_ptr,
    A_ptr,
    log_decay_ptr,  # None for dt A
    high_ptr,
    low_ptr,
    step_ptr,
    kept_ptr,
    dt_row,
    dt_position,
    dt_head,
    log_decay_row,
    log_decay_position,
    log_decay_head,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    num_heads: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
):
    """Running sums `s` of log decays [B, C, H, T], step sizes in the same layout, and 2^s over each tile [B, C, H].

    Summed in float64: `s` may reach thousands, and what counts is the difference of neighbours.
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    t = tl.arange(0, T)
    head = tl.program_id(1).to(tl.int64) * H + tl.arange(0, H)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    position = first + t
    inside = (t < count)[:, None] & (head < num_heads)[None, :]
    dt_at = row * dt_row + position[:, None] * dt_position + head[None, :] * dt_head
    step = tl.load(dt_ptr + dt_at, mask=inside, other=0.0).to(tl.float32)
    if log_decay_ptr is None:
        rate = tl.load(A_ptr + head, mask=head < num_heads, other=0.0).to(tl.float64)
        log_decay = step.to(tl.float64) * rate[None, :]
    else:
        given_at = (
            row * log_decay_row + position[:, None] * log_decay_position + head[None, :] * log_decay_head
        )
        log_decay = tl.load(log_decay_ptr + given_at, mask=inside, other=0.0).to(tl.float64)
    log_decay = tl.where(log_decay < LEAST_LOG_DECAY, LEAST_LOG_DECAY, log_decay) * LOG2_E
    sums = tl.cumsum(log_decay, axis=0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    at = (row_tile * num_heads + head)[None, :] * T + t[:, None]
    written = (head < num_heads)[None, :] & (t < T)[:, None]
    tl.store(high_ptr + at, high, mask=written)
    tl.store(low_ptr + at, low, mask=written)
    tl.store(step_ptr + at, step, mask=written)
    kept = tl.exp2(tl.sum(log_decay, axis=0).to(tl.float32))
    tl.store(kept_ptr + row_tile * num_heads + head, kept, mask=head < num_heads)


@triton.jit(do_not_specialize=GEOMETRY)
def tile_states_kernel(
    x_ptr,
    B_ptr,
    high_ptr,
    low_ptr,
    step_ptr,
    states_ptr,
    x_row,
    x_position,
    x_head,
    B_row,
    B_position,
    B_group,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    from_start: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """What each tile adds to its heads' states, sum over t of w_t x_t B_t^T [B, C, H, P, N].

    w_t = 2^(s_T - s_t) dt_t. `from_start`: w_t = 2^(s_t), for the gradient of the entering state (x is dy, B is C).
    One program per (row and tile, head, block of the state).
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    head = tl.program_id(1).to(tl.int64)
    group = head // (num_heads // num_groups)
    n_blocks: tl.constexpr = (state_dim + N - 1) // N
    block = tl.program_id(2)
    t = tl.arange(0, T)
    p = (block // n_blocks) * P + tl.arange(0, P)
    n = (block % n_blocks) * N + tl.arange(0, N)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    sums_at = (row_tile * num_heads + head) * T
    high, low = tl.load(high_ptr + sums_at + t), tl.load(low_ptr + sums_at + t)
    if from_start:
        weight = tl.exp2(high + low)
    else:
        last_high, last_low = tl.load(high_ptr + sums_at + T - 1), tl.load(low_ptr + sums_at + T - 1)
        weight = tl.exp2((last_high - high) + (last_low - low)) * tl.load(step_ptr + sums_at + t)
    inside = (p < head_dim)[:, None] & (t < count)[None, :]
    x_at = row * x_row + head * x_head + (first + t)[None, :] * x_position + p[:, None]
    x_PT = tl.load(x_ptr + x_at, mask=inside, other=0.0)
    weighted_PT = (x_PT.to(tl.float32) * weight[None, :]).to(dtype)
    B_TN = _load(
        B_ptr + row * B_row + group * B_group + first * B_position, t, n, B_position, count, state_dim
    )
    state_PN = tl.dot(weighted_PT, B_TN.to(dtype), input_precision=precision)
    base = states_ptr + (row_tile * num_heads + head) * head_dim * state_dim
    _store(base, p, n, state_dim, head_dim, state_dim, state_PN)


@triton.jit(do_not_specialize=GEOMETRY)
def scan_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,  # None for no skip
    high_ptr,
    low_ptr,
    step_ptr,
    entering_ptr,
    y_ptr,
    x_row,
    x_position,
    x_head,
    B_row,
    B_position,
    B_group,
    C_row,
    C_position,
    C_group,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    heads_per_part,
    num_parts,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """y_i = 2^(s_i) h C_i + sum over j <= i of (C_i . B_j) 2^(s_i - s_j) dt_j x_j + D x_i.

    One program per (row and tile, part of a group's heads, block of the head dimension).
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    group, first_head, heads_here = _part_of_heads(num_heads, num_groups, heads_per_part, num_parts)
    n_blocks: tl.constexpr = (state_dim + N - 1) // N
    t = tl.arange(0, T)
    p = tl.program_id(2) * P + tl.arange(0, P)
    n = tl.arange(0, N)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    B_base = B_ptr + row * B_row + group * B_group + first * B_position
    C_base = C_ptr + row * C_row + group * C_group + first * C_position
    x_base = x_ptr + row * x_row + first * x_position
    y_base = y_ptr + (row * length + first) * num_heads * head_dim

    products_ij = tl.zeros((T, T), dtype=tl.float32)
    C_TN = tl.zeros(
        (T, N), dtype=dtype
    )  # what the last block leaves in it is used again where it is the only one
    for block in range(n_blocks):
        C_TN = _load(C_base, t, block * N + n, C_position, count, state_dim).to(dtype)
        B_TN = _load(B_base, t, block * N + n, B_position, count, state_dim).to(dtype)
        products_ij = tl.dot(C_TN, tl.trans(B_TN), products_ij, input_precision=precision)

    for index in range(heads_here):
        head = first_head + index
        sums_at = (row_tile * num_heads + head) * T
        high, low = tl.load(high_ptr + sums_at + t), tl.load(low_ptr + sums_at + t)
        step = tl.load(step_ptr + sums_at + t)
        entering_base = entering_ptr + (row_tile * num_heads + head) * head_dim * state_dim
        y_TP = tl.zeros((T, P), dtype=tl.float32)
        for block in range(n_blocks):
            h_PN = _load(entering_base, p, block * N + n, state_dim, head_dim, state_dim)
            if n_blocks > 1:
                C_TN = _load(C_base, t, block * N + n, C_position, count, state_dim).to(dtype)
            y_TP = tl.dot(C_TN, tl.trans(h_PN), y_TP, input_precision=precision)
        y_TP *= tl.exp2(high + low)[:, None]
        exponent_ij = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        # Above the diagonal the exponent may overflow; there it is never formed.
        decay_ij = tl.exp2(tl.where(t[:, None] >= t[None, :], exponent_ij, float("-inf")))
        scores_ij = (products_ij * decay_ij * step[None, :]).to(dtype)
        x_TP = _load(x_base + head * x_head, t, p, x_position, count, head_dim)
        y_TP = tl.dot(scores_ij, x_TP.to(dtype), y_TP, input_precision=precision)
        if D_ptr is not None:
            y_TP += tl.load(D_ptr + head).to(tl.float32) * x_TP.to(tl.float32)
        _store(y_base + head * head_dim, t, p, num_heads * head_dim, count, head_dim, y_TP)


@triton.jit(do_not_specialize=GEOMETRY)
def grad_inputs_kernel(
    x_ptr,
    grad_y_ptr,
    B_ptr,
    C_ptr,
    D_ptr,  # None for no skip
    high_ptr,
    low_ptr,
    step_ptr,
    grad_leaving_ptr,
    grad_x_ptr,
    grad_step_ptr,
    grad_to_end_ptr,
    x_row,
    x_position,
    x_head,
    B_row,
    B_position,
    B_group,
    C_row,
    C_position,
    C_group,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    heads_per_part,
    num_parts,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of x, of dt, and of the decays towards the tile's end, with g the gradient of the state that leaves it.

        d(dt x)_j = sum over i >= j of (C_i . B_j) 2^(s_i - s_j) dy_i + 2^(s_T - s_j) g B_j
        to_end_j  = 2^(s_T - s_j) dt_j x_j^T g B_j

    Pairs lie with j first, so that no product is transposed for the next. One program per (row and tile, part of a
    group's heads).
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    group, first_head, heads_here = _part_of_heads(num_heads, num_groups, heads_per_part, num_parts)
    n_blocks: tl.constexpr = (state_dim + N - 1) // N
    p_blocks: tl.constexpr = (head_dim + P - 1) // P
    t = tl.arange(0, T)
    n = tl.arange(0, N)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    B_base = B_ptr + row * B_row + group * B_group + first * B_position
    C_base = C_ptr + row * C_row + group * C_group + first * C_position
    x_base = x_ptr + row * x_row + first * x_position
    y_position: tl.constexpr = num_heads * head_dim
    y_at = (row * length + first) * y_position

    products_ji = tl.zeros((T, T), dtype=tl.float32)
    B_TN = tl.zeros(
        (T, N), dtype=dtype
    )  # what the last block leaves in it is used again where it is the only one
    for block in range(n_blocks):
        C_TN = _load(C_base, t, block * N + n, C_position, count, state_dim).to(dtype)
        B_TN = _load(B_base, t, block * N + n, B_position, count, state_dim).to(dtype)
        products_ji = tl.dot(B_TN, tl.trans(C_TN), products_ji, input_precision=precision)

    for index in range(heads_here):
        head = first_head + index
        sums_at = (row_tile * num_heads + head) * T
        high, low = tl.load(high_ptr + sums_at + t), tl.load(low_ptr + sums_at + t)
        step = tl.load(step_ptr + sums_at + t)
        last_high, last_low = tl.load(high_ptr + sums_at + T - 1), tl.load(low_ptr + sums_at + T - 1)
        to_end = tl.exp2((last_high - high) + (last_low - low))
        exponent_ji = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        decay_ji = tl.exp2(tl.where(t[None, :] >= t[:, None], exponent_ji, float("-inf")))
        scores_ji = (products_ji * decay_ji).to(dtype)
        grad_leaving_base = grad_leaving_ptr + (row_tile * num_heads + head) * head_dim * state_dim
        head_at = y_at + head * head_dim
        grad_step = tl.zeros((T,), dtype=tl.float32)
        grad_to_end = tl.zeros((T,), dtype=tl.float32)
        for p_block in range(p_blocks):
            p = p_block * P + tl.arange(0, P)
            x = _load(x_base + head * x_head, t, p, x_position, count, head_dim).to(tl.float32)
            grad_y_TP = _load(grad_y_ptr + head_at, t, p, y_position, count, head_dim)
            grad_TP = tl.zeros((T, P), dtype=tl.float32)
            for block in range(n_blocks):
                if n_blocks > 1:
                    B_TN = _load(B_base, t, block * N + n, B_position, count, state_dim).to(dtype)
                g_PN = _load(grad_leaving_base, p, block * N + n, state_dim, head_dim, state_dim)
                grad_TP = tl.dot(B_TN, tl.trans(g_PN), grad_TP, input_precision=precision)
            grad_TP *= to_end[:, None]
            grad_to_end += tl.sum(grad_TP * x, axis=1)
            grad_TP = tl.dot(scores_ji, grad_y_TP.to(dtype), grad_TP, input_precision=precision)
            grad_step += tl.sum(grad_TP * x, axis=1)
            grad_TP *= step[:, None]
            if D_ptr is not None:
                grad_TP += tl.load(D_ptr + head).to(tl.float32) * grad_y_TP.to(tl.float32)
            _store(grad_x_ptr + head_at, t, p, y_position, count, head_dim, grad_TP)
        tl.store(grad_step_ptr + sums_at + t, grad_step)
        tl.store(grad_to_end_ptr + sums_at + t, grad_to_end * step)


@triton.jit(do_not_specialize=GEOMETRY)
def grad_pairs_kernel(
    x_ptr,
    grad_y_ptr,
    B_ptr,
    C_ptr,
    high_ptr,
    low_ptr,
    step_ptr,
    grad_within_ptr,
    grad_products_ptr,
    grad_D_ptr,  # None for no skip
    x_row,
    x_position,
    x_head,
    B_row,
    B_position,
    B_group,
    C_row,
    C_position,
    C_group,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    heads_per_part,
    num_parts,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of the products C_i . B_j, of the decays within the tile, and of D.

        d(C_i . B_j) = sum over the part's heads of 2^(s_i - s_j) dt_j (dy_i . x_j)
        within_i     = sum over j < i of e_ij - sum over j > i of e_ji
        e_ij         = (C_i . B_j) 2^(s_i - s_j) dt_j (dy_i . x_j)
        dD           = sum over i of dy_i . x_i

    Pairs lie with j first, as in `grad_inputs_kernel`. One program per (row and tile, part of a group's heads).
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    group, first_head, heads_here = _part_of_heads(num_heads, num_groups, heads_per_part, num_parts)
    n_blocks: tl.constexpr = (state_dim + N - 1) // N
    p_blocks: tl.constexpr = (head_dim + P - 1) // P
    t = tl.arange(0, T)
    n = tl.arange(0, N)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    B_base = B_ptr + row * B_row + group * B_group + first * B_position
    C_base = C_ptr + row * C_row + group * C_group + first * C_position
    x_base = x_ptr + row * x_row + first * x_position
    y_position: tl.constexpr = num_heads * head_dim
    y_at = (row * length + first) * y_position

    products_ji = tl.zeros((T, T), dtype=tl.float32)
    for block in range(n_blocks):
        C_TN = _load(C_base, t, block * N + n, C_position, count, state_dim).to(dtype)
        B_TN = _load(B_base, t, block * N + n, B_position, count, state_dim).to(dtype)
        products_ji = tl.dot(B_TN, tl.trans(C_TN), products_ji, input_precision=precision)
    grad_products_ji = tl.zeros((T, T), dtype=tl.float32)

    for index in range(heads_here):
        head = first_head + index
        sums_at = (row_tile * num_heads + head) * T
        pairs_ji = tl.zeros((T, T), dtype=tl.float32)  # x_j . dy_i
        for p_block in range(p_blocks):
            p = p_block * P + tl.arange(0, P)
            x_TP = _load(x_base + head * x_head, t, p, x_position, count, head_dim).to(dtype)
            grad_y_at = y_at + head * head_dim
            grad_y_TP = _load(grad_y_ptr + grad_y_at, t, p, y_position, count, head_dim).to(dtype)
            pairs_ji = tl.dot(x_TP, tl.trans(grad_y_TP), pairs_ji, input_precision=precision)
        if grad_D_ptr is not None:
            diagonal = tl.where(t[None, :] == t[:, None], pairs_ji, 0.0)
            tl.store(grad_D_ptr + row_tile * num_heads + head, tl.sum(tl.sum(diagonal, axis=1), axis=0))
        high, low = tl.load(high_ptr + sums_at + t), tl.load(low_ptr + sums_at + t)
        exponent_ji = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        decay_ji = tl.exp2(tl.where(t[None, :] >= t[:, None], exponent_ji, float("-inf")))
        pairs_ji *= decay_ji * tl.load(step_ptr + sums_at + t)[:, None]
        grad_products_ji += pairs_ji
        grad_exponent_ji = tl.where(t[None, :] > t[:, None], pairs_ji * products_ji, 0.0)
        within = tl.sum(grad_exponent_ji, axis=0) - tl.sum(grad_exponent_ji, axis=1)
        tl.store(grad_within_ptr + sums_at + t, within)

    pairs_at = (row_tile * tl.num_programs(1) + tl.program_id(1)) * T * T
    tl.store(grad_products_ptr + pairs_at + t[:, None] * T + t[None, :], grad_products_ji)


@triton.jit(do_not_specialize=GEOMETRY)
def grad_projections_kernel(
    x_ptr,
    states_ptr,
    own_ptr,
    other_ptr,
    high_ptr,
    low_ptr,
    step_ptr,
    grad_products_ptr,
    grad_ptr,
    grad_from_start_ptr,
    x_row,
    x_position,
    x_head,
    own_row,
    own_position,
    own_group,
    other_row,
    other_position,
    other_group,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    heads_per_part,
    num_parts,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    towards_C: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """Gradient of B, or of C, from one part of a group's heads, [B, L, G, S, N].

        dB_j = sum over heads of 2^(s_T - s_j) dt_j x_j^T g + sum over i of d(C_i . B_j) C_i
        dC_i = sum over heads of 2^(s_i) dy_i^T h           + sum over j of d(C_i . B_j) B_j

    The two differ in names only: `x` is x or dy, `states` the gradient g of the leaving state or the entering state h,
    `own` B or C, `other` C or B. With C comes the gradient of s_i from the entering state, [blocks of N, B, C, H, T]:
    each head's share of dC_i, times C_i. One program per (row and tile, part of a group's heads, block of N).
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    group, first_head, heads_here = _part_of_heads(num_heads, num_groups, heads_per_part, num_parts)
    p_blocks: tl.constexpr = (head_dim + P - 1) // P
    t = tl.arange(0, T)
    n = tl.program_id(2) * N + tl.arange(0, N)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    x_base = x_ptr + row * x_row + first * x_position
    if towards_C:
        own_base = own_ptr + row * own_row + group * own_group + first * own_position
        own_TN = _load(own_base, t, n, own_position, count, state_dim).to(tl.float32)

    grad_TN = tl.zeros((T, N), dtype=tl.float32)
    for index in range(heads_here):
        head = first_head + index
        sums_at = (row_tile * num_heads + head) * T
        high, low = tl.load(high_ptr + sums_at + t), tl.load(low_ptr + sums_at + t)
        states_base = states_ptr + (row_tile * num_heads + head) * head_dim * state_dim
        from_head_TN = tl.zeros((T, N), dtype=tl.float32)
        for p_block in range(p_blocks):
            p = p_block * P + tl.arange(0, P)
            x_TP = _load(x_base + head * x_head, t, p, x_position, count, head_dim).to(dtype)
            state_PN = _load(states_base, p, n, state_dim, head_dim, state_dim)
            from_head_TN = tl.dot(x_TP, state_PN, from_head_TN, input_precision=precision)
        if towards_C:
            from_head_TN *= tl.exp2(high + low)[:, None]
            part = tl.sum(from_head_TN * own_TN, axis=1)
            block_at = tl.program_id(2).to(tl.int64) * tl.num_programs(0) * num_heads * T
            tl.store(grad_from_start_ptr + block_at + sums_at + t, part)
        else:
            last_high, last_low = tl.load(high_ptr + sums_at + T - 1), tl.load(low_ptr + sums_at + T - 1)
            weight = tl.exp2((last_high - high) + (last_low - low)) * tl.load(step_ptr + sums_at + t)
            from_head_TN *= weight[:, None]
        grad_TN += from_head_TN

    pairs_at = grad_products_ptr + (row_tile * tl.num_programs(1) + tl.program_id(1)) * T * T
    if towards_C:  # they lie with j first
        pairs_TT = tl.load(pairs_at + t[None, :] * T + t[:, None])
    else:
        pairs_TT = tl.load(pairs_at + t[:, None] * T + t[None, :])
    other_base = other_ptr + row * other_row + group * other_group + first * other_position
    other_TN = _load(other_base, t, n, other_position, count, state_dim).to(dtype)
    grad_TN = tl.dot(pairs_TT, other_TN, grad_TN, input_precision=precision)
    part_stride = tl.num_programs(1) * state_dim  # all groups' parts
    base = grad_ptr + (row * length + first) * part_stride + tl.program_id(1) * state_dim
    _store(base, t, n, part_stride, count, state_dim, grad_TN)


@triton.jit(do_not_specialize=[*GEOMETRY, "state_blocks"])
def grad_decays_kernel(
    grad_step_ptr,
    grad_within_ptr,
    grad_to_end_ptr,
    grad_from_start_ptr,
    grad_kept_ptr,
    step_ptr,
    A_ptr,
    grad_dt_ptr,
    grad_log_decay_ptr,  # None where the log decay is dt A
    grad_A_ptr,
    length,
    chunk_size,
    tile_size,
    tiles_per_chunk,
    num_tiles,
    state_blocks,
    num_heads: tl.constexpr,
    n_blocks: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
):
    """Gradient of the log decays from those of their running sums, and of dt; both [B, L, H].

    A decay at t is part of every running sum s_i, i >= t, of every 2^(s_T - s_j), j < t, and of what the tile keeps of
    its entering state: three sums of terms that were computed where they arise.
    """
    row_tile = tl.program_id(0).to(tl.int64)
    row, tile = row_tile // num_tiles, row_tile % num_tiles
    t = tl.arange(0, T)
    head = tl.program_id(1).to(tl.int64) * H + tl.arange(0, H)
    first, count = _tile_span(tile, length, chunk_size, tile_size, tiles_per_chunk)
    is_head = (head < num_heads)[:, None]
    everywhere = is_head & (t < T)[None, :]
    at = (row_tile * num_heads + head)[:, None] * T + t[None, :]

    grad_sum = tl.load(grad_within_ptr + at, mask=everywhere, other=0.0)
    for block in range(n_blocks):
        block_at = block * tl.num_programs(0).to(tl.int64) * num_heads * T
        grad_sum += tl.load(grad_from_start_ptr + block_at + at, mask=everywhere, other=0.0)
    total = tl.cumsum(grad_sum, axis=1, reverse=True)
    earlier = tl.load(grad_to_end_ptr + at - 1, mask=is_head & (t > 0)[None, :], other=0.0)
    total += tl.cumsum(earlier, axis=1)
    grad_kept = tl.zeros((H,), dtype=tl.float32)
    for block in range(state_blocks):
        kept_at = (row_tile * num_heads + head) * state_blocks + block
        grad_kept += tl.load(grad_kept_ptr + kept_at, mask=head < num_heads, other=0.0)
    total += grad_kept[:, None]

    inside = is_head & (t < count)[None, :]
    out_at = (row * length + first + t)[None, :] * num_heads + head[:, None]
    grad_dt = tl.load(grad_step_ptr + at, mask=everywhere, other=0.0)
    if grad_log_decay_ptr is None:
        step = tl.load(step_ptr + at, mask=everywhere, other=0.0)
        rate = tl.load(A_ptr + head, mask=head < num_heads, other=0.0).to(tl.float32)
        grad_dt += total * rate[:, None]
        grad_A = tl.sum(tl.where(inside, total * step, 0.0), axis=1)
        tl.store(grad_A_ptr + row_tile * num_heads + head, grad_A, mask=head < num_heads)
    else:
        tl.store(grad_log_decay_ptr + out_at, total, mask=inside)
    tl.store(grad_dt_ptr + out_at, grad_dt, mask=inside)
