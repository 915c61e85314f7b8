"""What the metrics of the state-space path read: the recorded states of some samples, or counts of them.

Size and half-life need counts alone. They come from a record (`StateRecord.counts`) or, without any raw array, from a
capture's running summary (`StateCounts.from_summary`); the code that counts is the same. Growth, saturation and reach
look at every sample by itself and need the record. See `hydra_lab.metrics.arrays` for the shape suffixes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    FloatArray,
    IntArray,
    check_shape,
    domain_codes,
    domain_order,
    histogram_quantiles,
    needs_record,
    summarized_block,
    total_tokens,
    valid_mask,
)
from hydra_lab.summaries import DECAY_EDGES, Summary, position_edges
from hydra_lab.summaries.arrays import Samples
from hydra_lab.summaries.ssm import sum_decays, sum_norms
from hydra_lab.summaries.tokens import length_counts

_QUANTILES = (0.95, 0.05)


@dataclass(frozen=True, eq=False)
class StateRecord:
    """Recorded states of one block.

    Attributes:
        layer: index of the block.
        norms: [N, C, H] Frobenius norm of each head's state at the end of each chunk.
        decay: [N, L, H] natural log of the factor by which the state decays at each token (<= 0).
        length: [N] tokens of each sample; entries past it are ignored.
        chunk_size: tokens per chunk.
        domains: [N] domain label of each sample; empty where they were not read.
    """

    layer: int
    norms: AnyFloatArray
    decay: AnyFloatArray
    length: IntArray
    chunk_size: int
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_samples, num_chunks, num_heads = self.norms.shape
        check_shape("decay", self.decay, (num_samples, None, num_heads))
        check_shape("length", self.length, (num_samples,))
        if self.domains and len(self.domains) != num_samples:
            raise ValueError(f"domains has {len(self.domains)} labels, the record {num_samples} samples")
        if num_samples and -(-int(self.length.max()) // self.chunk_size) > num_chunks:
            raise ValueError(
                f"norms has {num_chunks} chunks of {self.chunk_size} tokens, "
                f"the longest sample has {self.length.max()} tokens"
            )

    @cached_property
    def counts(self) -> "StateCounts":
        """What the metrics need of the record, counted once."""
        num_positions, num_heads = self.decay.shape[1:]
        domains, domain_N = domain_codes(self.domains or ("",) * len(self.length))
        samples = Samples(self.length, domain_N, len(domains))
        edges = np.arange(num_positions + 1, dtype=np.int64)
        rate_MH = -self.decay[valid_mask(self.length, num_positions)].astype(np.float32)
        counted: dict[str, Any] = dict(sum_norms(self.norms, self.length, self.chunk_size))
        counted |= sum_decays(self.decay, samples, edges)
        return StateCounts(
            layer=self.layer,
            chunk_size=self.chunk_size,
            domains=domains if self.domains else (),
            length=length_counts(samples, num_positions),
            edges=edges,
            rate_quantiles=np.quantile(rate_MH, _QUANTILES, axis=0).T.astype(np.float64)
            if len(rate_MH)
            else np.full((num_heads, 2), np.nan),
            **counted,
        )


@dataclass(frozen=True, eq=False)
class StateCounts:
    """Counts of the states of one block.

    Attributes:
        layer: index of the block.
        chunk_size: tokens per chunk.
        domains: [Z] names of the domains that occur, in order of first appearance; empty where they were not read, and
            then all samples stand in one row of what follows.
        length: [Z, L+1] samples of each domain with 0, 1, ... L tokens.
        norm_sum, norm_square: [C, H] sum over the samples that reach the chunk's end of the state's norm there (unit of
            the state) and of its square.
        last_norm_sum, last_norm_square: [H] the same over the samples that end inside a chunk, at their end.
        edges: [V+1] edges of the bins of positions, in tokens.
        decay_by_position: [V, H] sum over the bin's tokens of the log decay (<= 0).
        decay_by_domain: [Z, H] sum over the domain's tokens of the log decay.
        rate_quantiles: [H, 2] 95 and 5% quantiles over tokens of minus the log decay; from a summary off by up to
            4.4% (a sixteenth of an octave), those above 64 given as 64; NaN where there is no token.
    """

    layer: int
    chunk_size: int
    domains: tuple[str, ...]
    length: IntArray
    norm_sum: FloatArray
    norm_square: FloatArray
    last_norm_sum: FloatArray
    last_norm_square: FloatArray
    edges: IntArray
    decay_by_position: FloatArray
    decay_by_domain: FloatArray
    rate_quantiles: FloatArray

    @classmethod
    def from_summary(
        cls, summary: Summary, layer: int, *, config: Mapping[str, Any], domains: Sequence[str]
    ) -> "StateCounts":
        """The counts of one block that a capture's running summary holds.

        Args:
            config: the model's configuration as a dict.
            domains: the labels that the summary's axis `domain` runs over.

        Raises:
            ValueError: the summary holds no states, or there is no such block.
        """
        block = summarized_block(summary, "ssm", layer, config)
        present: list[int] = domain_order(summary["tokens"]["first_sample"]).tolist()
        length = summary["tokens"]["length"][present]
        summed = ("norm_sum", "norm_square", "last_norm_sum", "last_norm_square", "decay_by_position")
        # The first bin begins at 0 (nothing decays), the last one has no end.
        rates = np.concatenate([[0.0], np.sqrt(DECAY_EDGES[1:-2] * DECAY_EDGES[2:-1]), DECAY_EDGES[-2:-1]])
        return cls(
            layer=layer,
            chunk_size=int(config["ssm_chunk_size"]),
            domains=tuple(domains[z] for z in present),
            length=length,
            edges=position_edges(length.shape[1] - 1),
            decay_by_domain=block["decay_by_domain"][present],
            rate_quantiles=histogram_quantiles(block["decay_histogram"], rates, _QUANTILES),
            **{name: block[name] for name in summed},
        )

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.length.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens."""
        return total_tokens(self.length.sum(axis=0))


States = StateRecord | StateCounts
"""What a metric of the states takes."""


def counts_of(states: States) -> StateCounts:
    """The counts of a record, or the counts themselves."""
    return states.counts if isinstance(states, StateRecord) else states


def record_for(metric: str, states: States) -> StateRecord:
    """The record that `metric` needs.

    Raises:
        ValueError: `states` are counts.
    """
    if not isinstance(states, StateRecord):
        raise needs_record(metric, "state_record")
    return states
