"""What the metrics of the memory read: the recorded lookups of some samples, or counts of them.

Most metrics need counts alone. They come from a record (`LookupRecord.counts`) or, without any raw array, from a
capture's running summary (`LookupCounts.from_summary`); the code that counts is the same. See
`hydra_lab.metrics.arrays` for the shape suffixes. Row r of the value table is the pair of half keys
(r // n2, r % n2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    AnyIntArray,
    BoolArray,
    FloatArray,
    IntArray,
    check_shape,
    domain_codes,
    domain_order,
    summarized_block,
    valid_mask,
)
from hydra_lab.summaries import Summary
from hydra_lab.summaries.arrays import Samples
from hydra_lab.summaries.memory import MOST_ROW_CELLS, count_gates, count_reads
from hydra_lab.summaries.tokens import length_counts


@dataclass(frozen=True, eq=False)
class LookupRecord:
    """Recorded lookups of one block.

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
    def mask(self) -> BoolArray:
        """[N, L] True at the sample's own tokens."""
        return valid_mask(self.length, self.tokens.shape[1])

    def mass(self) -> FloatArray:
        """[R] sum of the read weights that fell on each row (each token spreads 1 per head)."""
        return self.counts.weight

    @cached_property
    def counts(self) -> "LookupCounts":
        """What the metrics need of the record, counted once."""
        domains, domain_N = domain_codes(self.domains)
        samples = Samples(self.length, domain_N, len(domains))
        counted: dict[str, Any] = dict(count_reads(self.addresses, self.weights, samples, self.num_rows))
        counted |= count_gates(self.gate, samples)
        return LookupCounts(
            layer=self.layer,
            num_keys=self.num_keys,
            num_heads=self.addresses.shape[2],
            domains=domains,
            length=length_counts(samples, self.tokens.shape[1]),
            **counted,
        )


@dataclass(frozen=True, eq=False)
class LookupCounts:
    """Counts of the lookups of one block.

    Attributes:
        layer: index of the block.
        num_keys: (n1, n2) half keys; the table has R = n1 * n2 rows.
        num_heads: H.
        domains: [Z] names of the domains that occur, in order of first appearance.
        length: [Z, L+1] samples of each domain with 0, 1, ... L tokens.
        weight: [R] sum of the read weights that fell on each row (each token spreads 1 per head).
        reads: [R] reads (token, head, k) of each row.
        gate_sum, gate_square: [Z] sum over samples of the sample's mean gate beta and of its square.
        gate_histogram: [Z, 1001] tokens by their gate beta, in thousandths.
        weight_by_domain, reads_by_domain: [Z, R] the same by the token's domain; None where the table is too large.
        weight_by_head, reads_by_head: [H, R] the same by the head that reads; None where the table is too large.
    """

    layer: int
    num_keys: tuple[int, int]
    num_heads: int
    domains: tuple[str, ...]
    length: IntArray
    weight: FloatArray
    reads: IntArray
    gate_sum: FloatArray
    gate_square: FloatArray
    gate_histogram: IntArray
    weight_by_domain: FloatArray | None = None
    reads_by_domain: IntArray | None = None
    weight_by_head: FloatArray | None = None
    reads_by_head: IntArray | None = None

    @classmethod
    def from_summary(
        cls, summary: Summary, layer: int, *, config: Mapping[str, Any], domains: Sequence[str]
    ) -> "LookupCounts":
        """The counts of one block that a capture's running summary holds.

        Args:
            config: the model's configuration as a dict.
            domains: the labels that the summary's axis `domain` runs over.

        Raises:
            ValueError: the summary holds no memory, or the block has none.
        """
        block = summarized_block(summary, "memory", layer, config)
        present: list[int] = domain_order(summary["tokens"]["first_sample"]).tolist()
        by_domain = ("gate_sum", "gate_square", "gate_histogram", "weight_by_domain", "reads_by_domain")
        counted = {name: block[name][present] for name in by_domain if name in block}
        whole = ("weight", "reads", "weight_by_head", "reads_by_head")
        n1, n2 = config["memory_num_keys"]
        return cls(
            layer=layer,
            num_keys=(int(n1), int(n2)),
            num_heads=int(config["memory_num_heads"]),
            domains=tuple(domains[z] for z in present),
            length=summary["tokens"]["length"][present],
            **counted,
            **{name: block[name] for name in whole if name in block},
        )

    @property
    def num_rows(self) -> int:
        """R, rows of the value table."""
        return self.num_keys[0] * self.num_keys[1]

    @property
    def num_reads(self) -> int:
        """Reads (token, head, k)."""
        return int(self.reads.sum())

    @property
    def num_samples(self) -> IntArray:
        """[Z] samples per domain that hold a token."""
        return self.length[:, 1:].sum(axis=1)

    @property
    def num_tokens(self) -> IntArray:
        """[Z] tokens per domain."""
        return self.length @ np.arange(self.length.shape[1], dtype=np.int64)

    def by_domain(self) -> tuple[FloatArray, IntArray]:
        """`weight_by_domain` and `reads_by_domain`.

        Raises:
            ValueError: they were not counted.
        """
        if self.weight_by_domain is None or self.reads_by_domain is None:
            raise self._too_large("domain", len(self.domains))
        return self.weight_by_domain, self.reads_by_domain

    def by_head(self) -> tuple[FloatArray, IntArray]:
        """`weight_by_head` and `reads_by_head`.

        Raises:
            ValueError: they were not counted.
        """
        if self.weight_by_head is None or self.reads_by_head is None:
            raise self._too_large("head", self.num_heads)
        return self.weight_by_head, self.reads_by_head

    def _too_large(self, what: str, number: int) -> ValueError:
        return ValueError(
            f"reads are not counted by {what} for {self.num_rows:,} rows and {number} {what}s: "
            f"more than {MOST_ROW_CELLS:,} numbers"
        )


Lookups = LookupRecord | LookupCounts
"""What a metric of the memory takes."""


def counts_of(lookups: Lookups) -> LookupCounts:
    """The counts of a record, or the counts themselves."""
    return lookups.counts if isinstance(lookups, LookupRecord) else lookups
