"""Summary of the routing: which experts the chunks choose, together, one after the other, and by how much.

What counts takes `Choices`, so that `hydra_lab.metrics` counts a few recorded samples by the same code.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    Batch,
    BoolArray,
    FloatArray,
    IntArray,
    Samples,
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


@dataclass(frozen=True, eq=False)
class Choices:
    """The experts that the chunks of some samples chose.

    Attributes:
        experts: [N, Y, C, K] chosen experts, best first; whatever stands past a sample's end is ignored.
        samples: their lengths and domains.
        num_experts: E.
        chunk_size: tokens per chunk.
    """

    experts: NDArray[np.integer[Any]]
    samples: Samples
    num_experts: int
    chunk_size: int

    @cached_property
    def mask(self) -> BoolArray:
        """[N, C] True where the chunk holds tokens of the sample."""
        return valid_mask(-(-self.samples.length // self.chunk_size), self.experts.shape[2])

    @cached_property
    def chosen(self) -> BoolArray:
        """[N, Y, C, E] whether the chunk chose the expert; False past a sample's end."""
        chosen = np.zeros((*self.experts.shape[:3], self.num_experts), dtype=np.bool_)
        inside = np.clip(self.experts.astype(np.int64), 0, self.num_experts - 1)
        np.put_along_axis(chosen, inside, True, axis=-1)
        return chosen & self.mask[:, None, :, None]


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    choices = Choices(
        experts=batch["routing", "experts"],
        samples=batch.samples,
        num_experts=batch.config["moe_num_experts"],
        chunk_size=batch.config["moe_chunk_size"],
    )
    token_NL = batch["tokens", "token"]
    arrays = count_choices(choices)
    if ("routing", "weights") in batch:
        edges = position_edges(token_NL.shape[1])
        arrays["weight_by_position"] = weigh_positions(choices, batch["routing", "weights"], edges)
    vocab_size = batch.config["vocab_size"]
    if choices.experts.shape[1] * choices.num_experts * vocab_size <= MOST_TOKEN_CELLS:
        arrays["token_choices"] = count_tokens(choices, token_NL, vocab_size)
    if ("routing", "logits") in batch:
        logits_NYCE = batch["routing", "logits"]
        arrays |= count_margins(choices, logits_NYCE)
        starts_C = choices.chunk_size * np.arange(choices.experts.shape[2], dtype=np.int64)
        score_NCYE = np.where(choices.chosen, _softmax(logits_NYCE), -1.0).swapaxes(1, 2)
        arrays |= best_contexts("context", score_NCYE, starts_C, batch.samples.first)
    return arrays


def count_choices(choices: Choices) -> Arrays:
    """The arrays of `FIELDS` that the choices alone give."""
    chosen_NYCE, mask_NC = choices.chosen, choices.mask
    num_layers, num_experts = chosen_NYCE.shape[1], choices.num_experts
    first_NYC = choices.experts[..., 0]
    first_NYCE = (first_NYC[..., None] == np.arange(num_experts)) & mask_NC[:, None, :, None]
    differs_NYC = (first_NYC[:, :, 1:] != first_NYC[:, :, :-1]) & mask_NC[:, None, 1:]
    kept_NYC = (chosen_NYCE[:, :, 1:] & chosen_NYCE[:, :, :-1]).sum(axis=-1)

    def of_domain(values_NY: NDArray[Any]) -> NDArray[Any]:
        return sum_by_domain(values_NY, choices.samples).swapaxes(0, 1)

    taken_YME = chosen_NYCE.swapaxes(0, 1).reshape(num_layers, mask_NC.size, num_experts).astype(np.float64)
    return {
        "chosen": of_domain(chosen_NYCE.sum(axis=2)),
        "first": of_domain(first_NYCE.sum(axis=2)),
        "by_chunk": chosen_NYCE.sum(axis=0),
        "pairs": np.rint(taken_YME.swapaxes(1, 2) @ taken_YME).astype(np.int64),
        "switched": of_domain(differs_NYC.sum(axis=2)),
        "kept": of_domain(kept_NYC.sum(axis=2)),
        "used_in_window": np.stack([_used_in_windows(choices, window) for window in WINDOWS], axis=-1),
    }


def _used_in_windows(choices: Choices, window: int) -> IntArray:
    """[Y] experts used, summed over all windows of `window` successive tokens.

    A window that starts at offset o of chunk a ends in chunk a + (o + window - 1) // chunk_size, so only two numbers of
    chunks occur: the smaller for the early offsets, one more for the late ones.
    """
    num_layers, num_chunks = choices.experts.shape[1:3]
    chunk_size = choices.chunk_size
    whole, rest = divmod(window - 1, chunk_size)
    used_Y = np.zeros(num_layers, dtype=np.int64)
    for spanned, offsets in (
        (whole + 1, (0, chunk_size - rest)),
        (whole + 2, (chunk_size - rest, chunk_size)),
    ):
        if spanned > num_chunks or offsets[0] == offsets[1]:
            continue
        starts_A = chunk_size * np.arange(num_chunks - spanned + 1)
        last_start_N = choices.samples.length - window
        windows_NA = np.clip(last_start_N[:, None] + 1 - starts_A - offsets[0], 0, offsets[1] - offsets[0])
        union_NYA = _union_of_next(choices.chosen, spanned).sum(axis=-1)
        used_Y += (windows_NA[:, None] * union_NYA).sum(axis=(0, 2))
    return used_Y


def _union_of_next(chosen_NYCE: BoolArray, num_chunks: int) -> BoolArray:
    """[N, Y, C - num_chunks + 1, E] whether any of `num_chunks` successive chunks chose the expert."""
    union, size = chosen_NYCE, 1
    while 2 * size <= num_chunks:
        union, size = union[:, :, :-size] | union[:, :, size:], 2 * size
    rest = num_chunks - size
    return union[:, :, : union.shape[2] - rest] | union[:, :, rest:]


def weigh_positions(choices: Choices, weights_NYLK: NDArray[Any], edges: IntArray) -> FloatArray:
    """`weight_by_position` [Y, V, E] in the bins between `edges` [V+1]."""
    num_layers, num_positions = weights_NYLK.shape[1:3]
    num_bins, num_experts = len(edges) - 1, choices.num_experts
    position_L = np.arange(num_positions)
    valid_NL = valid_mask(choices.samples.length, num_positions)
    bin_M = np.broadcast_to(in_bin(position_L, edges.astype(np.float64)), valid_NL.shape)[valid_NL]
    weight = np.zeros((num_layers, num_bins, num_experts))
    for y in range(num_layers):
        cell_MK = bin_M[:, None] * num_experts + _experts_of_tokens(choices, y, valid_NL)
        mass = weigh(cell_MK, weights_NYLK[:, y][valid_NL].astype(np.float64), num_bins * num_experts)
        weight[y] = mass.reshape(num_bins, num_experts)
    return weight


def count_tokens(choices: Choices, token_NL: NDArray[Any], vocab_size: int) -> IntArray:
    """`token_choices` [Y, E, vocabulary]."""
    num_layers, num_experts = choices.experts.shape[1], choices.num_experts
    valid_NL = valid_mask(choices.samples.length, token_NL.shape[1])
    token_M = token_NL[valid_NL].astype(np.int64)
    counts = np.zeros((num_layers, num_experts, vocab_size), dtype=np.int64)
    for y in range(num_layers):
        cell_MK = _experts_of_tokens(choices, y, valid_NL) * vocab_size + token_M[:, None]
        counts[y] = count(cell_MK, num_experts * vocab_size).reshape(num_experts, vocab_size)
    return counts


def _experts_of_tokens(choices: Choices, y: int, valid_NL: BoolArray) -> IntArray:
    """[M, K] experts of the tokens for which `valid_NL` holds, in block y."""
    chunk_L = np.arange(valid_NL.shape[1]) // choices.chunk_size
    return choices.experts[:, y][:, chunk_L][valid_NL].astype(np.int64)


def count_margins(choices: Choices, logits_NYCE: NDArray[Any]) -> Arrays:
    """`margin_sum`, `margin_square` and `margin_histogram`. A margin is below zero only where the router was
    overruled."""
    chosen_NYCE, num_domains = choices.chosen, choices.samples.num_domains
    logits_NYCE = logits_NYCE.astype(np.float64)
    last_NYC = np.where(chosen_NYCE, logits_NYCE, np.inf).min(axis=-1)
    best_left_NYC = np.where(chosen_NYCE, -np.inf, logits_NYCE).max(axis=-1)
    sample, layer, _ = known = np.nonzero(chosen_NYCE.any(axis=-1) & ~chosen_NYCE.all(axis=-1))
    margin_M = last_NYC[known] - best_left_NYC[known]
    cell_M = layer * num_domains + choices.samples.domain[sample]
    num_bins, shape = len(MARGIN_EDGES) - 1, (logits_NYCE.shape[1], num_domains)
    size = shape[0] * shape[1]
    histogram = count(cell_M * num_bins + in_bin(margin_M, MARGIN_EDGES), size * num_bins)
    return {
        "margin_sum": weigh(cell_M, margin_M, size).reshape(shape),
        "margin_square": weigh(cell_M, margin_M**2, size).reshape(shape),
        "margin_histogram": histogram.reshape(*shape, num_bins),
    }


def _softmax(logits: NDArray[Any]) -> FloatArray:
    logits = np.nan_to_num(logits.astype(np.float64))
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)
