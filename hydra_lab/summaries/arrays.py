"""The few array operations that the summaries of all groups share.

Shape suffixes used throughout `hydra_lab.summaries`:

    N  samples (texts)     Y  blocks that have the path     L  positions (tokens of a sample)
    Z  domains             C  chunks                        E  experts
    K  entries of a top-k  S  workspace slots               H  heads
    R  rows of the memory's values       V  bins of positions       M  contexts of a list
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.fields import NO_SCORE, Arrays

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

POSITION_BINS = 128
"""Bins of positions, fewer where a sample has fewer positions."""

SHARE_STEPS = 1000
"""Numbers between 0 and 1 (gates) are counted by the nearest of 0, 1/1000, ..., 1."""

NUM_CONTEXTS = 8
"""Contexts kept of each expert and slot."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Which samples are summarized.

    Attributes:
        length: [N] tokens of each sample.
        domain: [N] domain of each sample, 0..Z-1.
        num_domains: Z.
        first: index in the capture of the first one.
    """

    length: IntArray
    domain: IntArray
    num_domains: int
    first: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one commit.

    Attributes:
        rows: (group, name) -> array [N, ...], as `hydra_lab.capture.layout` lists them.
        config: the model's configuration as a dict.
        samples: whose rows they are.
    """

    rows: Mapping[tuple[str, str], NDArray[Any]]
    config: Mapping[str, Any]
    samples: Samples

    def __getitem__(self, key: tuple[str, str]) -> NDArray[Any]:
        return self.rows[key]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.rows


def valid_mask(length_N: IntArray, size: int) -> BoolArray:
    """[N, size] True for the first `length_N[n]` entries of row n."""
    return np.arange(size) < length_N[:, None]


def bin_edges(size: int, num_bins: int) -> IntArray:
    """Edges [V+1] of at most `num_bins` bins of nearly equal whole width over range(size).

    With half as many bins, every second edge is left.
    """
    if size < 1 or num_bins < 1:
        raise ValueError(f"size and num_bins must be at least 1, got {size} and {num_bins}")
    return np.round(np.linspace(0, size, min(num_bins, size) + 1)).astype(np.int64)


def position_edges(size: int) -> IntArray:
    """Edges [V+1] of a summary's bins of positions, in tokens, for samples of `size` positions."""
    return bin_edges(size, POSITION_BINS)


def sum_by_domain(values_N: NDArray[Any], samples: Samples) -> NDArray[Any]:
    """[Z, ...] sums of `values_N` [N, ...] (integers as int64, floats as float64) over each domain's samples."""
    dtype = np.float64 if values_N.dtype.kind == "f" else np.int64
    total = np.zeros((samples.num_domains, *values_N.shape[1:]), dtype=dtype)
    np.add.at(total, samples.domain, values_N.astype(dtype))
    return total


def count(index: NDArray[Any], size: int) -> IntArray:
    """[size] how often each index occurs."""
    return np.bincount(index.ravel(), minlength=size).astype(np.int64)


def weigh(index: NDArray[Any], weight: NDArray[Any], size: int) -> FloatArray:
    """[size] float64 sum of the weights of each index."""
    return np.bincount(index.ravel(), weights=weight.ravel(), minlength=size).astype(np.float64)


def share_steps(share: NDArray[Any]) -> IntArray:
    """Index of the nearest of the `SHARE_STEPS` + 1 steps from 0 to 1."""
    return np.clip(np.rint(share.astype(np.float64) * SHARE_STEPS), 0, SHARE_STEPS).astype(np.int64)


def relative_entropy(weight: NDArray[Any]) -> FloatArray:
    """Shannon entropy over the last axis, relative to its maximum (0: all on one; 1: even); 0 for a single choice, and
    where every weight is zero. Weights need not sum to 1: they are stored in 16 bits."""
    weight = weight.astype(np.float64, copy=False)
    total = weight.sum(axis=-1, keepdims=True)
    share = weight / np.where(total > 0, total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return entropy / np.log(max(2, weight.shape[-1]))


def octave_edges(low: int, high: int, per_octave: int = 8) -> FloatArray:
    """Edges 0, 2^low, ..., 2^high, inf: the bins between are `1 / per_octave` octaves wide."""
    return np.concatenate([[0.0], 2.0 ** np.linspace(low, high, (high - low) * per_octave + 1), [np.inf]])


def in_bin(values: NDArray[Any], edges: FloatArray) -> IntArray:
    """Index of the bin [edges[i], edges[i + 1]) that holds each value; values beyond the ends fall in the last ones."""
    index = np.searchsorted(edges, values, side="right") - 1
    return np.clip(index, 0, len(edges) - 2).astype(np.int64)


def no_contexts(*shape: int) -> tuple[NDArray[np.float16], NDArray[np.int32], NDArray[np.int32]]:
    """Empty lists of contexts: score, sample and position, each of `shape`."""
    empty = np.full(shape, -1, dtype=np.int32)
    return np.full(shape, NO_SCORE, dtype=np.float16), empty, empty.copy()


def best_contexts(
    name: str, score: NDArray[Any], position: IntArray, first_sample: int, num_contexts: int = NUM_CONTEXTS
) -> Arrays:
    """The lists of `hydra_lab.summaries.fields.contexts_fields`.

    Args:
        score: [N, T, ...items] score of each context for each item; negative where it is none.
        position: [T] position of each context, or [N, T, ...items].
    """
    num_samples, num_places, *items = score.shape
    kept, sample, place = no_contexts(*items, num_contexts)
    if num_samples and num_places:
        rounded = score.astype(np.float16).astype(np.float32)
        best_N = rounded.argmax(axis=1)
        score_N = np.take_along_axis(rounded, best_N[:, None], axis=1)[:, 0]
        if position.ndim == 1:
            position_N = position[best_N]
        else:
            position_N = np.take_along_axis(position, best_N[:, None], axis=1)[:, 0]
        order_M = np.argsort(-score_N, axis=0, kind="stable")[:num_contexts]
        some = slice(len(order_M))
        found = np.take_along_axis(score_N, order_M, axis=0)
        kept[..., some] = np.moveaxis(found, 0, -1)
        sample[..., some] = np.moveaxis(order_M + first_sample, 0, -1)
        place[..., some] = np.moveaxis(np.take_along_axis(position_N, order_M, axis=0), 0, -1)
        none = kept < 0
        kept[none], sample[none], place[none] = NO_SCORE, -1, -1
    return {f"{name}_score": kept, f"{name}_sample": sample, f"{name}_position": place}
