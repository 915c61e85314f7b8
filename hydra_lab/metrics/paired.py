"""Tests of paired measurements: the same question asked twice, or a question and its own answer among others'.

Shape suffixes: N observations (questions), W resamplings.
"""

import math
from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import BoolArray, FloatArray, IntArray

_SAME = 1e-12
"""A resampled statistic that falls short of the observed one by less than this, relative to its size, equals it."""


def sign_flip_p_value(
    differences: FloatArray, *, two_sided: bool = False, num_resamplings: int = 2000, seed: int = 0
) -> float:
    """p-value of "the mean of `differences` [N] is not above zero", by flipping the sign of each at random.

    Flipping a sign swaps the two conditions of one pair, so the test is exact wherever the conditions can be swapped
    without changing anything. 1 where all differences are zero.

    Args:
        two_sided: test "is zero" instead.
        num_resamplings: W.
    """
    rng = np.random.default_rng(seed)
    signs_WN = rng.integers(2, size=(num_resamplings, len(differences))) * 2.0 - 1.0
    null_W = signs_WN @ differences
    observed = float(differences.sum())
    if two_sided:
        observed, null_W = abs(observed), np.abs(null_W)
    return _share_reaching(observed, null_W, float(np.abs(differences).sum()))


@dataclass(frozen=True, eq=False)
class PairingTest:
    """Whether scores are higher where the two things that are scored belong together.

    Attributes:
        value: mean of the N own scores.
        null_value: mean over the permutations of the mean score.
        p_value: (1 + #null >= value) / (1 + W), one-sided.
    """

    value: float
    null_value: float
    p_value: float


def pairing_test(
    scores: FloatArray, group: IntArray, *, num_resamplings: int = 2000, seed: int = 0
) -> PairingTest:
    """Is the score of i with its own partner higher than with the partners of others of its group?

    The null gives every i the partner of another one of its group at random; it is exact wherever partners could have
    been handed out like that. An observation that is alone in its group keeps its partner throughout.

    Args:
        scores: [N, N] score of i (row) with the partner of j (column); the diagonal holds the own ones.
        group: [N] group of each observation.
        num_resamplings: W.
    """
    rng = np.random.default_rng(seed)
    size = len(scores)
    members = [np.flatnonzero(group == each) for each in np.unique(group)]
    null_W = np.zeros(num_resamplings)
    partner_N = np.arange(size)
    for w in range(num_resamplings):
        for rows in members:
            partner_N[rows] = rng.permutation(rows)
        null_W[w] = scores[np.arange(size), partner_N].mean()
    value = float(np.diagonal(scores).mean())
    return PairingTest(
        value, float(null_W.mean()), _share_reaching(value, null_W, float(np.abs(scores).max()))
    )


def mcnemar_p_value(before: BoolArray, after: BoolArray) -> float:
    """Exact one-sided p-value of "as many questions were gained as lost" against "more were lost" (McNemar 1947).

    Args:
        before, after: [N] whether each question was answered right.
    """
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    changed = lost + gained
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed


def _share_reaching(observed: float, null_W: FloatArray, size: float) -> float:
    return float((1 + (null_W >= observed - _SAME * size).sum()) / (1 + len(null_W)))
