"""Metrics of the product-key memory of one block: coverage, concentration, gate, and what an address stands
for.

See `hydra_lab.metrics.arrays` for the shape suffixes. Row r of the value table is the pair of half keys
(r // n2, r % n2). All but `top_tokens` read counts alone, so they take a record or counts
(`hydra_lab.metrics.memory_counts`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics.arrays import FloatArray, IntArray, histogram_quantiles, ratio, weighted_counts
from hydra_lab.metrics.memory_counts import LookupCounts, LookupRecord, Lookups, counts_of
from hydra_lab.summaries import SHARE_STEPS


@dataclass(frozen=True, eq=False)
class MemoryUse:
    """How much of the memory is read, and how evenly.

    Evenness is measured twice: by weight, what the rows contribute, and by reads, how often they are fetched. With few
    reads per row chance alone looks uneven, so the measures by reads come with what as many reads falling evenly at
    random would give (each row read a Poisson number of times).

    Attributes:
        layer: index of the block.
        used_share: share of the R rows read at least once, 0..1.
        used_share_if_uniform: the share that as many reads would touch if they fell evenly at random.
        kl_to_uniform: Kullback-Leibler divergence of the read weight's distribution over rows from the
            uniform one, nats; 0 even, log R all on one row.
        kl_of_reads: the same of the number of reads.
        kl_of_reads_if_uniform: that of as many reads that fall evenly at random.
        gini: Gini coefficient of the read weight over all R rows; 0 even, 1 - 1/R all on one row.
        gini_of_reads: the same of the number of reads.
        gini_of_reads_if_uniform: that of as many reads that fall evenly at random.
        coverage_rows: [V] numbers of rows k, ascending, the last one R.
        coverage: [V] share of the read weight that the k rows with the largest weight hold.
        coverage_of_reads: [V] share of the reads that the k most read rows hold.
        num_rows: R.
        num_reads: (token, head, k) reads counted.
        num_tokens: tokens they come from.
        num_samples: samples those come from.
    """

    layer: int
    used_share: float
    used_share_if_uniform: float
    kl_to_uniform: float
    kl_of_reads: float
    kl_of_reads_if_uniform: float
    gini: float
    gini_of_reads: float
    gini_of_reads_if_uniform: float
    coverage_rows: IntArray
    coverage: FloatArray
    coverage_of_reads: FloatArray
    num_rows: int
    num_reads: int
    num_tokens: int
    num_samples: int


def memory_use(lookups: Lookups) -> MemoryUse:
    """Used share, KL to uniform, Gini and top-k coverage of the memory's rows; see `MemoryUse`.

    Raises:
        ValueError: there is no read.
    """
    counts = counts_of(lookups)
    if counts.num_reads == 0 or counts.weight.sum() == 0:
        raise ValueError("the record holds no memory read")
    return MemoryUse(
        layer=counts.layer,
        **_evenness(counts.weight, counts.reads),
        num_rows=counts.num_rows,
        num_reads=counts.num_reads,
        num_tokens=int(counts.num_tokens.sum()),
        num_samples=int(counts.length.sum()),
    )


@dataclass(frozen=True, eq=False)
class MemoryUseByGroup:
    """How much of the memory each domain, or each head, reads, and how evenly: `MemoryUse` for each of them.

    Attributes:
        layer: index of the block.
        kind: "domain" or "head".
        groups: [Q] names of the domains, or numbers of the heads.
        use: [Q] the use by each; `num_tokens` and `num_samples` are the group's own.
        shared: [Q, Q] share of the rows that one group reads which the other reads too:
            |R_q ∩ R_p| / |R_q| for row q and column p; 1 on the diagonal.
        weight_in_common: [Q, Q] sum over rows of the smaller of the two groups' shares of their read weight, 0 (no row
            in common) to 1 (the same rows, as strongly); symmetric.
    """

    layer: int
    kind: str
    groups: tuple[str, ...]
    use: tuple[MemoryUse, ...]
    shared: FloatArray
    weight_in_common: FloatArray


def memory_use_by_domain(lookups: Lookups) -> MemoryUseByGroup:
    """`memory_use` of each domain's tokens; see `MemoryUseByGroup`. Domains without a read are left out.

    Raises:
        ValueError: there is no read, or reads were not counted by domain.
    """
    counts = counts_of(lookups)
    weight_ZR, reads_ZR = counts.by_domain()
    num_tokens_Z, num_samples_Z = counts.num_tokens, counts.length.sum(axis=1)
    return _by_group("domain", counts, counts.domains, weight_ZR, reads_ZR, num_tokens_Z, num_samples_Z)


def memory_use_by_head(lookups: Lookups) -> MemoryUseByGroup:
    """`memory_use` of each head; see `MemoryUseByGroup`.

    Raises:
        ValueError: there is no read, or reads were not counted by head.
    """
    counts = counts_of(lookups)
    weight_HR, reads_HR = counts.by_head()
    every = np.ones(counts.num_heads, dtype=np.int64)
    num_tokens_H, num_samples_H = every * counts.num_tokens.sum(), every * counts.length.sum()
    names = [str(head) for head in range(counts.num_heads)]
    return _by_group("head", counts, names, weight_HR, reads_HR, num_tokens_H, num_samples_H)


def _by_group(
    kind: str,
    counts: LookupCounts,
    names: Sequence[str],
    weight_QR: FloatArray,
    reads_QR: IntArray,
    num_tokens_Q: IntArray,
    num_samples_Q: IntArray,
) -> MemoryUseByGroup:
    read: list[int] = np.flatnonzero(weight_QR.sum(axis=1)).tolist()
    if len(read) == 0:
        raise ValueError("the record holds no memory read")
    share_QR = weight_QR[read] / weight_QR[read].sum(axis=1, keepdims=True)
    used_QR = (reads_QR[read] > 0).astype(np.float64)
    return MemoryUseByGroup(
        layer=counts.layer,
        kind=kind,
        groups=tuple(names[q] for q in read),
        use=tuple(
            MemoryUse(
                layer=counts.layer,
                **_evenness(weight_QR[q], reads_QR[q]),
                num_rows=counts.num_rows,
                num_reads=int(reads_QR[q].sum()),
                num_tokens=int(num_tokens_Q[q]),
                num_samples=int(num_samples_Q[q]),
            )
            for q in read
        ),
        shared=(used_QR @ used_QR.T) / used_QR.sum(axis=1, keepdims=True),
        weight_in_common=np.stack([np.minimum(row, share_QR).sum(axis=1) for row in share_QR]),
    )


def _evenness(weight_R: FloatArray, reads_R: IntArray) -> dict[str, Any]:
    """The fields of `MemoryUse` that follow from what the rows hold."""
    num_rows, num_reads = len(weight_R), int(reads_R.sum())
    ks = np.unique(np.round(np.geomspace(1, num_rows, 64)).astype(np.int64))
    weight_share_R, read_share_R = (np.sort(each / each.sum())[::-1] for each in (weight_R, reads_R))
    random_kl, random_gini = _evenness_at_random(num_reads / num_rows)
    return {
        "used_share": float((reads_R > 0).mean()),
        "used_share_if_uniform": _touched_share(num_reads, num_rows),
        "kl_to_uniform": _kl_to_uniform(weight_share_R),
        "kl_of_reads": _kl_to_uniform(read_share_R),
        "kl_of_reads_if_uniform": random_kl,
        "gini": gini(weight_share_R),
        "gini_of_reads": gini(read_share_R),
        "gini_of_reads_if_uniform": random_gini,
        "coverage_rows": ks,
        "coverage": np.cumsum(weight_share_R)[ks - 1],
        "coverage_of_reads": np.cumsum(read_share_R)[ks - 1],
    }


def _touched_share(num_reads: int, num_rows: int) -> float:
    """Share of the rows that reads falling evenly at random touch."""
    return float(-np.expm1(num_reads * np.log1p(-1 / num_rows))) if num_rows > 1 else 1.0


def _kl_to_uniform(share_R: FloatArray) -> float:
    positive = share_R[share_R > 0]
    return max(0.0, float((positive * np.log(positive * len(share_R))).sum()))


def _evenness_at_random(mean: float) -> tuple[float, float]:
    """KL to uniform (nats) and Gini coefficient of many numbers that are Poisson with this mean."""
    widest = 12 * np.sqrt(mean) + 30  # what lies beyond has a probability below 1e-20
    lowest, highest = max(0, int(mean - widest)), int(mean + widest)
    number = np.arange(lowest, highest + 1, dtype=np.float64)
    log_factorial = np.cumsum(np.log(np.maximum(1.0, np.arange(highest + 1, dtype=np.float64))))[lowest:]
    probability = np.exp(number * np.log(mean) - mean - log_factorial)
    relative = number / mean
    kl = (probability * relative * np.log(np.where(relative > 0, relative, 1.0))).sum()
    # the mean absolute difference of two draws is 2 sum F (1 - F); Gini is half of it over the mean
    below = np.cumsum(probability)
    return float(kl), float((below * np.maximum(0.0, 1 - below)).sum() / mean)


def gini(mass: FloatArray) -> float:
    """Gini coefficient of non-negative masses [R]: mean absolute difference over twice the mean.

    0 when all are equal, 1 - 1/R when one holds all.
    """
    if mass.ndim != 1 or mass.min() < 0 or mass.sum() <= 0:
        raise ValueError("mass must be one axis of non-negative numbers with a positive sum")
    ascending = np.sort(mass)
    size = len(mass)
    rank = 2 * np.arange(1, size + 1) - size - 1
    return float((rank * ascending).sum() / (size * ascending.sum()))


@dataclass(frozen=True, eq=False)
class BetaByDomain:
    """The memory gate by domain.

    Attributes:
        layer: index of the block.
        domains: [Z] names of the domains.
        mean: [Z] mean over samples of the sample's mean gate, 0..1.
        error: [Z] standard error of that mean over the samples; NaN for a single sample.
        quantiles: [Z, 5] 5, 25, 50, 75 and 95% quantiles of the gate over tokens, to half a thousandth.
        num_samples: [Z] samples per domain.
        num_tokens: [Z] tokens per domain.
    """

    layer: int
    domains: tuple[str, ...]
    mean: FloatArray
    error: FloatArray
    quantiles: FloatArray
    num_samples: IntArray
    num_tokens: IntArray


def beta_by_domain(lookups: Lookups) -> BetaByDomain:
    """Mean and spread of the gate beta in each domain; see `BetaByDomain`. Empty samples are left out."""
    counts = counts_of(lookups)
    number_Z = counts.num_samples.astype(np.float64)
    mean_Z = ratio(counts.gate_sum, number_Z)
    squares_Z = np.maximum(0.0, counts.gate_square - counts.gate_sum * np.nan_to_num(mean_Z))
    variance_Z = ratio(squares_Z, np.maximum(0.0, number_Z - 1))
    steps = np.arange(SHARE_STEPS + 1) / SHARE_STEPS
    return BetaByDomain(
        layer=counts.layer,
        domains=counts.domains,
        mean=mean_Z,
        error=np.sqrt(ratio(variance_Z, number_Z)),
        quantiles=histogram_quantiles(counts.gate_histogram, steps, [0.05, 0.25, 0.5, 0.75, 0.95]),
        num_samples=counts.num_samples,
        num_tokens=counts.num_tokens,
    )


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The tokens that read one row of the memory most.

    Attributes:
        layer: index of the block.
        address: row of the value table; half keys (address // n2, address % n2).
        tokens: [V] token ids, by falling weight.
        weight: [V] sum of the read weight that the token put on the row.
        count: [V] reads of the row by the token.
        example: [V, 2] (sample, position) of the token's heaviest read of the row.
        num_reads: reads of the row by any token.
        num_tokens: tokens searched.
    """

    layer: int
    address: int
    tokens: IntArray
    weight: FloatArray
    count: IntArray
    example: IntArray
    num_reads: int
    num_tokens: int


def top_tokens(record: LookupRecord, address: int, num_tokens: int = 10) -> TopTokens:
    """The `num_tokens` token ids that read row `address` most; see `TopTokens`.

    Raises:
        ValueError: there is no such row.
    """
    if not 0 <= address < record.num_rows:
        raise ValueError(f"address {address} is not among the memory's {record.num_rows} rows")
    hit = (record.addresses == address) & record.mask[:, :, None, None]
    sample, position, _, _ = np.nonzero(hit)
    weight = record.weights[hit].astype(np.float64)
    token = record.tokens[sample, position]
    ids, inverse = np.unique(token, return_inverse=True)
    total = weighted_counts(inverse, weight, len(ids))
    count = np.bincount(inverse, minlength=len(ids))
    by_weight = np.argsort(-weight, kind="stable")
    _, first = np.unique(inverse[by_weight], return_index=True)
    example = np.stack([sample, position], axis=-1)[by_weight[first]]
    order = np.argsort(-total, kind="stable")[:num_tokens]
    return TopTokens(
        layer=record.layer,
        address=address,
        tokens=ids[order].astype(np.int64),
        weight=total[order],
        count=count[order].astype(np.int64),
        example=example[order].astype(np.int64),
        num_reads=len(weight),
        num_tokens=int(record.mask.sum()),
    )


@dataclass(frozen=True, eq=False)
class MemoryMap:
    """Read weight over the grid of half keys, pooled and quantised so that a browser can draw it.

    Attributes:
        layer: index of the block.
        level: [rows, columns] uint8; the cell's read weight is `expm1(level / 255 * log1p(peak))`, so 0 is
            never read and 255 the most read cell.
        peak: read weight of the most read cell.
        cell: (rows, columns) of the n1 x n2 grid that one cell sums over; the last cells may hold fewer.
        num_keys: (n1, n2).
        num_tokens: tokens counted; each spreads a weight of 1 per head.
        num_samples: samples they come from.
    """

    layer: int
    level: NDArray[np.uint8]
    peak: float
    cell: tuple[int, int]
    num_keys: tuple[int, int]
    num_tokens: int
    num_samples: int

    @property
    def weight(self) -> FloatArray:
        """[rows, columns] read weight of each cell, to the precision of its level."""
        return np.expm1(self.level / 255.0 * np.log1p(self.peak))


def memory_map(lookups: Lookups, max_size: int = 512) -> MemoryMap:
    """Read weight of each row of the memory as an n1 x n2 map of at most `max_size` x `max_size` cells."""
    counts = counts_of(lookups)
    pooled, cell = _pooled(counts.weight, counts.num_keys, max_size)
    peak = float(pooled.max())
    scaled = np.log1p(pooled) / np.log1p(peak) if peak > 0 else np.zeros_like(pooled)
    level = np.ceil(255 * scaled - 1e-9).astype(np.uint8)
    return MemoryMap(
        layer=counts.layer,
        level=level,
        peak=peak,
        cell=cell,
        num_keys=counts.num_keys,
        num_tokens=int(counts.num_tokens.sum()),
        num_samples=int(counts.length.sum()),
    )


def _pooled(
    value_R: FloatArray, num_keys: tuple[int, int], max_size: int
) -> tuple[FloatArray, tuple[int, int]]:
    """Sums of a value of each row over the cells of a map, and the (rows, columns) of half keys per cell."""
    n1, n2 = num_keys
    cell = (-(-n1 // max_size), -(-n2 // max_size))
    rows = np.add.reduceat(value_R.reshape(n1, n2), np.arange(0, n1, cell[0]), axis=0)
    return np.add.reduceat(rows, np.arange(0, n2, cell[1]), axis=1), cell


@dataclass(frozen=True, eq=False)
class DeadAddresses:
    """The rows of the memory that no token read.

    Attributes:
        layer: index of the block.
        addresses: [*] the rows never read, ascending.
        share: their share of all R rows, 0..1.
        share_if_uniform: the share that as many reads falling evenly at random would leave unread.
        dead_first_keys: [*] first half keys all of whose rows are unread, ascending.
        dead_second_keys: [*] second half keys all of whose rows are unread, ascending.
        map: [rows, columns] share of each cell's rows that is unread, 0..1.
        cell: (rows, columns) of the n1 x n2 grid that one cell stands for; the last cells may hold fewer.
        num_keys: (n1, n2).
        num_reads: (token, head, k) reads counted.
        num_tokens: tokens they come from.
        num_samples: samples those come from.
    """

    layer: int
    addresses: IntArray
    share: float
    share_if_uniform: float
    dead_first_keys: IntArray
    dead_second_keys: IntArray
    map: FloatArray
    cell: tuple[int, int]
    num_keys: tuple[int, int]
    num_reads: int
    num_tokens: int
    num_samples: int


def dead_addresses(lookups: Lookups, max_size: int = 128) -> DeadAddresses:
    """The rows that were never read, and where they lie, on a map of at most `max_size` x `max_size` cells; see
    `DeadAddresses`. How many there are depends on how much was read: compare with `share_if_uniform`."""
    counts = counts_of(lookups)
    dead_R = counts.reads == 0
    grid = dead_R.reshape(counts.num_keys)
    pooled, cell = _pooled(dead_R.astype(np.float64), counts.num_keys, max_size)
    size, _ = _pooled(np.ones(counts.num_rows), counts.num_keys, max_size)
    return DeadAddresses(
        layer=counts.layer,
        addresses=np.flatnonzero(dead_R).astype(np.int64),
        share=float(dead_R.mean()),
        share_if_uniform=1 - _touched_share(counts.num_reads, counts.num_rows),
        dead_first_keys=np.flatnonzero(grid.all(axis=1)).astype(np.int64),
        dead_second_keys=np.flatnonzero(grid.all(axis=0)).astype(np.int64),
        map=pooled / size,
        cell=cell,
        num_keys=counts.num_keys,
        num_reads=counts.num_reads,
        num_tokens=int(counts.num_tokens.sum()),
        num_samples=int(counts.length.sum()),
    )
