"""Metrics of the chunk-level mixture of experts: load, preference, co-activation, switching.

See `hydra_lab.metrics.arrays` for the shape suffixes. Routing is decided once per chunk, so the unit of
counting is the chunk; chunks of one sample are not independent, so `num_samples` is the sample size to reason
with. All but `routing_map` read counts alone, so they take a record or counts (`hydra_lab.metrics.routing_counts`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics.arrays import BoolArray, FloatArray, IntArray, bin_edges, ratio, rebinned
from hydra_lab.metrics.routing_counts import Routing, RoutingRecord, counts_of


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """How the chunks' choices spread over the experts.

    Attributes:
        layers: [Y] indices of the blocks.
        share: [Y, E] share of all top-k choices that fall on the expert; sums to 1 over E. Uniform: 1/E.
        first_share: [Y, E] the same for the first choice alone.
        dead: [Y, E] True where no chunk chose the expert.
        imbalance: [Y] largest load over the mean load, unused experts counted as zero (1 uniform, E all on
            one).
        entropy: [Y] entropy of `share` over log E (1 uniform, 0 all on one).
        num_chunks: chunks counted in each block.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    share: FloatArray
    first_share: FloatArray
    dead: BoolArray
    imbalance: FloatArray
    entropy: FloatArray
    num_chunks: int
    num_samples: int


def expert_load(routing: Routing) -> ExpertLoad:
    """Load of each expert, with the dead ones; see `ExpertLoad`."""
    counts = counts_of(routing)
    chosen_YE = counts.chosen.sum(axis=1).astype(np.float64)
    first_YE = counts.first.sum(axis=1).astype(np.float64)
    share_YE = ratio(chosen_YE, chosen_YE.sum(axis=-1, keepdims=True))
    return ExpertLoad(
        layers=counts.layers,
        share=share_YE,
        first_share=ratio(first_YE, first_YE.sum(axis=-1, keepdims=True)),
        dead=chosen_YE == 0,
        imbalance=ratio(chosen_YE.max(axis=-1), chosen_YE.mean(axis=-1)),
        entropy=_relative_entropy(share_YE),
        num_chunks=int(counts.num_chunks.sum()),
        num_samples=int(counts.num_samples.sum()),
    )


def _relative_entropy(share_YE: FloatArray) -> FloatArray:
    """Entropy over the last axis divided by the log of its size; 1 for a single entry."""
    size = share_YE.shape[-1]
    if size == 1:
        return np.ones(share_YE.shape[:-1])
    safe = np.where(share_YE > 0, share_YE, 1.0)
    return -(share_YE * np.log(safe)).sum(axis=-1) / np.log(size)


@dataclass(frozen=True, eq=False)
class ExpertByDomain:
    """Which experts each domain's chunks choose.

    Attributes:
        layers: [Y] indices of the blocks.
        domains: [Z] names of the domains.
        share: [Y, Z, E] share of the domain's top-k choices that fall on the expert; sums to 1 over E.
        lift: [Y, Z, E] log2 of `share` over its unweighted mean over the domains: 0 no preference, 1 twice
            the mean, -inf never chosen there, NaN chosen nowhere.
        num_chunks: [Z] chunks per domain.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    share: FloatArray
    lift: FloatArray
    num_chunks: IntArray
    num_samples: IntArray


def expert_by_domain(routing: Routing) -> ExpertByDomain:
    """Share of each expert in each domain's choices; see `ExpertByDomain`."""
    counts = counts_of(routing)
    chosen_YZE = counts.chosen.astype(np.float64)
    share = ratio(chosen_YZE, chosen_YZE.sum(axis=-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.log2(share / share.mean(axis=1, keepdims=True))
    return ExpertByDomain(
        layers=counts.layers,
        domains=counts.domains,
        share=share,
        lift=lift,
        num_chunks=counts.num_chunks,
        num_samples=counts.num_samples,
    )


@dataclass(frozen=True, eq=False)
class ExpertByChunk:
    """Which experts are chosen as the text goes on.

    Attributes:
        layers: [Y] indices of the blocks.
        chunk_size: tokens per chunk.
        share: [Y, C, E] share of the top-k choices at the c-th chunk that fall on the expert; sums to 1 over
            E; NaN where no sample is that long.
        num_samples: [C] samples that have a c-th chunk.
    """

    layers: tuple[int, ...]
    chunk_size: int
    share: FloatArray
    num_samples: IntArray


def expert_by_chunk(routing: Routing) -> ExpertByChunk:
    """Share of each expert by the index of the chunk in its sample; see `ExpertByChunk`."""
    counts = counts_of(routing)
    by_chunk_YCE = counts.by_chunk.astype(np.float64)
    return ExpertByChunk(
        layers=counts.layers,
        chunk_size=counts.chunk_size,
        share=ratio(by_chunk_YCE, by_chunk_YCE.sum(axis=-1, keepdims=True)),
        num_samples=counts.samples_with_chunk,
    )


@dataclass(frozen=True, eq=False)
class ExpertByPosition:
    """Weight that each expert carries, by the token's position in the text.

    Attributes:
        layers: [Y] indices of the blocks.
        edges: [V+1] edges of the position bins, in tokens from the start of the sample.
        weight: [Y, V, E] mean over the bin's tokens of the weight on the expert (0 where it was not chosen);
            sums to 1 over E; NaN where no sample is that long.
        num_tokens: [V] tokens in the bin.
    """

    layers: tuple[int, ...]
    edges: IntArray
    weight: FloatArray
    num_tokens: IntArray


def expert_by_position(routing: Routing, num_bins: int = 64) -> ExpertByPosition:
    """Mean weight of each expert by position, in `num_bins` bins.

    Raises:
        ValueError: the routing carries no token weights, or was counted in bins that those asked for would cut.
    """
    counts = counts_of(routing)
    if counts.weight_by_position is None or counts.edges is None:
        raise ValueError("expert_by_position needs the token weights of the routing; this record has none")
    edges = bin_edges(int(counts.edges[-1]), num_bins)
    num_tokens_V = np.add.reduceat(counts.samples_with_position[: edges[-1]], edges[:-1])
    weight_YVE = rebinned(counts.weight_by_position, counts.edges, edges, axis=1)
    return ExpertByPosition(
        layers=counts.layers,
        edges=edges,
        weight=ratio(weight_YVE, num_tokens_V[None, :, None].astype(np.float64)),
        num_tokens=num_tokens_V,
    )


@dataclass(frozen=True, eq=False)
class CoActivation:
    """Which experts serve the same chunk, over all pairs of the top-k (not only neighbours in rank).

    Attributes:
        layers: [Y] indices of the blocks.
        probability: [Y, E, E] share of chunks that chose both experts; on the diagonal, that chose the
            expert. Symmetric. Off the diagonal it sums to K(K-1).
        lift: [Y, E, E] the pair's probability over what the two loads alone would give (their product, scaled
            so that the pairs of the block sum to the same); 1 no affinity; NaN on the diagonal and where an
            expert is dead.
        num_chunks: chunks counted in each block.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    probability: FloatArray
    lift: FloatArray
    num_chunks: int
    num_samples: int


def co_activation(routing: Routing) -> CoActivation:
    """Joint use of experts over all pairs of the top-k; see `CoActivation`."""
    counts = counts_of(routing)
    num_chunks = int(counts.num_chunks.sum())
    probability = counts.pairs / max(num_chunks, 1)
    diagonal = np.eye(counts.num_experts, dtype=bool)
    load_YE = np.diagonal(probability, axis1=1, axis2=2)
    pairs = np.where(diagonal, 0.0, probability)
    expected = np.where(diagonal, 0.0, load_YE[:, :, None] * load_YE[:, None, :])
    scale = ratio(pairs.sum(axis=(1, 2)), expected.sum(axis=(1, 2)))
    return CoActivation(
        layers=counts.layers,
        probability=probability,
        lift=ratio(pairs, np.where(diagonal, 0.0, expected * scale[:, None, None])),
        num_chunks=num_chunks,
        num_samples=int(counts.num_samples.sum()),
    )


@dataclass(frozen=True, eq=False)
class SwitchRate:
    """How often the routing changes from one chunk of a sample to the next.

    Attributes:
        layers: [Y] indices of the blocks.
        domains: [Z] names of the domains.
        first: [Y] share of successive chunks whose first choice differs.
        replaced: [Y] mean share of the top-k set that is replaced from one chunk to the next.
        first_if_independent: [Y] what `first` would be were chunks drawn independently from the block's load
            of first choices: 1 - sum share^2.
        first_by_domain: [Y, Z] `first` within each domain; NaN where it has no successive chunks.
        num_pairs: [Z] successive pairs of chunks per domain.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    first: FloatArray
    replaced: FloatArray
    first_if_independent: FloatArray
    first_by_domain: FloatArray
    num_pairs: IntArray
    num_samples: IntArray


def switch_rate(routing: Routing) -> SwitchRate:
    """Rate of change of the routing along the text; see `SwitchRate`."""
    counts = counts_of(routing)
    switched_YZ = counts.switched.astype(np.float64)
    num_pairs_Z = counts.num_pairs.astype(np.float64)
    total = num_pairs_Z.sum()
    return SwitchRate(
        layers=counts.layers,
        domains=counts.domains,
        first=ratio(switched_YZ.sum(axis=1), total),
        replaced=1.0 - ratio(counts.kept.sum(axis=1).astype(np.float64), counts.top_k * total),
        first_if_independent=1.0 - (expert_load(counts).first_share ** 2).sum(axis=-1),
        first_by_domain=ratio(switched_YZ, num_pairs_Z),
        num_pairs=counts.num_pairs,
        num_samples=counts.num_samples,
    )


@dataclass(frozen=True, eq=False)
class RoutingMap:
    """The routing of one text, chunk by chunk.

    Attributes:
        layers: [Y] indices of the blocks.
        experts: [Y, C, K] chosen experts of each chunk, best first.
        weights: [Y, C, K] mean weight over the chunk's tokens, or NaN where weights were not recorded.
        num_experts: E.
        chunk_size: tokens per chunk.
        num_tokens: tokens of the text.
    """

    layers: tuple[int, ...]
    experts: IntArray
    weights: FloatArray
    num_experts: int
    chunk_size: int
    num_tokens: int


def routing_map(record: RoutingRecord, sample: int = 0) -> RoutingMap:
    """The routing of one sample; see `RoutingMap`.

    Raises:
        ValueError: there is no such sample.
    """
    if not 0 <= sample < len(record.length):
        raise ValueError(f"sample {sample} is not among the {len(record.length)} recorded")
    length, num_chunks = int(record.length[sample]), int(record.chunks[sample])
    experts: NDArray[np.int64] = record.experts[:, sample, :num_chunks]
    if record.weights is None:
        weights = np.full(experts.shape, np.nan)
    else:
        chunk_L = np.arange(length) // record.chunk_size
        member_CL = (chunk_L == np.arange(num_chunks)[:, None]).astype(np.float64)
        member_CL /= member_CL.sum(axis=1, keepdims=True)
        weights = np.einsum("cl,ylk->yck", member_CL, record.weights[:, sample, :length].astype(np.float64))
    return RoutingMap(
        layers=record.layers,
        experts=experts,
        weights=weights,
        num_experts=record.num_experts,
        chunk_size=record.chunk_size,
        num_tokens=length,
    )
