"""Summary of the routing: which experts the chunks choose, together, one after the other, and by how much.

The functions below take arrays, so that `hydra_lab.metrics` counts a few recorded samples by the same code.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    Batch,
    BoolArray,
    FloatArray,
    IntArray,
    best_contexts,
    count,
    in_bin,
    octave_edges,
    position_edges,
    sum_by_domain,
    valid_mask,
    weigh,
)
from hydra_lab.summaries.fields import Arrays, Field, Fields, contexts_fields

WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Lengths, in tokens, of the windows of `used_in_window`."""

_OCTAVES = octave_edges(-10, 6)[1:]
MARGIN_EDGES: FloatArray = np.concatenate([-_OCTAVES[::-1], _OCTAVES])
"""Edges of the bins of `margin_histogram`, in logits: eighths of an octave from 2^-10 to 2^6 on both sides of zero."""

MOST_TOKEN_CELLS = 2**23
"""`token_choices` is kept where it has no more entries than this."""

FIELDS: Fields = {
    "chosen": Field(("layer", "domain", "expert"), "chunks that chose the expert, at any rank"),
    "first": Field(("layer", "domain", "expert"), "chunks whose first choice is the expert"),
    "by_chunk": Field(("layer", "chunk", "expert"), "samples whose c-th chunk chose the expert"),
    "pairs": Field(("layer", "expert", "other_expert"), "chunks that chose both; on the diagonal, that chose the one"),
    "switched": Field(("layer", "domain"), "successive chunks of a sample whose first choice differs"),
    "kept": Field(("layer", "domain"), "experts, summed over successive chunks of a sample, that both chose"),
    "used_in_window": Field(("layer", "window"), "different experts used, summed over all windows of WINDOWS[w] "
                            "successive tokens of a sample"),
    "weight_by_position": Field(("layer", "position_bin", "expert"), "sum over the bin's tokens of the weight on the "
                                "expert"),
    "margin_sum": Field(("layer", "domain"), "sum over chunks of the margin: the logit of the last chosen expert less "
                        "the best one of those left out"),
    "margin_square": Field(("layer", "domain"), "sum over chunks of the squared margin"),
    "margin_histogram": Field(("layer", "domain", "margin_bin"), "chunks by their margin (edges: MARGIN_EDGES); none "
                              "where every expert is chosen"),
    "token_choices": Field(("layer", "expert", "token"), "choices of the expert, at any rank, by the id of the token "
                           f"served; kept up to {MOST_TOKEN_CELLS:,} entries"),
    **contexts_fields("context", ("layer", "expert"), "the router's probability (softmax of the chunk's logits) of the "
                      "expert, of chunks that chose it; position: the chunk's first token"),
}  # fmt: skip


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    experts_NYCK = batch["routing", "experts"]
    chunk_size, num_experts = batch.config["moe_chunk_size"], batch.config["moe_num_experts"]
    grid = {"length_N": batch.length, "chunk_size": chunk_size, "num_experts": num_experts}
    domains = {"domain_N": batch.domain, "num_domains": batch.num_domains}
    token_NL = batch["tokens", "token"]
    arrays = count_choices(experts_NYCK, **grid, **domains)
    if ("routing", "weights") in batch:
        edges = position_edges(token_NL.shape[1])
        arrays["weight_by_position"] = weigh_positions(
            experts_NYCK, batch["routing", "weights"], edges=edges, **grid
        )
    vocab_size = batch.config["vocab_size"]
    if experts_NYCK.shape[1] * num_experts * vocab_size <= MOST_TOKEN_CELLS:
        arrays["token_choices"] = count_tokens(experts_NYCK, token_NL, vocab_size=vocab_size, **grid)
    if ("routing", "logits") in batch:
        logits_NYCE = batch["routing", "logits"]
        arrays |= count_margins(experts_NYCK, logits_NYCE, **grid, **domains)
        chosen_NYCE = choices(experts_NYCK, **grid)
        starts_C = chunk_size * np.arange(chosen_NYCE.shape[2], dtype=np.int64)
        score_NCYE = np.where(chosen_NYCE, _softmax(logits_NYCE), -1.0).swapaxes(1, 2)
        arrays |= best_contexts("context", score_NCYE, starts_C, batch.first_sample)
    return arrays


def choices(
    experts_NYCK: NDArray[Any], *, length_N: IntArray, chunk_size: int, num_experts: int
) -> BoolArray:
    """[N, Y, C, E] whether the chunk chose the expert; False past a sample's end."""
    num_samples, num_layers, num_chunks, _ = experts_NYCK.shape
    chosen_NYCE = np.zeros((num_samples, num_layers, num_chunks, num_experts), dtype=bool)
    inside_NYCK = np.clip(experts_NYCK.astype(np.int64), 0, num_experts - 1)
    np.put_along_axis(chosen_NYCE, inside_NYCK, True, axis=-1)
    return chosen_NYCE & _chunk_mask(length_N, chunk_size, num_chunks)[:, None, :, None]


def count_choices(
    experts_NYCK: NDArray[Any],
    *,
    length_N: IntArray,
    domain_N: IntArray,
    num_domains: int,
    chunk_size: int,
    num_experts: int,
) -> Arrays:
    """The arrays of `FIELDS` that the choices alone give."""
    chosen_NYCE = choices(experts_NYCK, length_N=length_N, chunk_size=chunk_size, num_experts=num_experts)
    mask_NC = _chunk_mask(length_N, chunk_size, chosen_NYCE.shape[2])
    first_NYC = experts_NYCK[..., 0]
    first_NYCE = (first_NYC[..., None] == np.arange(num_experts)) & mask_NC[:, None, :, None]
    pair_NC = mask_NC[:, 1:]
    differs_NYC = (first_NYC[:, :, 1:] != first_NYC[:, :, :-1]) & pair_NC[:, None]
    kept_NYC = (chosen_NYCE[:, :, 1:] & chosen_NYCE[:, :, :-1]).sum(axis=-1)

    def of_domain(values_NY: NDArray[Any]) -> NDArray[Any]:
        return sum_by_domain(values_NY, domain_N, num_domains).swapaxes(0, 1)

    taken_YME = chosen_NYCE.swapaxes(0, 1).reshape(chosen_NYCE.shape[1], -1, num_experts).astype(np.float64)
    return {
        "chosen": of_domain(chosen_NYCE.sum(axis=2)),
        "first": of_domain(first_NYCE.sum(axis=2)),
        "by_chunk": chosen_NYCE.sum(axis=0),
        "pairs": np.rint(taken_YME.swapaxes(1, 2) @ taken_YME).astype(np.int64),
        "switched": of_domain(differs_NYC.sum(axis=2)),
        "kept": of_domain(kept_NYC.sum(axis=2)),
        "used_in_window": np.stack(
            [_used_in_windows(chosen_NYCE, length_N, chunk_size, window) for window in WINDOWS], axis=-1
        ),
    }


def _used_in_windows(
    chosen_NYCE: BoolArray, length_N: IntArray, chunk_size: int, window: int
) -> NDArray[np.int64]:
    """[Y] experts used, summed over all windows of `window` successive tokens.

    A window that starts at offset o of chunk a ends in chunk a + (o + window - 1) // chunk_size, so only two numbers of
    chunks occur: the smaller for the early offsets, one more for the late ones.
    """
    num_layers, num_chunks = chosen_NYCE.shape[1:3]
    whole, rest = divmod(window - 1, chunk_size)
    used_Y = np.zeros(num_layers, dtype=np.int64)
    for spanned, offsets in (
        (whole + 1, (0, chunk_size - rest)),
        (whole + 2, (chunk_size - rest, chunk_size)),
    ):
        if spanned > num_chunks or offsets[0] == offsets[1]:
            continue
        starts_A = chunk_size * np.arange(num_chunks - spanned + 1)
        last_start_N = length_N - window
        windows_NA = np.clip(last_start_N[:, None] + 1 - starts_A - offsets[0], 0, offsets[1] - offsets[0])
        union_NYA = _union_of_next(chosen_NYCE, spanned).sum(axis=-1)
        used_Y += (windows_NA[:, None] * union_NYA).sum(axis=(0, 2))
    return used_Y


def _union_of_next(chosen_NYCE: BoolArray, num_chunks: int) -> BoolArray:
    """[N, Y, C - num_chunks + 1, E] whether any of `num_chunks` successive chunks chose the expert."""
    union, size = chosen_NYCE, 1
    while 2 * size <= num_chunks:
        union, size = union[:, :, :-size] | union[:, :, size:], 2 * size
    rest = num_chunks - size
    return union[:, :, : union.shape[2] - rest] | union[:, :, rest:]


def weigh_positions(
    experts_NYCK: NDArray[Any],
    weights_NYLK: NDArray[Any],
    *,
    length_N: IntArray,
    chunk_size: int,
    num_experts: int,
    edges: IntArray,
) -> FloatArray:
    """`weight_by_position` [Y, V, E] in the bins between `edges` [V+1]."""
    num_positions, num_bins = weights_NYLK.shape[2], len(edges) - 1
    position_L = np.arange(num_positions)
    valid_NL = valid_mask(length_N, num_positions)
    bin_NL = np.broadcast_to(in_bin(position_L, edges.astype(np.float64)), valid_NL.shape)
    weight = np.zeros((experts_NYCK.shape[1], num_bins, num_experts))
    for y in range(len(weight)):
        experts_MK = experts_NYCK[:, y][:, position_L // chunk_size][valid_NL].astype(np.int64)
        cell_MK = bin_NL[valid_NL][:, None] * num_experts + experts_MK
        mass = weigh(cell_MK, weights_NYLK[:, y][valid_NL].astype(np.float64), num_bins * num_experts)
        weight[y] = mass.reshape(num_bins, num_experts)
    return weight


def count_tokens(
    experts_NYCK: NDArray[Any],
    token_NL: NDArray[Any],
    *,
    length_N: IntArray,
    chunk_size: int,
    num_experts: int,
    vocab_size: int,
) -> IntArray:
    """`token_choices` [Y, E, vocabulary]."""
    num_positions = token_NL.shape[1]
    valid_NL = valid_mask(length_N, num_positions)
    token_M = token_NL[valid_NL].astype(np.int64)
    chunk_L = np.arange(num_positions) // chunk_size
    counts = np.zeros((experts_NYCK.shape[1], num_experts, vocab_size), dtype=np.int64)
    for y in range(len(counts)):
        experts_MK = experts_NYCK[:, y][:, chunk_L][valid_NL].astype(np.int64)
        cell_MK = experts_MK * vocab_size + token_M[:, None]
        counts[y] = count(cell_MK, num_experts * vocab_size).reshape(num_experts, vocab_size)
    return counts


def margins(
    experts_NYCK: NDArray[Any],
    logits_NYCE: NDArray[Any],
    *,
    length_N: IntArray,
    chunk_size: int,
    num_experts: int,
) -> FloatArray:
    """[N, Y, C] logit of each chunk's last chosen expert less the best one of those left out; NaN past a sample's end
    and where none is left out. Below zero only where the router was overruled."""
    chosen_NYCE = choices(experts_NYCK, length_N=length_N, chunk_size=chunk_size, num_experts=num_experts)
    logits_NYCE = logits_NYCE.astype(np.float64)
    last_NYC = np.where(chosen_NYCE, logits_NYCE, np.inf).min(axis=-1)
    best_left_NYC = np.where(chosen_NYCE, -np.inf, logits_NYCE).max(axis=-1)
    known_NYC = chosen_NYCE.any(axis=-1) & ~chosen_NYCE.all(axis=-1)
    margin_NYC = np.full(known_NYC.shape, np.nan)
    margin_NYC[known_NYC] = last_NYC[known_NYC] - best_left_NYC[known_NYC]
    return margin_NYC


def count_margins(
    experts_NYCK: NDArray[Any],
    logits_NYCE: NDArray[Any],
    *,
    length_N: IntArray,
    domain_N: IntArray,
    num_domains: int,
    chunk_size: int,
    num_experts: int,
) -> Arrays:
    """`margin_sum`, `margin_square` and `margin_histogram`."""
    margin_NYC = margins(
        experts_NYCK, logits_NYCE, length_N=length_N, chunk_size=chunk_size, num_experts=num_experts
    )
    num_layers, num_bins = margin_NYC.shape[1], len(MARGIN_EDGES) - 1
    sample, layer, chunk = np.nonzero(~np.isnan(margin_NYC))
    margin_M = margin_NYC[sample, layer, chunk]
    cell_M = layer * num_domains + domain_N[sample]
    shape = (num_layers, num_domains)
    size = num_layers * num_domains
    return {
        "margin_sum": weigh(cell_M, margin_M, size).reshape(shape),
        "margin_square": weigh(cell_M, margin_M**2, size).reshape(shape),
        "margin_histogram": count(
            cell_M * num_bins + in_bin(margin_M, MARGIN_EDGES), size * num_bins
        ).reshape(*shape, num_bins),
    }


def _chunk_mask(length_N: IntArray, chunk_size: int, num_chunks: int) -> BoolArray:
    return valid_mask(-(-length_N // chunk_size), num_chunks)


def _softmax(logits: NDArray[Any]) -> FloatArray:
    logits = np.nan_to_num(logits.astype(np.float64))
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)
