"""Metrics of where the probability of sparse attention goes: the window, the sink block or the selected blocks.

See `hydra_lab.metrics.arrays` for the shape suffixes; in addition Q stands for query heads. The mass of a token
sums to 1 over the three kinds; a key that qualifies twice counts for the first (`hydra_lab.taps.AttentionMass`).
`mass_by_kind` takes a record (`mass_record`) or, without any raw array, sums from a capture's running summary
(`summarized_mass`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    FloatArray,
    IntArray,
    binned_tokens,
    check_shape,
    ratio,
    rebinned,
    summarized_group,
    tokens_at_least,
)
from hydra_lab.metrics.attention import num_candidates
from hydra_lab.metrics.records import ALL, CaptureLike, Rows, SummarizedCapture, layers_of
from hydra_lab.summaries import Summary, position_edges
from hydra_lab.summaries import layers_of as layers_with
from hydra_lab.summaries.attention import sum_mass

KINDS = ("window", "sink", "selected")
"""Where attention goes, in the order of every `kind` axis."""


@dataclass(frozen=True, eq=False)
class MassRecord:
    """Recorded attention mass of all blocks that have attention.

    Attributes:
        layers: [Y] indices of the blocks.
        mass: [Y, N, L, Q, 3] share of each query head's probability by kind (`KINDS`), 0..1.
        length: [N] tokens of each sample; entries past it are ignored.
        window: tokens of the sliding window.
        block_size: tokens per block.
        num_selected: blocks that a query may select.
        tiled: whether the first token of a block-sized tile selects for the whole tile (`selection="tile"`).
    """

    layers: tuple[int, ...]
    mass: AnyFloatArray
    length: IntArray
    window: int
    block_size: int
    num_selected: int
    tiled: bool = False

    def __post_init__(self) -> None:
        check_shape("mass", self.mass, (len(self.layers), len(self.length), None, None, len(KINDS)))

    @cached_property
    def counts(self) -> "MassCounts":
        """What `mass_by_kind` needs of the record, counted once."""
        num_positions = self.mass.shape[2]
        edges = np.arange(num_positions + 1, dtype=np.int64)
        return MassCounts(
            layers=self.layers,
            length=np.bincount(self.length, minlength=num_positions + 1).astype(np.int64),
            edges=edges,
            mass_by_position=np.stack([sum_mass(mass_NLQ3, self.length, edges) for mass_NLQ3 in self.mass]),
            window=self.window,
            block_size=self.block_size,
            num_selected=self.num_selected,
            tiled=self.tiled,
        )


@dataclass(frozen=True, eq=False)
class MassCounts:
    """Sums of the attention mass of all blocks that have attention.

    Attributes:
        layers: [Y] indices of the blocks.
        length: [L+1] samples with 0, 1, ... L tokens.
        edges: [V+1] edges of the bins of positions, in tokens.
        mass_by_position: [Y, V, Q, 3] sum over the bin's tokens of the share of each query head's probability by kind.
        window, block_size, num_selected, tiled: as in `MassRecord`.
    """

    layers: tuple[int, ...]
    length: IntArray
    edges: IntArray
    mass_by_position: FloatArray
    window: int
    block_size: int
    num_selected: int
    tiled: bool = False

    @classmethod
    def from_summary(cls, summary: Summary, *, config: Mapping[str, Any]) -> "MassCounts":
        """The sums that a capture's running summary holds.

        Args:
            config: the model's configuration as a dict.

        Raises:
            ValueError: the summary holds no mass.
        """
        arrays = summarized_group(summary, "mass")
        length_L: IntArray = summary["tokens"]["length"].sum(axis=0)
        return cls(
            layers=layers_with(config, "mass"),
            length=length_L,
            edges=position_edges(len(length_L) - 1),
            mass_by_position=arrays["mass_by_position"],
            **_attention_of(config),
        )


Masses = MassRecord | MassCounts
"""What `mass_by_kind` takes."""


def mass_record(capture: CaptureLike, *, samples: Rows = ALL) -> MassRecord:
    """Attention mass of all blocks that have attention, from a capture that was asked for the signal "mass"."""
    config = capture.attributes["config"]
    mass = capture.plain("mass")["mass"].isel(sample=samples)
    assert tuple(mass["kind"].to_numpy()) == KINDS
    length = capture.plain("tokens")["length"].isel(sample=samples)
    return MassRecord(
        layers=layers_of(capture, "mass"),
        mass=mass.transpose("layer", "sample", "position", "query_head", "kind").to_numpy(),
        length=length.to_numpy().astype(np.int64),
        **_attention_of(config),
    )


def summarized_mass(capture: SummarizedCapture) -> MassCounts:
    """Attention mass of the whole capture, from its summary; `mass_by_kind` takes it in place of a record.

    Raises:
        ValueError: the summary holds no mass.
    """
    return MassCounts.from_summary(capture.summary, config=capture.attributes["config"])


def _attention_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "window": int(config["attention_window"]),
        "block_size": int(config["attention_block_size"]),
        "num_selected": int(config["attention_num_selected"]),
        "tiled": config["attention_selection"] == "tile",
    }


@dataclass(frozen=True, eq=False)
class MassByKind:
    """Share of the attention that the window, the sink and the selected blocks receive.

    Attributes:
        layers: [Y] indices of the blocks.
        by_head: [Y, Q, 3] mean over all tokens by query head and kind (`KINDS`); sums to 1 over the kinds.
        edges: [V+1] edges of the position bins, in tokens from the start of the sample.
        by_position: [Y, V, 3] mean over the bin's tokens and the heads; NaN where no sample is that long.
        keys: [3] share of the keys in view by kind, over all tokens: what `by_head` would be were all keys in view
            attended to alike. Selected blocks count as if drawn evenly from the candidates, which matters only for
            the one that may reach into the window.
        keys_by_position: [V, 3] the same by position.
        num_tokens: [V] tokens in the bin.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    by_head: FloatArray
    edges: IntArray
    by_position: FloatArray
    keys: FloatArray
    keys_by_position: FloatArray
    num_tokens: IntArray
    num_samples: int


def mass_by_kind(masses: Masses, num_bins: int = 64) -> MassByKind:
    """Where the attention goes, by block and query head and by position in `num_bins` bins; see `MassByKind`.

    Raises:
        ValueError: there is no token, or the counts' bins of positions cannot be put together to that many.
    """
    counts = masses.counts if isinstance(masses, MassRecord) else masses
    tokens_L = tokens_at_least(counts.length).astype(np.float64)
    if not tokens_L.any():
        raise ValueError("the record holds no token")
    edges, tokens_V = binned_tokens(counts.length, num_bins)
    mass_YVQ3 = rebinned(counts.mass_by_position, counts.edges, edges, axis=1)
    keys_L3 = keys_in_view(
        np.arange(len(tokens_L), dtype=np.int64),
        window=counts.window,
        block_size=counts.block_size,
        num_selected=counts.num_selected,
        tiled=counts.tiled,
    )
    share_L3 = keys_L3 / keys_L3.sum(axis=1, keepdims=True) * tokens_L[:, None]
    number_V1 = tokens_V[:, None].astype(np.float64)
    return MassByKind(
        layers=counts.layers,
        by_head=mass_YVQ3.sum(axis=1) / tokens_L.sum(),
        edges=edges,
        by_position=ratio(mass_YVQ3.mean(axis=2), number_V1),
        keys=share_L3.sum(axis=0) / tokens_L.sum(),
        keys_by_position=ratio(np.add.reduceat(share_L3, edges[:-1], axis=0), number_V1),
        num_tokens=tokens_V,
        num_samples=int(counts.length.sum()),
    )


def keys_in_view(
    position: IntArray, *, window: int, block_size: int, num_selected: int, tiled: bool = False
) -> FloatArray:
    """[L, 3] keys that a query at each absolute `position` sees by kind (`KINDS`), each counted for the first kind for
    which it qualifies; for the selected blocks the expected number were they drawn evenly from the candidates."""
    first_in_window = position + 1 - window
    sink = np.clip(first_in_window, 0, block_size)
    candidates = num_candidates(position, window=window, block_size=block_size, tiled=tiled)
    # Of the candidates only the last two can reach into the window; a query of a tile may have two that do.
    outside = (candidates * block_size).astype(np.float64)
    for block in (candidates, candidates - 1):
        inside = np.clip((block + 1) * block_size - first_in_window, 0, block_size)
        outside -= np.where(block >= 1, inside, 0)
    drawn = np.minimum(num_selected, candidates)
    selected = drawn * ratio(outside, candidates.astype(np.float64))
    selected = np.where(candidates > 0, selected, 0.0)
    return np.stack([np.minimum(position + 1, window), sink, selected], axis=1).astype(np.float64)
