"""Metrics of where the probability of sparse attention goes: the window, the sink block or the selected blocks.

See `hydra_lab.metrics.arrays` for the shape suffixes; in addition Q stands for query heads. The mass of a token
sums to 1 over the three kinds; a key that qualifies twice counts for the first (`hydra_lab.taps.AttentionMass`).
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import (
    AnyFloatArray,
    FloatArray,
    IntArray,
    bin_edges,
    check_shape,
    ratio,
    valid_mask,
)
from hydra_lab.metrics.attention import num_candidates
from hydra_lab.metrics.records import ALL, CaptureLike, Rows, layers_of

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


def mass_record(capture: CaptureLike, *, samples: Rows = ALL) -> MassRecord:
    """Attention mass of all blocks that have attention, from a capture that was asked for the signal "mass"."""
    config = capture.attributes["config"]
    mass = capture["mass"]["mass"].isel(sample=samples)
    assert tuple(mass["kind"].to_numpy()) == KINDS
    length = capture["tokens"]["length"].isel(sample=samples)
    return MassRecord(
        layers=layers_of(capture, "mass"),
        mass=mass.transpose("layer", "sample", "position", "query_head", "kind").to_numpy(),
        length=length.to_numpy().astype(np.int64),
        window=int(config["attention_window"]),
        block_size=int(config["attention_block_size"]),
        num_selected=int(config["attention_num_selected"]),
        tiled=config["attention_selection"] == "tile",
    )


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


def mass_by_kind(record: MassRecord, num_bins: int = 64) -> MassByKind:
    """Where the attention goes, by block and query head and by position in `num_bins` bins; see `MassByKind`.

    Raises:
        ValueError: the record holds no token.
    """
    num_layers, num_samples, num_positions, num_heads, num_kinds = record.mass.shape
    valid_NL = valid_mask(record.length, num_positions)
    if not valid_NL.any():
        raise ValueError("the record holds no token")
    edges = bin_edges(num_positions, num_bins)
    tokens_L = valid_NL.sum(axis=0).astype(np.float64)
    tokens_V = np.add.reduceat(tokens_L, edges[:-1])
    by_head_YQ3 = np.zeros((num_layers, num_heads, num_kinds))
    by_position_YV3 = np.zeros((num_layers, len(edges) - 1, num_kinds))
    for y, mass_NLQ3 in enumerate(record.mass):
        sum_LQ3 = mass_NLQ3.sum(axis=0, where=valid_NL[..., None, None], dtype=np.float64)
        by_head_YQ3[y] = sum_LQ3.sum(axis=0) / tokens_L.sum()
        sum_V3 = np.add.reduceat(sum_LQ3.mean(axis=1), edges[:-1], axis=0)
        by_position_YV3[y] = ratio(sum_V3, tokens_V[:, None])

    keys_L3 = keys_in_view(
        np.arange(num_positions, dtype=np.int64),
        window=record.window,
        block_size=record.block_size,
        num_selected=record.num_selected,
        tiled=record.tiled,
    )
    share_L3 = keys_L3 / keys_L3.sum(axis=1, keepdims=True) * tokens_L[:, None]
    return MassByKind(
        layers=record.layers,
        by_head=by_head_YQ3,
        edges=edges,
        by_position=by_position_YV3,
        keys=share_L3.sum(axis=0) / tokens_L.sum(),
        keys_by_position=ratio(np.add.reduceat(share_L3, edges[:-1], axis=0), tokens_V[:, None]),
        num_tokens=tokens_V.astype(np.int64),
        num_samples=num_samples,
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
