"""Array types and the few helpers that every metric shares.

Shape suffixes used throughout `hydra_lab.metrics`:

    Y  blocks that have the path      N  samples (texts)        L  positions (tokens of a sample)
    C  chunks                         E  experts                K  entries of a top-k
    S  workspace slots                H  heads                  Z  domains
    R  rows of the memory's values    V  bins
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries import NO_SAMPLE, Summary, layers_of
from hydra_lab.summaries import bin_edges as bin_edges
from hydra_lab.summaries.arrays import relative_entropy as relative_entropy
from hydra_lab.summaries.arrays import valid_mask as valid_mask

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
AnyFloatArray = NDArray[np.floating[Any]]
"""Recorded floats, of whatever width they were stored in; sums over them are taken in fp64."""
AnyIntArray = NDArray[np.integer[Any]]
"""Recorded integers, of whatever width they were stored in."""


def domain_codes(labels: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """Domain names in order of first appearance, and the index [N] of each sample's domain."""
    names = tuple(dict.fromkeys(labels))
    index = {name: code for code, name in enumerate(names)}
    return names, np.array([index[label] for label in labels], dtype=np.int64)


def domain_order(first_sample_Z: IntArray) -> IntArray:
    """Indices of a summary's domains that occur, in order of first appearance (as `domain_codes` has them)."""
    order = np.argsort(first_sample_Z, kind="stable")
    return order[first_sample_Z[order] != NO_SAMPLE]


def summarized_group(summary: Summary, group: str) -> Mapping[str, NDArray[Any]]:
    """The arrays of a group of a running summary.

    Raises:
        ValueError: the summary does not hold the group.
    """
    if group not in summary:
        raise ValueError(f"the summary has no {group}; it has {', '.join(summary)}")
    return summary[group]


def summarized_block(
    summary: Summary, group: str, layer: int, config: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """The arrays of block `layer` of a group of a running summary.

    Raises:
        ValueError: the summary does not hold the group, or the block does not have it.
    """
    arrays, layers = summarized_group(summary, group), layers_of(config, group)
    if layer not in layers:
        raise ValueError(f"block {layer} has no {group}; blocks {', '.join(map(str, layers))} have")
    return {name: array[layers.index(layer)] for name, array in arrays.items()}


def needs_record(metric: str, reader: str) -> ValueError:
    """The error of a metric that is given counts and needs the samples one by one."""
    return ValueError(
        f"{metric} looks at every sample by itself, which counts do not hold: give it the record that "
        f"hydra_lab.metrics.{reader} reads from the capture's raw arrays"
    )


def tokens_at_least(length_L: IntArray) -> IntArray:
    """[L] samples that have a token at each position, from the samples with 0, 1, ... L tokens."""
    return np.cumsum(length_L[::-1])[::-1][1:]


def binned_tokens(length_L: IntArray, num_bins: int) -> tuple[IntArray, IntArray]:
    """Edges of `num_bins` bins of positions, and the tokens in each bin, of the samples with 0, 1, ... L tokens."""
    edges = bin_edges(len(length_L) - 1, num_bins)
    return edges, np.add.reduceat(tokens_at_least(length_L), edges[:-1])


def total_tokens(length_L: IntArray) -> int:
    """Tokens of the samples with 0, 1, ... L tokens."""
    return int(length_L @ np.arange(len(length_L)))


def ratio(numerator: FloatArray, denominator: FloatArray | float) -> FloatArray:
    """Elementwise quotient, NaN where the denominator is zero (nothing was observed there)."""
    over, under = np.broadcast_arrays(numerator, denominator)
    out = np.full(over.shape, np.nan)
    np.divide(over, under, out=out, where=under != 0)
    return out


def weighted_counts(index: AnyIntArray, weight: AnyFloatArray | IntArray, size: int) -> FloatArray:
    """[size] fp64 sum of the weights of each index; both of any one shape."""
    return np.asarray(np.bincount(index.ravel(), weights=weight.ravel(), minlength=size), dtype=np.float64)


def rebinned(values: NDArray[Any], have: IntArray, want: IntArray, axis: int) -> NDArray[Any]:
    """Sums over bins between the edges `have` [V+1], added up to the coarser bins between the edges `want`.

    Raises:
        ValueError: a wanted edge is not among those at hand.
    """
    if not np.isin(want, have).all():
        raise ValueError(
            f"the counts are in {len(have) - 1} bins and cannot be given in {len(want) - 1}: "
            "ask for half as many bins, or a quarter, ..."
        )
    return np.add.reduceat(values, np.searchsorted(have, want[:-1]), axis=axis)


def histogram_quantiles(counts: IntArray, values: FloatArray, quantiles: Sequence[float]) -> FloatArray:
    """[..., Q] quantiles of numbers of which `counts` [..., V] equal `values` [V] (ascending), interpolated linearly
    between neighbours in rank as `numpy.quantile` does; NaN where nothing was counted."""
    total = counts.sum(axis=-1)
    reached = np.cumsum(counts, axis=-1)
    out = np.full((*total.shape, len(quantiles)), np.nan)
    for place in np.ndindex(total.shape):
        if total[place] == 0:
            continue
        rank = np.asarray(quantiles) * (total[place] - 1)
        low = np.floor(rank).astype(np.int64)
        below, above = (
            values[np.searchsorted(reached[place], each, side="right")]
            for each in (low, np.minimum(low + 1, total[place] - 1))
        )
        out[place] = below + (rank - low) * (above - below)
    return out


def check_shape(name: str, array: NDArray[np.generic], expected: tuple[int | None, ...]) -> None:
    """Raises ValueError naming `name` unless `array` has the expected shape (None: any size)."""
    wrong = len(array.shape) != len(expected) or any(
        want is not None and want != have for want, have in zip(expected, array.shape, strict=True)
    )
    if wrong:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
