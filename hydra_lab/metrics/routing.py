"""Metrics of the chunk-level mixture of experts: load, preference, co-activation, switching.

See `hydra_lab.metrics.arrays` for the shape suffixes. Routing is decided once per chunk, so the unit of
counting is the chunk; chunks of one sample are not independent, so `num_samples` is the sample size to reason
with.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    BoolArray,
    FloatArray,
    IntArray,
    bin_edges,
    check_shape,
    domain_codes,
    ratio,
    valid_mask,
    weighted_counts,
)


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """Recorded routing of some samples: what the metrics below read.

    Attributes:
        layers: [Y] indices of the blocks.
        experts: [Y, N, C, K] chosen experts of each chunk, best first; entries of chunks past a sample's end
            are ignored.
        num_experts: E.
        chunk_size: tokens per chunk.
        length: [N] tokens of each sample.
        domains: [N] domain label of each sample.
        weights: [Y, N, L, K] weight of each chosen expert at each token, or None where it was not recorded.
    """

    layers: tuple[int, ...]
    experts: IntArray
    num_experts: int
    chunk_size: int
    length: IntArray
    domains: tuple[str, ...]
    weights: AnyFloatArray | None = None

    def __post_init__(self) -> None:
        num_samples = len(self.length)
        check_shape("experts", self.experts, (len(self.layers), num_samples, None, None))
        num_layers, _, num_chunks, num_choices = self.experts.shape
        if len(self.domains) != num_samples:
            raise ValueError(f"domains has {len(self.domains)} labels for {num_samples} samples")
        if self.weights is not None:
            check_shape("weights", self.weights, (num_layers, num_samples, None, num_choices))
        if num_samples and int(self.chunks.max()) > num_chunks:
            raise ValueError(
                f"experts has {num_chunks} chunks, the longest sample has {int(self.chunks.max())}"
            )
        chosen = self.experts[:, self.chunk_mask]
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.num_experts):
            raise ValueError(
                f"experts holds {chosen.min()}..{chosen.max()}, expected 0..{self.num_experts - 1}"
            )

    @property
    def chunks(self) -> IntArray:
        """[N] chunks of each sample, the last perhaps partial."""
        return -(-self.length // self.chunk_size)

    @property
    def chunk_mask(self) -> BoolArray:
        """[N, C] True where the chunk holds tokens of the sample."""
        return valid_mask(self.chunks, self.experts.shape[2])

    @property
    def chosen(self) -> BoolArray:
        """[Y, N, C, E] whether the expert is among the chunk's top-k; False past a sample's end."""
        chosen = np.zeros((*self.experts.shape[:3], self.num_experts), dtype=bool)
        inside = np.clip(self.experts, 0, self.num_experts - 1)
        np.put_along_axis(chosen, inside, True, axis=-1)
        return chosen & self.chunk_mask[None, :, :, None]


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


def expert_load(record: RoutingRecord) -> ExpertLoad:
    """Load of each expert, with the dead ones; see `ExpertLoad`."""
    counts_YE = record.chosen.sum(axis=(1, 2)).astype(np.float64)
    first_YNC = record.experts[..., 0]
    first_YE = np.stack(
        [np.bincount(layer[record.chunk_mask], minlength=record.num_experts) for layer in first_YNC]
    ).astype(np.float64)
    share_YE = ratio(counts_YE, counts_YE.sum(axis=-1, keepdims=True))
    return ExpertLoad(
        layers=record.layers,
        share=share_YE,
        first_share=ratio(first_YE, first_YE.sum(axis=-1, keepdims=True)),
        dead=counts_YE == 0,
        imbalance=ratio(counts_YE.max(axis=-1), counts_YE.mean(axis=-1)),
        entropy=_relative_entropy(share_YE),
        num_chunks=int(record.chunk_mask.sum()),
        num_samples=len(record.length),
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


def expert_by_domain(record: RoutingRecord) -> ExpertByDomain:
    """Share of each expert in each domain's choices; see `ExpertByDomain`."""
    names, codes = domain_codes(record.domains)
    per_sample_YNE = record.chosen.sum(axis=2).astype(np.float64)
    member_ZN = (codes == np.arange(len(names))[:, None]).astype(np.float64)
    counts_YZE = np.einsum("zn,yne->yze", member_ZN, per_sample_YNE)
    share = ratio(counts_YZE, counts_YZE.sum(axis=-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.log2(share / share.mean(axis=1, keepdims=True))
    return ExpertByDomain(
        layers=record.layers,
        domains=names,
        share=share,
        lift=lift,
        num_chunks=np.array(
            [int(record.chunks[codes == z].sum()) for z in range(len(names))], dtype=np.int64
        ),
        num_samples=member_ZN.sum(axis=1).astype(np.int64),
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


def expert_by_chunk(record: RoutingRecord) -> ExpertByChunk:
    """Share of each expert by the index of the chunk in its sample; see `ExpertByChunk`."""
    counts_YCE = record.chosen.sum(axis=1).astype(np.float64)
    return ExpertByChunk(
        layers=record.layers,
        chunk_size=record.chunk_size,
        share=ratio(counts_YCE, counts_YCE.sum(axis=-1, keepdims=True)),
        num_samples=record.chunk_mask.sum(axis=0).astype(np.int64),
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


def expert_by_position(record: RoutingRecord, num_bins: int = 64) -> ExpertByPosition:
    """Mean weight of each expert by position, in `num_bins` bins.

    Raises:
        ValueError: the record carries no token weights.
    """
    if record.weights is None:
        raise ValueError("expert_by_position needs the token weights of the routing; this record has none")
    num_layers, _, num_positions, _ = record.weights.shape
    edges = bin_edges(num_positions, num_bins)
    num_bins = len(edges) - 1
    position_L = np.arange(num_positions, dtype=np.int64)
    chunk_L = position_L // record.chunk_size
    valid_NL = valid_mask(record.length, num_positions)
    bin_NL = np.broadcast_to(np.searchsorted(edges, position_L, side="right") - 1, valid_NL.shape)
    num_tokens = np.bincount(bin_NL[valid_NL], minlength=num_bins)
    weight = np.zeros((num_layers, num_bins, record.num_experts))
    for y in range(num_layers):
        cell_MK = bin_NL[valid_NL][:, None] * record.num_experts + record.experts[y][:, chunk_L][valid_NL]
        mass = weighted_counts(cell_MK, record.weights[y][valid_NL], num_bins * record.num_experts)
        weight[y] = mass.reshape(num_bins, record.num_experts)
    return ExpertByPosition(
        layers=record.layers,
        edges=edges,
        weight=ratio(weight, num_tokens[None, :, None].astype(np.float64)),
        num_tokens=num_tokens.astype(np.int64),
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


def co_activation(record: RoutingRecord) -> CoActivation:
    """Joint use of experts over all pairs of the top-k; see `CoActivation`."""
    num_chunks = int(record.chunk_mask.sum())
    chosen_YME = record.chosen[:, record.chunk_mask].astype(np.float64)
    probability = np.einsum("yme,ymf->yef", chosen_YME, chosen_YME) / max(num_chunks, 1)
    diagonal = np.eye(record.num_experts, dtype=bool)
    load_YE = np.diagonal(probability, axis1=1, axis2=2)
    pairs = np.where(diagonal, 0.0, probability)
    expected = np.where(diagonal, 0.0, load_YE[:, :, None] * load_YE[:, None, :])
    scale = ratio(pairs.sum(axis=(1, 2)), expected.sum(axis=(1, 2)))
    return CoActivation(
        layers=record.layers,
        probability=probability,
        lift=ratio(pairs, np.where(diagonal, 0.0, expected * scale[:, None, None])),
        num_chunks=num_chunks,
        num_samples=len(record.length),
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


def switch_rate(record: RoutingRecord) -> SwitchRate:
    """Rate of change of the routing along the text; see `SwitchRate`."""
    names, codes = domain_codes(record.domains)
    mask_NC = record.chunk_mask
    pair_NC = mask_NC[:, 1:]
    first_YNC = record.experts[..., 0]
    differs_YNC = (first_YNC[:, :, 1:] != first_YNC[:, :, :-1]) & pair_NC
    chosen = record.chosen
    kept_YNC = (chosen[:, :, 1:] & chosen[:, :, :-1]).sum(axis=-1)
    replaced_YNC = (1.0 - kept_YNC / record.experts.shape[-1]) * pair_NC
    num_pairs_Z = np.array([pair_NC[codes == z].sum() for z in range(len(names))], dtype=np.int64)
    differs_YZ = np.stack([differs_YNC[:, codes == z].sum(axis=(1, 2)) for z in range(len(names))], axis=1)
    total = np.float64(num_pairs_Z.sum())
    load = expert_load(record).first_share
    return SwitchRate(
        layers=record.layers,
        domains=names,
        first=ratio(differs_YZ.sum(axis=1).astype(np.float64), np.array(total)),
        replaced=ratio(replaced_YNC.sum(axis=(1, 2)), np.array(total)),
        first_if_independent=1.0 - (load**2).sum(axis=-1),
        first_by_domain=ratio(differs_YZ.astype(np.float64), num_pairs_Z.astype(np.float64)),
        num_pairs=num_pairs_Z,
        num_samples=np.array([(codes == z).sum() for z in range(len(names))], dtype=np.int64),
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
