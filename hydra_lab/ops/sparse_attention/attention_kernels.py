# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# (what `triton.jit` turns into kernels cannot be typed)
"""Kernels of sparse attention: the plan, the forward pass, a single decoding step, the gradients.

A tile is `TILE` consecutive queries of one row and one query head. All kernels work on pairs of a tile and a slice of
keys, which is a slice of the tile's window or (a part of) a block that at least one of its queries selected:

    window    keys  t - window < n <= t
    blocks    keys  n <= t - window  of the sink and of the blocks that the query selected, each block once

so that no key counts twice. The *plan* lists the blocks of a tile: ascending, the sink first, without those that lie in
the window of all queries that selected them, and for each block a word with one bit per query that selected it.

Shape suffixes: I queries of a tile, N keys of a slice, D channels of a head, X (query, rank) pairs of a tile; Q query
heads of a group, K selected blocks, S splits. Scores are in base 2: the factor `scale` is `log2(e)` times the caller's.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(64)
"""Queries per tile: the bits of a word of the plan, and the rows of Hopper's matrix instructions."""
_NO_PAIR = tl.constexpr(2**31 - 1)
_LOWEST = tl.constexpr(-1e30)

# What both the host and the kernels call "plan" are four tensors: ids, bits [B, tiles, Hkv, width], counts [.., 2]. The
# entry e of a list is block ids[e], selected by the queries bits[e + 1] - bits[e]; counts holds the number of entries
# and how many of them, from the first on, no query's window touches.


@triton.jit
def start_of(start_ptr, row):
    """Position of a row's first query."""
    start = tl.full((), 0, tl.int64)
    if start_ptr is not None:
        start = tl.load(start_ptr + row).to(tl.int64)
    return start.to(tl.int32)


@triton.jit
def load_rows(
    base, stride, row_N, valid_N, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows [N, D] of a matrix with contiguous channels; zeros where a row is not valid, and past the head's size."""
    channel_D = tl.arange(0, BLOCK_D)
    pointer_ND = base + row_N.to(tl.int64)[:, None] * stride + channel_D[None, :]
    if HEAD_SIZE == BLOCK_D:
        if MASKED:
            x_ND = tl.load(pointer_ND, mask=valid_N[:, None], other=0.0)
        else:
            x_ND = tl.load(pointer_ND)
    else:
        inside_ND = (channel_D < HEAD_SIZE)[None, :]
        if MASKED:
            inside_ND = inside_ND & valid_N[:, None]
        x_ND = tl.load(pointer_ND, mask=inside_ND, other=0.0)
    return x_ND


@triton.jit
def store_rows(base, stride, row_N, valid_N, x_ND, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    channel_D = tl.arange(0, BLOCK_D)
    pointer_ND = base + row_N.to(tl.int64)[:, None] * stride + channel_D[None, :]
    inside_ND = valid_N[:, None] & (channel_D < HEAD_SIZE)[None, :]
    tl.store(pointer_ND, x_ND.to(base.dtype.element_ty), mask=inside_ND)


# The plan.


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "window", "width"])
def plan_kernel(
    blocks_ptr,
    start_ptr,  # None where all rows start at 0
    ids_ptr,
    bits_ptr,
    counts_ptr,
    num_queries,
    num_tiles,
    window,
    width,
    blocks_row,
    blocks_query,
    blocks_head,
    blocks_rank,
    NUM_KEY_HEADS: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    X: tl.constexpr,
):
    """List the blocks of one tile: sort its (block, query) pairs, keep the first of equal ones. One program per (row,
    tile, key-value head)."""
    place = tl.program_id(0).to(tl.int64)
    head = place % NUM_KEY_HEADS
    tile = place // NUM_KEY_HEADS % num_tiles
    row = place // NUM_KEY_HEADS // num_tiles
    first = (tile * TILE).to(tl.int32)
    t_first = start_of(start_ptr, row) + first
    t_last = t_first + tl.minimum(num_queries - first, TILE) - 1
    ids_ptr += place * width
    bits_ptr += place * width

    number = 0
    number_clear = 0
    total = tl.full((), 0, tl.int64)
    if NUM_SELECTED > 0:
        x = tl.arange(0, X)
        query_X = x // NUM_SELECTED
        present_X = (query_X < TILE) & (first + query_X < num_queries)
        pointer_X = blocks_ptr + row * blocks_row + head * blocks_head
        pointer_X += (first + query_X).to(tl.int64) * blocks_query + x % NUM_SELECTED * blocks_rank
        block_X = tl.load(pointer_X, mask=present_X, other=-1)
        # Only blocks with a key outside the window; none are where that is negative.
        last_X = (t_first + query_X - window) // BLOCK_SIZE
        present_X = present_X & (block_X > 0) & (block_X <= last_X)
        pair_X = tl.sort(tl.where(present_X, block_X.to(tl.int32) * TILE + query_X, _NO_PAIR))
        earlier_X = tl.gather(pair_X, tl.maximum(x - 1, 0), 0)
        present_X = pair_X != _NO_PAIR
        is_new_X = present_X & ((x == 0) | (pair_X != earlier_X))
        block_X = pair_X // TILE
        opens_X = present_X & ((x == 0) | (block_X != earlier_X // TILE))
        one = tl.full((), 1, tl.int64)
        bit_X = tl.where(is_new_X, one << (pair_X % TILE).to(tl.int64), 0)
        # The bits of a block add up to its word, so words are differences of the running sum (modulo 2**64).
        before_X = tl.cumsum(bit_X, 0) - bit_X
        entry_X = tl.cumsum(opens_X.to(tl.int32), 0)  # the sink has entry 0
        tl.store(ids_ptr + entry_X, block_X, mask=opens_X)
        tl.store(bits_ptr + entry_X, before_X, mask=opens_X)
        number = tl.sum(opens_X.to(tl.int32), 0)
        clear_X = opens_X & ((block_X + 1) * BLOCK_SIZE - 1 <= t_first - window)
        number_clear = tl.sum(clear_X.to(tl.int32), 0)
        total = tl.sum(bit_X, 0)
    tl.store(ids_ptr, 0)
    tl.store(bits_ptr, tl.full((), 1, tl.int64))  # all queries have the sink: 0 - 1 has all bits
    tl.store(bits_ptr + number + 1, total)
    has_sink = t_last >= window
    sink_is_clear = BLOCK_SIZE - 1 <= t_first - window
    tl.store(counts_ptr + place * 2, tl.where(has_sink, number + 1, 0))
    tl.store(counts_ptr + place * 2 + 1, tl.where(sink_is_clear, number_clear + 1, 0))


@triton.jit
def selected_by(bits_ptr, entry, query_I):
    """Which queries of the tile selected the block of a list's entry."""
    word = tl.load(bits_ptr + entry + 1) - tl.load(bits_ptr + entry)
    return ((word >> query_I.to(tl.int64)) & 1) != 0


# Forward.


@triton.jit
def attend(
    acc_ID,
    top_I,
    q_ID,
    k_ND,
    v_ND,
    n_N,
    lower_I,
    upper_I,
    scale,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax: (new sum of values, new maximum, factor of earlier sums, sum of weights).

    A query with `upper < 0` sees none of the keys; the others see those from `lower` to `upper`, all if not `MASKED`.
    """
    score_IN = tl.dot(q_ID, tl.trans(k_ND), input_precision=PRECISION) * scale
    sees_I = upper_I >= 0
    if MASKED:
        visible_IN = (n_N[None, :] >= lower_I[:, None]) & (n_N[None, :] <= upper_I[:, None])
        score_IN = tl.where(visible_IN, score_IN, float("-inf"))
    new_top_I = tl.maximum(top_I, tl.where(sees_I, tl.max(score_IN, 1), float("-inf")))
    finite_I = tl.maximum(new_top_I, _LOWEST)  # where the query has seen nothing so far
    rescale_I = tl.exp2(top_I - finite_I)
    weight_IN = tl.exp2(score_IN - tl.where(sees_I, finite_I, float("inf"))[:, None])
    acc_ID = tl.dot(weight_IN.to(v_ND.dtype), v_ND, acc_ID * rescale_I[:, None], input_precision=PRECISION)
    return acc_ID, new_top_I, rescale_I, tl.sum(weight_IN, 1)


@triton.jit
def window_slices(t_first, window, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slices before the first query's position that the windows reach, and how many of them, from the last one back,
    all queries see whole."""
    number = (tl.minimum(window - 1, t_first) + BLOCK_N - 1) // BLOCK_N
    clear = tl.minimum((window - BLOCK_I) // BLOCK_N, t_first // BLOCK_N)
    return number, tl.maximum(clear, 0)


@triton.jit
def window_slice(step, clear, t_first, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of a slice that is not seen whole: first those of the queries themselves, then the farthest ones."""
    OWN: tl.constexpr = (BLOCK_I + BLOCK_N - 1) // BLOCK_N
    return t_first + tl.where(step < OWN, step, OWN - 1 - clear - step) * BLOCK_N


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "window", "width"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    ids_ptr,
    bits_ptr,
    counts_ptr,  # None where every key is in every window
    out_ptr,
    log_sum_ptr,
    mass_ptr,  # None where nobody asks
    num_queries,
    num_tiles,
    window,
    width,
    scale,
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
    """One program per (row, tile, part of the tile, query head): `BLOCK_I` queries, through slices of `BLOCK_N` keys of
    the window and `BLOCK_B` keys of a block."""
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
    end = start + num_queries  # keys from here on may be garbage
    query_I = part.to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_I = (tile * TILE).to(tl.int32) + query_I
    is_query_I = i_I < num_queries
    t_first = start + (tile * TILE + part * BLOCK_I).to(tl.int32)
    t_I = start + i_I
    q_ID = load_rows(q_ptr, q_query, i_I, is_query_I, HEAD_SIZE, BLOCK_D, True).to(DOT)

    acc_ID = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    top_I = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    window_I = tl.zeros((BLOCK_I,), tl.float32)
    sink_I = tl.zeros((BLOCK_I,), tl.float32)
    selected_I = tl.zeros((BLOCK_I,), tl.float32)

    slices, clear = window_slices(t_first, window, BLOCK_I, BLOCK_N)
    offset_N = tl.arange(0, BLOCK_N)
    for step in range(0, slices - clear + (BLOCK_I + BLOCK_N - 1) // BLOCK_N):
        n_N = window_slice(step, clear, t_first, BLOCK_I, BLOCK_N) + offset_N
        exists_N = (n_N >= 0) & (n_N < end)
        k_ND = load_rows(k_ptr, k_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
        v_ND = load_rows(v_ptr, v_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
        lower_I = tl.maximum(t_I - window + 1, 0)
        acc_ID, top_I, rescale_I, sum_I = attend(
            acc_ID, top_I, q_ID, k_ND, v_ND, n_N, lower_I, t_I, scale, PRECISION, True
        )
        window_I = window_I * rescale_I + sum_I
    for step in range(1, clear + 1):
        n_N = t_first + offset_N - step * BLOCK_N
        k_ND = load_rows(k_ptr, k_key, n_N, n_N >= 0, HEAD_SIZE, BLOCK_D, False).to(DOT)
        v_ND = load_rows(v_ptr, v_key, n_N, n_N >= 0, HEAD_SIZE, BLOCK_D, False).to(DOT)
        acc_ID, top_I, rescale_I, sum_I = attend(
            acc_ID, top_I, q_ID, k_ND, v_ND, n_N, t_I, t_I, scale, PRECISION, False
        )
        window_I = window_I * rescale_I + sum_I
    top_window_I = top_I

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
            acc_ID, top_I, rescale_I, sum_I = attend(
                acc_ID, top_I, q_ID, k_ND, v_ND, n_N, t_I, upper_I, scale, PRECISION, False
            )
            sink_I = sink_I * rescale_I + tl.where(entry == 0, sum_I, 0.0)
            selected_I = selected_I * rescale_I + tl.where(entry == 0, 0.0, sum_I)
        for step in range(clear * PARTS, number * PARTS):
            entry = step // PARTS
            block_first = tl.load(ids_ptr + entry) * BLOCK_SIZE
            n_N = block_first + step % PARTS * BLOCK_B + offset_N
            exists_N = (n_N < block_first + BLOCK_SIZE) & (n_N < end)
            k_ND = load_rows(k_ptr, k_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
            v_ND = load_rows(v_ptr, v_key, n_N, exists_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
            upper_I = tl.minimum(t_I - window, block_first + BLOCK_SIZE - 1)
            upper_I = tl.where(selected_by(bits_ptr, entry, query_I), upper_I, -1)
            acc_ID, top_I, rescale_I, sum_I = attend(
                acc_ID, top_I, q_ID, k_ND, v_ND, n_N, tl.zeros_like(t_I), upper_I, scale, PRECISION, True
            )
            sink_I = sink_I * rescale_I + tl.where(entry == 0, sum_I, 0.0)
            selected_I = selected_I * rescale_I + tl.where(entry == 0, 0.0, sum_I)

    window_I = window_I * tl.exp2(top_window_I - top_I)
    total_I = window_I + sink_I + selected_I
    place_I = (row * num_queries + i_I) * NUM_HEADS + head
    store_rows(out_ptr, HEAD_SIZE, place_I, is_query_I, acc_ID / total_I[:, None], HEAD_SIZE, BLOCK_D)
    tl.store(log_sum_ptr + place_I, top_I + tl.log2(total_I), mask=is_query_I)
    if mass_ptr is not None:
        tl.store(mass_ptr + place_I * 3, window_I / total_I, mask=is_query_I)
        tl.store(mass_ptr + place_I * 3 + 1, sink_I / total_I, mask=is_query_I)
        tl.store(mass_ptr + place_I * 3 + 2, selected_I / total_I, mask=is_query_I)


# One query per row, over a long cache: the keys are shared out among programs. The heads of a group are the rows of a
# tile, since there is one query only.


@triton.jit(do_not_specialize=["window", "window_steps", "num_steps", "steps_per_split", "num_splits"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    blocks_ptr,
    start_ptr,
    acc_ptr,
    top_ptr,
    sums_ptr,
    window,
    window_steps,
    num_steps,
    steps_per_split,
    num_splits,
    scale,
    q_row,
    q_head,
    k_row,
    k_key,
    k_head,
    v_row,
    v_key,
    v_head,
    blocks_row,
    blocks_head,
    blocks_rank,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial softmax over some of a query's slices of keys. One program per (row, key-value head, split)."""
    place = tl.program_id(0).to(tl.int64)
    split = (place % num_splits).to(tl.int32)
    head = place // num_splits % NUM_KEY_HEADS
    row = place // num_splits // NUM_KEY_HEADS
    member_Q = tl.arange(0, BLOCK_Q)
    is_member_Q = member_Q < GROUP
    q_ptr += row * q_row + head * GROUP * q_head
    k_ptr += row * k_row + head * k_head
    v_ptr += row * v_row + head * v_head
    q_QD = load_rows(q_ptr, q_head, member_Q, is_member_Q, HEAD_SIZE, BLOCK_D, True).to(DOT)
    t = start_of(start_ptr, row)
    rank_K = tl.arange(0, BLOCK_K)
    listed_K = tl.load(
        blocks_ptr + row * blocks_row + head * blocks_head + rank_K * blocks_rank,
        mask=rank_K < NUM_SELECTED,
        other=-1,
    )
    # 0 for what the query does not see outside its window, as for the sink, which is not selected.
    listed_K = tl.where((listed_K > 0) & (listed_K <= (t - window) // BLOCK_SIZE), listed_K, 0).to(tl.int32)

    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    offset_N = tl.arange(0, BLOCK_N)
    acc_QD = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    top_Q = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    window_Q = tl.zeros((BLOCK_Q,), tl.float32)
    sink_Q = tl.zeros((BLOCK_Q,), tl.float32)
    selected_Q = tl.zeros((BLOCK_Q,), tl.float32)
    first_step = split * steps_per_split
    for step in range(first_step, tl.minimum(first_step + steps_per_split, num_steps)):
        in_window = step < window_steps
        rank = (step - window_steps) // PARTS - 1  # of the sink -1
        is_sink = (step >= window_steps) & (rank == -1)
        block = tl.sum(tl.where(rank_K == rank, listed_K, 0), 0)
        again = tl.sum(((rank_K < rank) & (listed_K == block)).to(tl.int32), 0) > 0
        window_first = t - window + 1
        first = tl.where(in_window, window_first, block * BLOCK_SIZE)
        n_N = tl.where(in_window, step * BLOCK_N, (step - window_steps) % PARTS * BLOCK_N) + first + offset_N
        last = tl.where(in_window, t, tl.minimum(block * BLOCK_SIZE + BLOCK_SIZE - 1, t - window))
        last = tl.where(in_window | is_sink | ((block > 0) & (again == 0)), last, -1)
        visible_N = (n_N >= 0) & (n_N <= last)
        k_ND = load_rows(k_ptr, k_key, n_N, visible_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
        v_ND = load_rows(v_ptr, v_key, n_N, visible_N, HEAD_SIZE, BLOCK_D, True).to(DOT)
        score_QN = tl.dot(q_QD, tl.trans(k_ND), input_precision=PRECISION) * scale
        score_QN = tl.where(visible_N[None, :], score_QN, float("-inf"))
        new_top_Q = tl.maximum(top_Q, tl.max(score_QN, 1))
        finite_Q = tl.where(new_top_Q == float("-inf"), 0.0, new_top_Q)  # nothing seen so far
        rescale_Q = tl.exp2(top_Q - finite_Q)
        weight_QN = tl.exp2(score_QN - finite_Q[:, None])
        acc_QD = tl.dot(weight_QN.to(DOT), v_ND, acc_QD * rescale_Q[:, None], input_precision=PRECISION)
        sum_Q = tl.sum(weight_QN, 1)
        window_Q = window_Q * rescale_Q + tl.where(in_window, sum_Q, 0.0)
        sink_Q = sink_Q * rescale_Q + tl.where(is_sink, sum_Q, 0.0)
        selected_Q = selected_Q * rescale_Q + tl.where(in_window | is_sink, 0.0, sum_Q)
        top_Q = new_top_Q

    place_Q = place * GROUP + member_Q
    store_rows(acc_ptr, HEAD_SIZE, place_Q, is_member_Q, acc_QD, HEAD_SIZE, BLOCK_D)
    tl.store(top_ptr + place_Q, top_Q, mask=is_member_Q)
    tl.store(sums_ptr + place_Q * 3, window_Q, mask=is_member_Q)
    tl.store(sums_ptr + place_Q * 3 + 1, sink_Q, mask=is_member_Q)
    tl.store(sums_ptr + place_Q * 3 + 2, selected_Q, mask=is_member_Q)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    acc_ptr,
    top_ptr,
    sums_ptr,
    out_ptr,
    mass_ptr,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Put the partial softmaxes of a query together. One program per (row, query head)."""
    place = tl.program_id(0).to(tl.int64)
    split_S = tl.arange(0, BLOCK_S)
    exists_S = split_S < num_splits
    place_S = ((place // GROUP) * num_splits + split_S) * GROUP + place % GROUP
    top_S = tl.load(top_ptr + place_S, mask=exists_S, other=float("-inf"))
    weight_S = tl.exp2(top_S - tl.max(top_S, 0))
    acc_SD = load_rows(acc_ptr, HEAD_SIZE, place_S, exists_S, HEAD_SIZE, BLOCK_D, True)
    acc_D = tl.sum(acc_SD * weight_S[:, None], 0)
    window = tl.sum(tl.load(sums_ptr + place_S * 3, mask=exists_S, other=0.0) * weight_S, 0)
    sink = tl.sum(tl.load(sums_ptr + place_S * 3 + 1, mask=exists_S, other=0.0) * weight_S, 0)
    selected = tl.sum(tl.load(sums_ptr + place_S * 3 + 2, mask=exists_S, other=0.0) * weight_S, 0)
    total = window + sink + selected
    channel_D = tl.arange(0, BLOCK_D)
    out_D = (acc_D / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * HEAD_SIZE + channel_D, out_D, mask=channel_D < HEAD_SIZE)
    if mass_ptr is not None:
        tl.store(mass_ptr + place * 3, window / total)
        tl.store(mass_ptr + place * 3 + 1, sink / total)
        tl.store(mass_ptr + place * 3 + 2, selected / total)
