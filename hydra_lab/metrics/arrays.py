"""Array types and the few helpers that every metric shares.

Shape suffixes used throughout `hydra_lab.metrics`:

    Y  blocks that have the path      N  samples (texts)        L  positions (tokens of a sample)
    C  chunks                         E  experts                K  entries of a top-k
    S  workspace slots                H  heads                  Z  domains
    R  rows of the memory's values    V  bins
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def valid_mask(length: IntArray, size: int) -> BoolArray:
    """[N, size] mask that is True for the first `length[n]` entries of row n."""
    return np.arange(size) < length[:, None]


def ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Elementwise quotient, NaN where the denominator is zero (nothing was observed there)."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out


def weighted_counts(index: AnyIntArray, weight: AnyFloatArray, size: int) -> FloatArray:
    """[size] fp64 sum of the weights of each index; both of any one shape."""
    return np.asarray(np.bincount(index.ravel(), weights=weight.ravel(), minlength=size), dtype=np.float64)


def bin_edges(size: int, num_bins: int) -> IntArray:
    """Edges [V+1] of at most `num_bins` bins of nearly equal whole width over range(size)."""
    if size < 1 or num_bins < 1:
        raise ValueError(f"size and num_bins must be at least 1, got {size} and {num_bins}")
    num_bins = min(num_bins, size)
    return np.round(np.linspace(0, size, num_bins + 1)).astype(np.int64)


def check_shape(name: str, array: NDArray[np.generic], expected: tuple[int | None, ...]) -> None:
    """Raises ValueError naming `name` unless `array` has the expected shape (None: any size)."""
    wrong = len(array.shape) != len(expected) or any(
        want is not None and want != have for want, have in zip(expected, array.shape, strict=True)
    )
    if wrong:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
