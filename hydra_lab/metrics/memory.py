"""Metrics of the product-key memory of one block: coverage, concentration, gate, and what an address stands
for.

See `hydra_lab.metrics.arrays` for the shape suffixes. Row r of the value table is the pair of half keys
(r // n2, r % n2).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    AnyIntArray,
    FloatArray,
    IntArray,
    check_shape,
    domain_codes,
    ratio,
    valid_mask,
    weighted_counts,
)

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class LookupRecord:
    """Recorded lookups of one block: what the metrics below read.

    Attributes:
        layer: index of the block.
        addresses: [N, L, H, K] rows of the value table, best first; entries past a sample's end are ignored.
        weights: [N, L, H, K] softmax weights of those rows.
        gate: [N, L] the memory gate beta, 0..1.
        tokens: [N, L] token ids.
        length: [N] tokens of each sample.
        domains: [N] domain label of each sample.
        num_keys: (n1, n2) half keys; the table has R = n1 * n2 rows.
    """

    layer: int
    addresses: AnyIntArray
    weights: AnyFloatArray
    gate: AnyFloatArray
    tokens: AnyIntArray
    length: IntArray
    domains: tuple[str, ...]
    num_keys: tuple[int, int]

    def __post_init__(self) -> None:
        num_samples, num_positions = self.tokens.shape
        check_shape("addresses", self.addresses, (num_samples, num_positions, None, None))
        check_shape("weights", self.weights, self.addresses.shape)
        check_shape("gate", self.gate, (num_samples, num_positions))
        check_shape("length", self.length, (num_samples,))
        if len(self.domains) != num_samples:
            raise ValueError(f"domains has {len(self.domains)} labels for {num_samples} samples")
        read = self.addresses[self.mask]
        if read.size and (read.min() < 0 or read.max() >= self.num_rows):
            raise ValueError(f"addresses holds {read.min()}..{read.max()}, expected 0..{self.num_rows - 1}")

    @property
    def num_rows(self) -> int:
        """R, rows of the value table."""
        return self.num_keys[0] * self.num_keys[1]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[N, L] True at the sample's own tokens."""
        return valid_mask(self.length, self.tokens.shape[1])

    def mass(self) -> FloatArray:
        """[R] sum of the read weights that fell on each row (each token spreads 1 per head)."""
        mass_R = np.zeros(self.num_rows)
        mask = self.mask
        for start in range(0, len(mask), _ROWS_AT_ONCE):  # counting widens its input: not all at once
            rows = slice(start, start + _ROWS_AT_ONCE)
            mass_R += weighted_counts(
                self.addresses[rows][mask[rows]], self.weights[rows][mask[rows]], self.num_rows
            )
        return mass_R


@dataclass(frozen=True, eq=False)
class MemoryUse:
    """How much of the memory is read, and how evenly.

    Attributes:
        layer: index of the block.
        used_share: share of the R rows read at least once, 0..1.
        used_share_if_uniform: the share that as many reads would touch if they fell evenly at random.
        kl_to_uniform: Kullback-Leibler divergence of the read weight's distribution over rows from the
            uniform one, nats; 0 even, log R all on one row.
        gini: Gini coefficient of the read weight over all R rows; 0 even, 1 - 1/R all on one row.
        coverage_rows: [V] numbers of rows k, ascending, the last one R.
        coverage: [V] share of the read weight that the k most read rows hold.
        num_rows: R.
        num_reads: (token, head, k) reads counted.
        num_tokens: tokens they come from.
        num_samples: samples those come from.
    """

    layer: int
    used_share: float
    used_share_if_uniform: float
    kl_to_uniform: float
    gini: float
    coverage_rows: IntArray
    coverage: FloatArray
    num_rows: int
    num_reads: int
    num_tokens: int
    num_samples: int


def memory_use(record: LookupRecord) -> MemoryUse:
    """Used share, KL to uniform, Gini and top-k coverage of the memory's rows; see `MemoryUse`.

    Raises:
        ValueError: the record holds no token.
    """
    mass_R = record.mass()
    num_tokens = int(record.mask.sum())
    if num_tokens == 0 or mass_R.sum() == 0:
        raise ValueError("the record holds no memory read")
    num_rows = record.num_rows
    num_reads = num_tokens * record.addresses.shape[2] * record.addresses.shape[3]
    read = np.zeros(num_rows, dtype=bool)
    read[record.addresses[record.mask].ravel()] = True
    share_R = np.sort(mass_R / mass_R.sum())[::-1]
    positive = share_R[share_R > 0]
    ks = np.unique(np.round(np.geomspace(1, num_rows, 64)).astype(np.int64))
    return MemoryUse(
        layer=record.layer,
        used_share=float(read.mean()),
        used_share_if_uniform=float(-np.expm1(num_reads * np.log1p(-1 / num_rows))) if num_rows > 1 else 1.0,
        kl_to_uniform=max(0.0, float((positive * np.log(positive * num_rows)).sum())),
        gini=gini(share_R),
        coverage_rows=ks,
        coverage=np.cumsum(share_R)[ks - 1],
        num_rows=num_rows,
        num_reads=num_reads,
        num_tokens=num_tokens,
        num_samples=len(record.length),
    )


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
        quantiles: [Z, 5] 5, 25, 50, 75 and 95% quantiles of the gate over tokens.
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


def beta_by_domain(record: LookupRecord) -> BetaByDomain:
    """Mean and spread of the gate beta in each domain; see `BetaByDomain`. Empty samples are left out."""
    names, codes = domain_codes(record.domains)
    mask = record.mask
    mean, error = np.full((2, len(names)), np.nan)
    quantiles = np.full((len(names), 5), np.nan)
    num_samples, num_tokens = np.zeros((2, len(names)), dtype=np.int64)
    gate = np.where(mask, record.gate, 0.0).astype(np.float64)
    per_sample_N = ratio(gate.sum(axis=1), record.length.astype(np.float64))
    for z in range(len(names)):
        rows = (codes == z) & (record.length > 0)
        num_samples[z], num_tokens[z] = rows.sum(), record.length[rows].sum()
        if num_samples[z] == 0:
            continue
        mean[z] = per_sample_N[rows].mean()
        if num_samples[z] > 1:
            error[z] = per_sample_N[rows].std(ddof=1) / np.sqrt(num_samples[z])
        quantiles[z] = np.quantile(gate[rows][mask[rows]], [0.05, 0.25, 0.5, 0.75, 0.95])
    return BetaByDomain(record.layer, names, mean, error, quantiles, num_samples, num_tokens)


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


def memory_map(record: LookupRecord, max_size: int = 512) -> MemoryMap:
    """Read weight of each row of the memory as an n1 x n2 map of at most `max_size` x `max_size` cells."""
    n1, n2 = record.num_keys
    cell = (-(-n1 // max_size), -(-n2 // max_size))
    grid = record.mass().reshape(n1, n2)
    pooled = np.add.reduceat(
        np.add.reduceat(grid, np.arange(0, n1, cell[0]), axis=0), np.arange(0, n2, cell[1]), axis=1
    )
    peak = float(pooled.max())
    scaled = np.log1p(pooled) / np.log1p(peak) if peak > 0 else np.zeros_like(pooled)
    level = np.ceil(255 * scaled - 1e-9).astype(np.uint8)
    return MemoryMap(
        record.layer, level, peak, cell, record.num_keys, int(record.mask.sum()), len(record.length)
    )
