"""How the router decides: by how much, for how many tokens in a row, and how early in training.

See `hydra_lab.metrics.arrays` for the shape suffixes; W is a number of windows' lengths, T of checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray, domain_codes, histogram_quantiles, ratio
from hydra_lab.metrics.routing_counts import Routing, RoutingCounts, RoutingRecord, counts_of
from hydra_lab.summaries import MARGIN_EDGES, WINDOWS

NEAR_TIE = 0.125
"""A margin below this, in logits, is a near tie: the expert left out was at least exp(-1/8) = 88% as probable."""


@dataclass(frozen=True, eq=False)
class RoutingMargin:
    """How far the chunks were from another expert.

    The margin of a chunk is the logit of the last of its chosen experts less the best logit of those left out. The
    router took the first of the two to be exp(margin) times as probable as the second. It is 0 at a tie, and below 0
    only where the router was overruled. (For K = 1 it is the margin between the two best classes of Scheffer et al.
    2001, in log odds.)

    Attributes:
        layers: [Y] indices of the blocks.
        domains: [Z] names of the domains.
        mean: [Y, Z] mean margin, logits; NaN where there is none.
        deviation: [Y, Z] standard deviation over chunks.
        quantiles: [Y, Z, 5] 5, 25, 50, 75 and 95% quantiles over chunks, to a sixteenth of an octave (4%); margins
            below 2^-10 as 0.
        near_tie: [Y, Z] share of chunks whose margin is below `NEAR_TIE`.
        num_chunks: [Z] chunks per domain.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    mean: FloatArray
    deviation: FloatArray
    quantiles: FloatArray
    near_tie: FloatArray
    num_chunks: IntArray
    num_samples: IntArray


def routing_margin(routing: Routing) -> RoutingMargin:
    """How much another expert would have needed to be chosen, by block and domain; see `RoutingMargin`.

    Raises:
        ValueError: the routing carries no logits, or no expert is left out.
    """
    counts = counts_of(routing)
    if counts.margin_histogram is None or counts.margin_sum is None or counts.margin_square is None:
        raise ValueError("routing_margin needs the router's logits; this routing has none")
    if counts.top_k == counts.num_experts:
        raise ValueError(f"all {counts.num_experts} experts are chosen, so there is none to be far from")
    number_YZ = counts.margin_histogram.sum(axis=-1).astype(np.float64)
    mean_YZ = ratio(counts.margin_sum, number_YZ)
    variance_YZ = ratio(counts.margin_square, number_YZ) - mean_YZ**2
    below = counts.margin_histogram[..., MARGIN_EDGES[1:] <= NEAR_TIE].sum(axis=-1)
    return RoutingMargin(
        layers=counts.layers,
        domains=counts.domains,
        mean=mean_YZ,
        deviation=np.sqrt(np.maximum(0.0, variance_YZ)),
        quantiles=histogram_quantiles(
            counts.margin_histogram, _middles(MARGIN_EDGES), [0.05, 0.25, 0.5, 0.75, 0.95]
        ),
        near_tie=ratio(below.astype(np.float64), number_YZ),
        num_chunks=counts.num_chunks,
        num_samples=counts.num_samples,
    )


def _middles(edges: FloatArray) -> FloatArray:
    """[V] geometric middle of each bin between edges that lie symmetrically around zero; the outermost bins, which
    have none, are given their inner edge."""
    low, high = edges[:-1], edges[1:]
    with np.errstate(invalid="ignore"):
        middles = np.sign(low + high) * np.sqrt(np.abs(low * high))
    middles[low < 0] = np.where(np.isinf(low[low < 0]), high[low < 0], middles[low < 0])
    middles[np.isinf(high)] = low[np.isinf(high)]
    middles[(low < 0) & (high > 0)] = 0.0
    return middles


@dataclass(frozen=True, eq=False)
class ExpertSparsity:
    """Share of the experts that a run of tokens leaves unused.

    The sparsity of a window of tokens is the share of the block's experts that none of them uses. BlockFFN (Song et
    al., arXiv 2507.08771) calls its mean over single tokens token-level sparsity (TLS) and over runs of L successive
    tokens chunk-level sparsity (CLS_L): 1 - mean over windows and experts of "any of the tokens used the expert".
    Windows are all runs of L tokens inside a sample, starting at every token. Since the tokens of a routing chunk share
    their experts, TLS is 1 - K / E here; CLS_L says how much of the model a device must hold for the next L tokens.

    Attributes:
        layers: [Y] indices of the blocks.
        windows: [W] lengths of the windows, tokens; the first is 1.
        sparsity: [Y, W] CLS of each length, 0..1; at length 1 it is TLS. NaN where no sample is that long.
        if_independent: [Y, W] what it would be were each chunk's experts drawn independently with the block's load.
        num_windows: [W] windows counted.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    windows: IntArray
    sparsity: FloatArray
    if_independent: FloatArray
    num_windows: IntArray
    num_samples: int

    @property
    def token_sparsity(self) -> FloatArray:
        """[Y] TLS, the sparsity of single tokens."""
        return self.sparsity[:, 0]


def expert_sparsity(routing: Routing) -> ExpertSparsity:
    """Token- and chunk-level sparsity of the experts; see `ExpertSparsity`."""
    counts = counts_of(routing)
    num_windows_W = counts.num_windows
    places_W = (num_windows_W * counts.num_experts).astype(np.float64)
    load_YE = ratio(counts.chosen.sum(axis=1).astype(np.float64), float(counts.num_chunks.sum()))
    independent = np.stack([_independent(counts, load_YE, window) for window in WINDOWS], axis=1)
    return ExpertSparsity(
        layers=counts.layers,
        windows=np.array(WINDOWS, dtype=np.int64),
        sparsity=1.0 - ratio(counts.used_in_window.astype(np.float64), places_W),
        if_independent=np.where(num_windows_W > 0, independent, np.nan),
        num_windows=num_windows_W,
        num_samples=int(counts.num_samples.sum()),
    )


def _independent(counts: RoutingCounts, load_YE: FloatArray, window: int) -> FloatArray:
    """[Y] expected sparsity of a window that starts anywhere in a chunk, were its chunks independent draws."""
    whole, rest = divmod(window - 1, counts.chunk_size)
    late = rest / counts.chunk_size  # share of the starts from which the window reaches one chunk further
    unused_YE = (1 - load_YE) ** (whole + 1)
    return ((1 - late) * unused_YE + late * unused_YE * (1 - load_YE)).mean(axis=-1)


@dataclass(frozen=True, eq=False)
class RouterSaturation:
    """How early in training the router settles on the experts that it ends up choosing.

    Router saturation (OLMoE, Muennighoff et al., arXiv 2409.02060) at a checkpoint t is the share of a chunk's K
    experts that the final checkpoint T chooses for the same chunk of the same text, whatever their order:
    |E_t ∩ E_T| / K, averaged over chunks.

    Attributes:
        layers: [Y] indices of the blocks.
        checkpoints: [T] labels of the earlier checkpoints, in order.
        domains: [Z] names of the domains.
        saturation: [T, Y] mean share of the experts that are the final ones, 0..1.
        by_domain: [T, Y, Z] the same within each domain.
        if_independent: [T, Y] what it would be were both checkpoints' choices drawn independently with their own loads.
        num_chunks: chunks compared.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    checkpoints: tuple[str, ...]
    domains: tuple[str, ...]
    saturation: FloatArray
    by_domain: FloatArray
    if_independent: FloatArray
    num_chunks: int
    num_samples: int


def router_saturation(
    earlier: Sequence[RoutingRecord], final: RoutingRecord, *, labels: Sequence[str] | None = None
) -> RouterSaturation:
    """Overlap of earlier checkpoints' routing with a final one's; see `RouterSaturation`.

    Args:
        earlier: the routing of the same texts by each earlier checkpoint.
        final: the routing by the last one.
        labels: names of the earlier checkpoints ("step 1000"); their places unless given.

    Raises:
        ValueError: a record is of other texts, blocks or experts than the final one.
    """
    names = [str(place) for place in range(len(earlier))] if labels is None else list(labels)
    if len(names) != len(earlier):
        raise ValueError(f"{len(names)} labels for {len(earlier)} checkpoints")
    for record, name in zip(earlier, names, strict=True):
        for what in ("layers", "num_experts", "chunk_size", "domains"):
            if getattr(record, what) != getattr(final, what):
                raise ValueError(
                    f"checkpoint {name} has {what} {getattr(record, what)}, the final one {getattr(final, what)}"
                )
        if not np.array_equal(record.length, final.length):
            raise ValueError(f"checkpoint {name} has samples of other lengths than the final one")
        if record.experts.shape != final.experts.shape:
            raise ValueError(
                f"checkpoint {name} has experts {record.experts.shape}, the final one {final.experts.shape}"
            )
    domains, domain_N = domain_codes(final.domains)
    member_NZ = np.eye(len(domains))[domain_N]
    chunks_Z = final.chunks @ member_NZ
    last_YNCE, top_k = final.chosen, final.experts.shape[-1]
    last_load_YE = last_YNCE.sum(axis=(1, 2)) / max(1, int(final.chunks.sum()))
    num_earlier, num_layers = len(earlier), len(final.layers)
    whole_TY, independent_TY = np.zeros((2, num_earlier, num_layers))
    by_domain_TYZ = np.zeros((num_earlier, num_layers, len(domains)))
    for t, record in enumerate(earlier):
        chosen_YNCE = record.chosen
        common_YZ = (chosen_YNCE & last_YNCE).sum(axis=(2, 3)) @ member_NZ
        load_YE = chosen_YNCE.sum(axis=(1, 2)) / max(1, int(final.chunks.sum()))
        by_domain_TYZ[t] = ratio(common_YZ, top_k * chunks_Z)
        whole_TY[t] = ratio(common_YZ.sum(axis=-1), float(top_k * chunks_Z.sum()))
        independent_TY[t] = (load_YE * last_load_YE).sum(axis=-1) / top_k
    return RouterSaturation(
        layers=final.layers,
        checkpoints=tuple(names),
        domains=domains,
        saturation=whole_TY,
        by_domain=by_domain_TYZ,
        if_independent=independent_TY,
        num_chunks=int(final.chunks.sum()),
        num_samples=len(final.length),
    )
