# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# (what `triton.jit` turns into kernels cannot be typed)
"""Kernels of the gradients of sparse attention. See `attention_kernels` for the words and the shape suffixes.

With p the probability of key n for query t, recomputed from the saved log-sum-exp, and `delta_t = sum_d dy_t * y_t`:

    ds = p (dy_t . v_n - delta_t)
    dv_n = sum_t p dy_t    dq_t = scale sum_n ds k_n    dk_n = scale sum_t ds q_t
"""

import triton
import triton.language as tl

from hydra_lab.ops.sparse_attention.attention_kernels import (
    TILE,
    load_rows,
    selected_by,
    start_of,
    store_rows,
    window_slice,
    window_slices,
)


@triton.jit
def add_to_query(
    d_q_ID,
    q_ID,
    d_out_ID,
    log_sum_I,
    delta_I,
    k_ND,
    v_ND,
    n_N,
    lower_I,
    upper_I,
    scale,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the keys of a slice give to the gradient of the queries; who sees what as in `attend`."""
    score_IN = tl.dot(q_ID, tl.trans(k_ND), input_precision=PRECISION) * scale
    if MASKED:
        visible_IN = (n_N[None, :] >= lower_I[:, None]) & (n_N[None, :] <= upper_I[:, None])
        score_IN = tl.where(visible_IN, score_IN, float("-inf"))
    weight_IN = tl.exp2(score_IN - tl.where(upper_I >= 0, log_sum_I, float("inf"))[:, None])
    d_weight_IN = tl.dot(d_out_ID, tl.trans(v_ND), input_precision=PRECISION)
    d_score_IN = weight_IN * (d_weight_IN - delta_I[:, None])
    return tl.dot(d_score_IN.to(k_ND.dtype), k_ND, d_q_ID, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "window", "width"])
def query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    ids_ptr,
    bits_ptr,
    counts_ptr,
    out_ptr,
    d_out_ptr,
    log_sum_ptr,
    delta_ptr,
    d_q_ptr,
    num_queries,
    num_tiles,
    window,
    width,
    scale,
    scale_log2,
    q_row,
    q_query,
    q_head,
    k_row,
    k_key,
    k_head,
    v_row,
    v_key,
    v_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries, and delta for `block_kernel` and `key_kernel`. One program per (row, tile, part of the
    tile, query head), through the same slices as `forward_kernel`."""
    place = tl.program_id(0).to(tl.int64)
    head = place % NUM_HEADS
    part = place // NUM_HEADS % (TILE // BLOCK_I)
    place = place // NUM_HEADS // (TILE // BLOCK_I)
    tile, row = place % num_tiles, place // num_tiles
    if tile * TILE + part * BLOCK_I >= num_queries:
        return  # keys before its queries' positions may not exist
    key_head = head // GROUP
    q_ptr += row * q_row + head * q_head
    k_ptr += row * k_row + key_head * k_head
    v_ptr += row * v_row + key_head * v_head

    start = start_of(start_ptr, row)
    end = start + num_queries
    query_I = part.to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_I = (tile * TILE).to(tl.int32) + query_I
    is_query_I = i_I < num_queries
    t_first = start + (tile * TILE + part * BLOCK_I).to(tl.int32)
    t_I = start + i_I
    place_I = (row * num_queries + i_I) * NUM_HEADS + head
    q_ID = load_rows(q_ptr, q_query, i_I, is_query_I, HEAD_SIZE, BLOCK_D, True).to(DOT)
    d_out_ID = load_rows(d_out_ptr, HEAD_SIZE, place_I, is_query_I, HEAD_SIZE, BLOCK_D, True)
    out_ID = load_rows(out_ptr, HEAD_SIZE, place_I, is_query_I, HEAD_SIZE, BLOCK_D, True)
    delta_I = tl.sum(d_out_ID.to(tl.float32) * out_ID.to(tl.float32), 1)
    tl.store(delta_ptr + place_I, delta_I, mask=is_query_I)
    log_sum_I = tl.load(log_sum_ptr + place_I, mask=is_query_I, other=float("inf"))
    d_out_ID = d_out_ID.to(DOT)

    d_q_ID = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    slices, clear = window_slices(t_first, window, BLOCK_I, BLOCK_N)
    offset_N = tl.arange(0, BLOCK_N)
    for step in range(0, slices - clear + (BLOCK_I + BLOCK_N - 1) // BLOCK_N):
        n_N = window_slice(step, clear, t_first, BLOCK_I, BLOCK_N) + offset_N
        exists_N = (n_N >= 0) & (n_N < end)
        k_ND = load_rows(k_ptr, k_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
        v_ND = load_rows(v_ptr, v_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
        lower_I = tl.maximum(t_I - window + 1, 0)
        d_q_ID = add_to_query(
            d_q_ID,
            q_ID,
            d_out_ID,
            log_sum_I,
            delta_I,
            k_ND,
            v_ND,
            n_N,
            lower_I,
            t_I,
            scale_log2,
            PRECISION,
            True,
        )
    for step in range(1, clear + 1):
        n_N = t_first + offset_N - step * BLOCK_N
        k_ND = load_rows(k_ptr, k_key, n_N, n_N >= 0, HEAD_SIZE, BLOCK_D, False).to(DOT)
        v_ND = load_rows(v_ptr, v_key, n_N, n_N >= 0, HEAD_SIZE, BLOCK_D, False).to(DOT)
        d_q_ID = add_to_query(
            d_q_ID,
            q_ID,
            d_out_ID,
            log_sum_I,
            delta_I,
            k_ND,
            v_ND,
            n_N,
            t_I,
            t_I,
            scale_log2,
            PRECISION,
            False,
        )

    if counts_ptr is not None:
        PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_B - 1) // BLOCK_B
        plan = (row * num_tiles + tile) * (NUM_HEADS // GROUP) + key_head
        ids_ptr += plan * width
        bits_ptr += plan * width
        number = tl.load(counts_ptr + plan * 2)
        clear = tl.load(counts_ptr + plan * 2 + 1)
        if BLOCK_SIZE % BLOCK_B != 0:
            clear = 0
        offset_N = tl.arange(0, BLOCK_B)
        for step in range(0, clear * PARTS):
            entry = step // PARTS
            n_N = tl.load(ids_ptr + entry) * BLOCK_SIZE + step % PARTS * BLOCK_B + offset_N
            k_ND = load_rows(k_ptr, k_key, n_N, n_N >= 0, HEAD_SIZE, BLOCK_D, False).to(DOT)
            v_ND = load_rows(v_ptr, v_key, n_N, n_N >= 0, HEAD_SIZE, BLOCK_D, False).to(DOT)
            upper_I = tl.where(selected_by(bits_ptr, entry, query_I), t_I, -1)
            d_q_ID = add_to_query(
                d_q_ID,
                q_ID,
                d_out_ID,
                log_sum_I,
                delta_I,
                k_ND,
                v_ND,
                n_N,
                t_I,
                upper_I,
                scale_log2,
                PRECISION,
                False,
            )
        for step in range(clear * PARTS, number * PARTS):
            entry = step // PARTS
            block_first = tl.load(ids_ptr + entry) * BLOCK_SIZE
            n_N = block_first + step % PARTS * BLOCK_B + offset_N
            exists_N = (n_N < block_first + BLOCK_SIZE) & (n_N < end)
            k_ND = load_rows(k_ptr, k_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
            v_ND = load_rows(v_ptr, v_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
            upper_I = tl.minimum(t_I - window, block_first + BLOCK_SIZE - 1)
            upper_I = tl.where(selected_by(bits_ptr, entry, query_I), upper_I, -1)
            lower_I = tl.zeros_like(t_I)
            d_q_ID = add_to_query(
                d_q_ID,
                q_ID,
                d_out_ID,
                log_sum_I,
                delta_I,
                k_ND,
                v_ND,
                n_N,
                lower_I,
                upper_I,
                scale_log2,
                PRECISION,
                True,
            )

    store_rows(d_q_ptr, HEAD_SIZE, place_I, is_query_I, d_q_ID * scale, HEAD_SIZE, BLOCK_D)


@triton.jit
def add_to_keys(
    d_k_ND,
    d_v_ND,
    k_ND,
    v_ND,
    q_ID,
    d_out_ID,
    log_sum_I,
    delta_I,
    visible_NI,
    scale_log2,
    PRECISION: tl.constexpr,
):
    """Add what the queries of a tile give to the gradients of some keys. Scores are made transposed: a transposed
    product of two matrices is not to be trusted on Hopper."""
    score_NI = tl.dot(k_ND, tl.trans(q_ID), input_precision=PRECISION) * scale_log2
    weight_NI = tl.exp2(tl.where(visible_NI, score_NI, float("-inf")) - log_sum_I[None, :])
    d_v_ND = tl.dot(weight_NI.to(d_out_ID.dtype), d_out_ID, d_v_ND, input_precision=PRECISION)
    d_weight_NI = tl.dot(v_ND, tl.trans(d_out_ID), input_precision=PRECISION)
    d_score_NI = weight_NI * (d_weight_NI - delta_I[None, :])
    d_k_ND = tl.dot(d_score_NI.to(q_ID.dtype), q_ID, d_k_ND, input_precision=PRECISION)
    return d_k_ND, d_v_ND


@triton.jit
def share_of(bounds_ptr, target, exists, split, num_splits, PIECE: tl.constexpr):
    """Which entries of the inverted plan a split of a block adds up, (first, stop): none where it is not needed."""
    begin = tl.load(bounds_ptr + target, mask=exists, other=0)
    end = tl.load(bounds_ptr + target + 1, mask=exists, other=0)
    size = tl.maximum((end - begin + num_splits - 1) // num_splits, PIECE)
    first = begin + split * size
    return first, tl.minimum(first + size, end)


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_tiles",
        "num_blocks",
        "window",
        "width",
        "num_splits",
        "num_owners",
    ]
)
def block_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    order_ptr,
    bounds_ptr,
    bits_ptr,
    d_out_ptr,
    log_sum_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
    num_queries,
    num_tiles,
    num_blocks,
    window,
    width,
    num_splits,
    num_owners,
    scale,
    scale_log2,
    q_row,
    q_query,
    q_head,
    k_row,
    k_key,
    k_head,
    v_row,
    v_key,
    v_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients that a (part of a) block gets from some of the tiles that listed it, into fp32 [splits, B * Hkv,
    num_blocks * block_size, d]. One program per (block, split, part of the block, owner), the owner being one of the
    B * Hkv; the sink, which is listed most, comes first. Splits without a tile write nothing."""
    NUM_KEY_HEADS: tl.constexpr = NUM_HEADS // GROUP
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_B - 1) // BLOCK_B
    place = tl.program_id(0).to(tl.int64)
    owner = place % num_owners
    part = (place // num_owners % PARTS).to(tl.int32)
    split = place // num_owners // PARTS % num_splits
    block = place // num_owners // PARTS // num_splits
    first, stop = share_of(bounds_ptr, owner * num_blocks + block, True, split, num_splits, PIECE)
    if first >= stop:
        return

    row, key_head = owner // NUM_KEY_HEADS, owner % NUM_KEY_HEADS
    q_ptr += row * q_row + key_head * GROUP * q_head
    start = start_of(start_ptr, row)
    offset_N = part * BLOCK_B + tl.arange(0, BLOCK_B)
    n_N = block.to(tl.int32) * BLOCK_SIZE + offset_N
    in_block_N = offset_N < BLOCK_SIZE
    exists_N = in_block_N & (n_N < start + num_queries)
    k_ND = load_rows(
        k_ptr + row * k_row + key_head * k_head, k_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True
    ).to(DOT)
    v_ND = load_rows(
        v_ptr + row * v_row + key_head * v_head, v_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True
    ).to(DOT)
    d_k_ND = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    d_v_ND = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for step in range(0, (stop - first).to(tl.int32) * GROUP * TILE_PARTS):
        entry = tl.load(order_ptr + first + step // (GROUP * TILE_PARTS))
        member = step % GROUP
        query_I = step // GROUP % TILE_PARTS * BLOCK_I + tl.arange(0, BLOCK_I)
        i_I = (entry // width // NUM_KEY_HEADS % num_tiles * TILE).to(tl.int32) + query_I
        is_query_I = i_I < num_queries
        q_ID = load_rows(q_ptr + member * q_head, q_query, i_I, is_query_I, HEAD_SIZE, BLOCK_D, True).to(DOT)
        place_I = (row * num_queries + i_I) * NUM_HEADS + key_head * GROUP + member
        d_out_ID = load_rows(d_out_ptr, HEAD_SIZE, place_I, is_query_I, HEAD_SIZE, BLOCK_D, True).to(DOT)
        log_sum_I = tl.load(log_sum_ptr + place_I, mask=is_query_I, other=float("inf"))
        delta_I = tl.load(delta_ptr + place_I, mask=is_query_I, other=0.0)
        last_I = tl.where(selected_by(bits_ptr, entry, query_I), start + i_I - window, -1)
        visible_NI = in_block_N[:, None] & (n_N[:, None] <= last_I[None, :])
        d_k_ND, d_v_ND = add_to_keys(
            d_k_ND, d_v_ND, k_ND, v_ND, q_ID, d_out_ID, log_sum_I, delta_I, visible_NI, scale_log2, PRECISION
        )
    base = (split * num_owners + owner) * num_blocks * BLOCK_SIZE * HEAD_SIZE
    store_rows(d_k_ptr + base, HEAD_SIZE, n_N, in_block_N, d_k_ND * scale, HEAD_SIZE, BLOCK_D)
    store_rows(d_v_ptr + base, HEAD_SIZE, n_N, in_block_N, d_v_ND, HEAD_SIZE, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window", "num_owners"])
def key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    d_out_ptr,
    log_sum_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
    num_queries,
    num_keys,
    window,
    num_owners,
    scale,
    scale_log2,
    q_row,
    q_query,
    q_head,
    k_row,
    k_key,
    k_head,
    v_row,
    v_key,
    v_head,
    d_row,
    d_key,
    d_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients that `BLOCK_N` keys get from the queries that have them in their window. One program per (slice of
    keys, owner)."""
    NUM_KEY_HEADS: tl.constexpr = NUM_HEADS // GROUP
    place = tl.program_id(0).to(tl.int64)
    owner = place % num_owners
    n_first = (place // num_owners * BLOCK_N).to(tl.int32)
    row, key_head = owner // NUM_KEY_HEADS, owner % NUM_KEY_HEADS
    q_ptr += row * q_row + key_head * GROUP * q_head
    start = start_of(start_ptr, row)
    n_N = n_first + tl.arange(0, BLOCK_N)
    is_key_N = n_N < num_keys
    exists_N = n_N < start + num_queries

    d_k_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_v_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    k_ND = load_rows(
        k_ptr + row * k_row + key_head * k_head, k_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True
    ).to(DOT)
    v_ND = load_rows(
        v_ptr + row * v_row + key_head * v_head, v_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True
    ).to(DOT)
    # Queries from the first key on, as far as the window of the last key reaches.
    i_first = n_first - start
    i_stop = tl.minimum(i_first + BLOCK_N - 1 + window, num_queries)
    i_first = tl.maximum(i_first, 0)
    num_slices = tl.maximum((i_stop - i_first + BLOCK_I - 1) // BLOCK_I, 0)
    for step in range(0, num_slices * GROUP):
        i_I = i_first + step // GROUP * BLOCK_I + tl.arange(0, BLOCK_I)
        member = step % GROUP
        is_query_I = i_I < num_queries
        q_ID = load_rows(q_ptr + member * q_head, q_query, i_I, is_query_I, HEAD_SIZE, BLOCK_D, True).to(DOT)
        place_I = (row * num_queries + i_I) * NUM_HEADS + key_head * GROUP + member
        d_out_ID = load_rows(d_out_ptr, HEAD_SIZE, place_I, is_query_I, HEAD_SIZE, BLOCK_D, True).to(DOT)
        log_sum_I = tl.load(log_sum_ptr + place_I, mask=is_query_I, other=float("inf"))
        delta_I = tl.load(delta_ptr + place_I, mask=is_query_I, other=0.0)
        t_I = start + i_I
        visible_NI = (n_N[:, None] <= t_I[None, :]) & (n_N[:, None] > (t_I - window)[None, :])
        d_k_ND, d_v_ND = add_to_keys(
            d_k_ND, d_v_ND, k_ND, v_ND, q_ID, d_out_ID, log_sum_I, delta_I, visible_NI, scale_log2, PRECISION
        )
    base = row * d_row + key_head * d_head
    store_rows(d_k_ptr + base, d_key, n_N, is_key_N, d_k_ND * scale, HEAD_SIZE, BLOCK_D)
    store_rows(d_v_ptr + base, d_key, n_N, is_key_N, d_v_ND, HEAD_SIZE, BLOCK_D)


@triton.jit(do_not_specialize=["num_keys", "num_blocks", "num_splits", "num_owners"])
def sum_kernel(
    bounds_ptr,
    d_k_parts_ptr,
    d_v_parts_ptr,
    d_k_ptr,
    d_v_ptr,
    num_keys,
    num_blocks,
    num_splits,
    num_owners,
    NUM_KEY_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add up what `key_kernel` (part 0) and the splits of `block_kernel` (from part 1) found. One program per (slice of
    keys, owner)."""
    place = tl.program_id(0).to(tl.int64)
    owner = place % num_owners
    row, key_head = owner // NUM_KEY_HEADS, owner % NUM_KEY_HEADS
    n_N = place // num_owners * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key_N = n_N < num_keys
    rows_of_part = num_owners * num_blocks * BLOCK_SIZE
    part_N = owner * num_blocks * BLOCK_SIZE + n_N
    d_k_ND = load_rows(d_k_parts_ptr, HEAD_SIZE, part_N, is_key_N, HEAD_SIZE, BLOCK_D, True)
    d_v_ND = load_rows(d_v_parts_ptr, HEAD_SIZE, part_N, is_key_N, HEAD_SIZE, BLOCK_D, True)
    for split in range(0, num_splits):
        first_N, stop_N = share_of(
            bounds_ptr, owner * num_blocks + n_N // BLOCK_SIZE, is_key_N, split, num_splits, PIECE
        )
        part_N += rows_of_part
        d_k_ND += load_rows(d_k_parts_ptr, HEAD_SIZE, part_N, first_N < stop_N, HEAD_SIZE, BLOCK_D, True)
        d_v_ND += load_rows(d_v_parts_ptr, HEAD_SIZE, part_N, first_N < stop_N, HEAD_SIZE, BLOCK_D, True)
    place_N = (row * num_keys + n_N) * NUM_KEY_HEADS + key_head
    store_rows(d_k_ptr, HEAD_SIZE, place_N, is_key_N, d_k_ND, HEAD_SIZE, BLOCK_D)
    store_rows(d_v_ptr, HEAD_SIZE, place_N, is_key_N, d_v_ND, HEAD_SIZE, BLOCK_D)
