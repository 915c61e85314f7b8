"""Which facts share rows of the memory.

See `hydra_lab.metrics.arrays` for the shape suffixes; N are prompts here, and U the different rows that they read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import BoolArray, FloatArray, IntArray
from hydra_lab.metrics.memory_counts import LookupRecord


@dataclass(frozen=True, eq=False)
class AddressOverlap:
    """How far prompts read the same rows of the memory: those about the same fact against those about different ones.

    Of two prompts that read the rows A and B, the Jaccard index is |A ∩ B| / |A ∪ B| (Jaccard 1901). The weighted
    overlap is sum_r min(w_a(r), w_b(r)), w the prompt's read weight scaled to sum 1: one less the total variation
    distance. Both are 0 where no row is in common and 1 where all are. All heads count together, since they share the
    rows.

    The null is that a prompt's rows say nothing of its fact: the facts are dealt out anew among the prompts, and the
    difference of the two means taken each time.

    Attributes:
        layer: index of the block.
        facts: [N] fact that each prompt is about.
        jaccard: [N, N] Jaccard index of each pair of prompts.
        weighted: [N, N] weighted overlap of each pair.
        same: (Jaccard, weighted) means over pairs of different prompts about the same fact.
        different: (Jaccard, weighted) means over pairs about different facts.
        p_value: (Jaccard, weighted) one-sided: (1 + #null >= observed) / (1 + permutations).
        num_rows: [N] different rows that each prompt reads.
        num_pairs: (about the same fact, about different ones).
        num_tokens: tokens whose reads count.
        num_samples: N.
    """

    layer: int
    facts: tuple[str, ...]
    jaccard: FloatArray
    weighted: FloatArray
    same: tuple[float, float]
    different: tuple[float, float]
    p_value: tuple[float, float]
    num_rows: IntArray
    num_pairs: tuple[int, int]
    num_tokens: int
    num_samples: int


def address_overlap(
    record: LookupRecord,
    facts: Sequence[str],
    *,
    where: BoolArray | None = None,
    num_resamplings: int = 1000,
    seed: int = 0,
) -> AddressOverlap:
    """Overlap of the rows that prompts read; see `AddressOverlap`.

    Args:
        record: lookups of prompts, one per sample.
        facts: [N] which fact each prompt is about; the null needs facts with several prompts, and several facts.
        where: [N, L] tokens whose reads count, such as the one before the answer; all unless given.
        num_resamplings: permutations of the null.
        seed: of the permutations.

    Raises:
        ValueError: there are not as many facts as prompts, no two prompts are about the same fact or about different
            ones, or a prompt has no read.
    """
    num_samples = len(record.length)
    if len(facts) != num_samples:
        raise ValueError(f"{len(facts)} facts for {num_samples} prompts")
    mask_NL = record.mask if where is None else record.mask & where
    silent = np.flatnonzero(~mask_NL.any(axis=1))
    if len(silent):
        raise ValueError(f"prompt {silent[0]} has no token whose reads count")
    code_N = np.unique(np.array(facts), return_inverse=True)[1]
    upper = np.triu_indices(num_samples, 1)
    is_same = code_N[upper[0]] == code_N[upper[1]]
    if is_same.all() or not is_same.any():
        raise ValueError("address_overlap needs prompts about the same fact and about different ones")

    weight_NU = _weights(record, mask_NL)
    read_NU = (weight_NU >= 0).astype(np.float64)
    common = read_NU @ read_NU.T
    size_N = read_NU.sum(axis=1)
    jaccard = common / (size_N[:, None] + size_N - common)
    share_NU = np.maximum(weight_NU, 0.0)
    share_NU /= share_NU.sum(axis=1, keepdims=True)
    weighted = np.stack([np.minimum(row, share_NU).sum(axis=1) for row in share_NU])

    pairs_2P = np.stack([jaccard[upper], weighted[upper]])
    rng = np.random.default_rng(seed)
    observed = _difference(pairs_2P, is_same)
    exceeded = np.zeros(2)
    for _ in range(num_resamplings):
        dealt_N = code_N[rng.permutation(num_samples)]
        exceeded += _difference(pairs_2P, dealt_N[upper[0]] == dealt_N[upper[1]]) >= observed - 1e-12
    same, different = pairs_2P[:, is_same].mean(axis=1), pairs_2P[:, ~is_same].mean(axis=1)
    p_value = (1 + exceeded) / (1 + num_resamplings)
    return AddressOverlap(
        layer=record.layer,
        facts=tuple(facts),
        jaccard=jaccard,
        weighted=weighted,
        same=(float(same[0]), float(same[1])),
        different=(float(different[0]), float(different[1])),
        p_value=(float(p_value[0]), float(p_value[1])),
        num_rows=size_N.astype(np.int64),
        num_pairs=(int(is_same.sum()), int((~is_same).sum())),
        num_tokens=int(mask_NL.sum()),
        num_samples=num_samples,
    )


def _weights(record: LookupRecord, mask_NL: BoolArray) -> FloatArray:
    """[N, U] read weight that each prompt puts on each row that any of them reads; -1 where it does not read it."""
    sample_M, _ = np.nonzero(mask_NL)
    address_MX = record.addresses[mask_NL].astype(np.int64).reshape(len(sample_M), -1)
    weight_MX = record.weights[mask_NL].astype(np.float64).reshape(len(sample_M), -1)
    rows, place_MX = np.unique(address_MX, return_inverse=True)
    cell = (sample_M[:, None] * len(rows) + place_MX.reshape(address_MX.shape)).ravel()
    shape = (len(mask_NL), len(rows))
    weight = np.bincount(cell, weights=weight_MX.ravel(), minlength=shape[0] * shape[1])
    read = np.bincount(cell, minlength=shape[0] * shape[1]) > 0
    return np.where(read, weight, -1.0).reshape(shape)


def _difference(pairs_2P: FloatArray, is_same_P: BoolArray) -> FloatArray:
    """[2] mean over pairs about the same fact, less the mean over the others."""
    return pairs_2P[:, is_same_P].mean(axis=1) - pairs_2P[:, ~is_same_P].mean(axis=1)
