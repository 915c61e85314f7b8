"""What the metrics of the experts read: the recorded routing of some samples, or counts of it.

Almost every metric needs counts alone. They come from a record (`RoutingRecord.counts`) or, without any raw array, from
a capture's running summary (`RoutingCounts.from_summary`); the code that counts is the same. See
`hydra_lab.metrics.arrays` for the shape suffixes.
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
    summarized_group,
    tokens_at_least,
    valid_mask,
    weighted_counts,
)
from hydra_lab.summaries import WINDOWS, Summary, layers_of, position_edges
from hydra_lab.summaries.arrays import Samples
from hydra_lab.summaries.routing import Choices, count_choices, count_margins, count_tokens, weigh_positions
from hydra_lab.summaries.tokens import length_counts


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """Recorded routing of some samples.

    Attributes:
        layers: [Y] indices of the blocks.
        experts: [Y, N, C, K] chosen experts of each chunk, best first; entries of chunks past a sample's end
            are ignored.
        num_experts: E.
        chunk_size: tokens per chunk.
        length: [N] tokens of each sample.
        domains: [N] domain label of each sample.
        weights: [Y, N, L, K] weight of each chosen expert at each token, or None where it was not recorded.
        logits: [Y, N, C, E] the router's logits of each chunk, or None where they were not recorded.
        tokens: [N, L] token ids, or None where they were not read.
    """

    layers: tuple[int, ...]
    experts: IntArray
    num_experts: int
    chunk_size: int
    length: IntArray
    domains: tuple[str, ...]
    weights: AnyFloatArray | None = None
    logits: AnyFloatArray | None = None
    tokens: AnyIntArray | None = None

    def __post_init__(self) -> None:
        num_samples = len(self.length)
        check_shape("experts", self.experts, (len(self.layers), num_samples, None, None))
        num_layers, _, num_chunks, num_choices = self.experts.shape
        if len(self.domains) != num_samples:
            raise ValueError(f"domains has {len(self.domains)} labels for {num_samples} samples")
        if self.weights is not None:
            check_shape("weights", self.weights, (num_layers, num_samples, None, num_choices))
        if self.logits is not None:
            check_shape("logits", self.logits, (num_layers, num_samples, num_chunks, self.num_experts))
        if self.tokens is not None:
            check_shape("tokens", self.tokens, (num_samples, None))
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
        return self._choices.chosen.swapaxes(0, 1)

    @cached_property
    def _choices(self) -> Choices:
        names, domain_N = domain_codes(self.domains)
        return Choices(
            experts=self.experts.swapaxes(0, 1),
            samples=Samples(self.length, domain_N, len(names)),
            num_experts=self.num_experts,
            chunk_size=self.chunk_size,
        )

    @cached_property
    def counts(self) -> "RoutingCounts":
        """What the metrics need of the record, counted once."""
        counted: dict[str, Any] = dict(count_choices(self._choices))
        if self.weights is not None:
            edges = np.arange(self.weights.shape[2] + 1, dtype=np.int64)
            counted["edges"] = edges
            counted["weight_by_position"] = weigh_positions(self._choices, self.weights.swapaxes(0, 1), edges)
        if self.logits is not None:
            counted |= count_margins(self._choices, self.logits.swapaxes(0, 1))
        if self.tokens is not None:
            inside = self.tokens[valid_mask(self.length, self.tokens.shape[1])]
            vocab_size = int(inside.max()) + 1 if inside.size else 1
            counted["token_choices"] = count_tokens(self._choices, self.tokens, vocab_size)
        most_tokens = self.experts.shape[2] * self.chunk_size
        return RoutingCounts(
            layers=self.layers,
            domains=domain_codes(self.domains)[0],
            num_experts=self.num_experts,
            top_k=self.experts.shape[-1],
            chunk_size=self.chunk_size,
            length=length_counts(self._choices.samples, most_tokens),
            **counted,
        )


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Counts of the routing of some samples.

    Attributes:
        layers: [Y] indices of the blocks.
        domains: [Z] names of the domains that occur, in order of first appearance.
        num_experts: E.
        top_k: K, experts that a chunk chooses.
        chunk_size: tokens per chunk.
        length: [Z, L+1] samples of each domain with 0, 1, ... L tokens.
        chosen: [Y, Z, E] chunks that chose the expert, at any rank.
        first: [Y, Z, E] chunks whose first choice is the expert.
        by_chunk: [Y, C, E] samples whose c-th chunk chose the expert.
        pairs: [Y, E, E] chunks that chose both experts; on the diagonal, that chose the one.
        switched: [Y, Z] successive chunks of a sample whose first choice differs.
        kept: [Y, Z] experts that two successive chunks both chose, summed.
        used_in_window: [Y, W] different experts used, summed over all windows of `WINDOWS[w]` successive tokens.
        edges: [V+1] edges of the bins of positions, in tokens; None without weights.
        weight_by_position: [Y, V, E] sum over the bin's tokens of the weight on the expert; None without weights.
        margin_sum, margin_square: [Y, Z] sum over chunks of the margin and of its square (see
            `hydra_lab.metrics.router.routing_margin`); None without logits.
        margin_histogram: [Y, Z, *] chunks by their margin, between `hydra_lab.summaries.MARGIN_EDGES`; None without
            logits.
        token_choices: [Y, E, T] choices of the expert, at any rank, by the id (0..T-1) of the token served; None
            where it was not counted.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    num_experts: int
    top_k: int
    chunk_size: int
    length: IntArray
    chosen: IntArray
    first: IntArray
    by_chunk: IntArray
    pairs: IntArray
    switched: IntArray
    kept: IntArray
    used_in_window: IntArray
    edges: IntArray | None = None
    weight_by_position: FloatArray | None = None
    margin_sum: FloatArray | None = None
    margin_square: FloatArray | None = None
    margin_histogram: IntArray | None = None
    token_choices: IntArray | None = None

    @classmethod
    def from_summary(
        cls, summary: Summary, *, config: Mapping[str, Any], domains: Sequence[str]
    ) -> "RoutingCounts":
        """The counts that a capture's running summary holds.

        Args:
            config: the model's configuration as a dict.
            domains: the labels that the summary's axis `domain` runs over.

        Raises:
            ValueError: the summary holds no routing.
        """
        arrays, tokens = summarized_group(summary, "routing"), summary["tokens"]
        present: list[int] = domain_order(tokens["first_sample"]).tolist()
        by_domain = ("chosen", "first", "switched", "kept", "margin_sum", "margin_square", "margin_histogram")
        counted = {name: arrays[name][:, present] for name in by_domain if name in arrays}
        whole = ("by_chunk", "pairs", "used_in_window", "weight_by_position", "token_choices")
        counted |= {name: arrays[name] for name in whole if name in arrays}
        num_positions = tokens["length"].shape[1] - 1
        return cls(
            layers=layers_of(config, "routing"),
            domains=tuple(domains[z] for z in present),
            num_experts=int(config["moe_num_experts"]),
            top_k=int(config["moe_top_k"]),
            chunk_size=int(config["moe_chunk_size"]),
            length=tokens["length"][present],
            edges=position_edges(num_positions) if "weight_by_position" in arrays else None,
            **counted,
        )

    @property
    def num_samples(self) -> IntArray:
        """[Z] samples per domain."""
        return self.length.sum(axis=1)

    @property
    def num_chunks(self) -> IntArray:
        """[Z] chunks per domain, a sample's last perhaps partial."""
        return self.length @ self._chunks_of_length

    @property
    def num_pairs(self) -> IntArray:
        """[Z] successive pairs of chunks per domain."""
        return self.length @ np.maximum(0, self._chunks_of_length - 1)

    @property
    def samples_with_chunk(self) -> IntArray:
        """[C] samples that have a c-th chunk."""
        samples_by_chunks = weighted_counts(
            self._chunks_of_length, self.length.sum(axis=0), self.by_chunk.shape[1] + 1
        )
        return np.cumsum(samples_by_chunks[::-1])[::-1][1:].astype(np.int64)

    @property
    def samples_with_position(self) -> IntArray:
        """[L] samples that have a token at the position."""
        return tokens_at_least(self.length.sum(axis=0))

    @property
    def num_windows(self) -> IntArray:
        """[W] windows of `WINDOWS[w]` successive tokens of a sample."""
        windows = np.array(WINDOWS, dtype=np.int64)
        tokens = np.arange(self.length.shape[1], dtype=np.int64)
        starts = np.maximum(0, np.subtract.outer(tokens, windows) + 1)
        return self.length.sum(axis=0) @ starts

    @property
    def _chunks_of_length(self) -> IntArray:
        tokens = np.arange(self.length.shape[1], dtype=np.int64)
        return (tokens + self.chunk_size - 1) // self.chunk_size


Routing = RoutingRecord | RoutingCounts
"""What a metric of the experts takes."""


def counts_of(routing: Routing) -> RoutingCounts:
    """The counts of a record, or the counts themselves."""
    return routing.counts if isinstance(routing, RoutingRecord) else routing
