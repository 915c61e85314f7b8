"""What the metrics of the block selection read: the recorded selections of some samples, or counts of them.

The counts come from a record (`SelectionRecord.counts`) or, without any raw array, from a capture's running summary
(`SelectionCounts.from_summary`); the code that counts is the same. See `hydra_lab.metrics.arrays` for the shape
suffixes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hydra_lab.metrics.arrays import AnyIntArray, IntArray, check_shape, summarized_block
from hydra_lab.summaries import Summary
from hydra_lab.summaries.attention import count_distances


@dataclass(frozen=True, eq=False)
class SelectionRecord:
    """Recorded selections of one block.

    Attributes:
        layer: index of the block.
        blocks: [N, L, H, K] selected block indices per key-value head, -1 where fewer qualify; entries past a
            sample's end are ignored.
        length: [N] tokens of each sample.
        window: tokens of the sliding window.
        block_size: tokens per block.
        tiled: whether the first token of a block-sized tile selects for the whole tile (`selection="tile"`).
    """

    layer: int
    blocks: AnyIntArray
    length: IntArray
    window: int
    block_size: int
    tiled: bool = False

    def __post_init__(self) -> None:
        check_shape("blocks", self.blocks, (len(self.length), None, None, None))

    @cached_property
    def counts(self) -> "SelectionCounts":
        """What the metrics need of the record, counted once."""
        _, num_positions, _, num_places = self.blocks.shape
        return SelectionCounts(
            layer=self.layer,
            length=np.bincount(self.length, minlength=num_positions + 1).astype(np.int64),
            window=self.window,
            block_size=self.block_size,
            num_selected=num_places,
            tiled=self.tiled,
            **count_distances(self.blocks, self.length, self.block_size),
        )


@dataclass(frozen=True, eq=False)
class SelectionCounts:
    """Counts of the selections of one block.

    Attributes:
        layer: index of the block.
        length: [L+1] samples with 0, 1, ... L tokens.
        window: tokens of the sliding window.
        block_size: tokens per block.
        num_selected: K, blocks that a query may select.
        tiled: whether the first token of a block-sized tile selects for the whole tile (`selection="tile"`).
        distance_count: [H, V] selected blocks by their distance from the query back to the block's first token, in bins
            between `hydra_lab.summaries.distance_edges(L, block_size)`.
        distance_sum: [H] sum over selected blocks of that distance, tokens.
    """

    layer: int
    length: IntArray
    window: int
    block_size: int
    num_selected: int
    tiled: bool
    distance_count: IntArray
    distance_sum: IntArray

    @classmethod
    def from_summary(cls, summary: Summary, layer: int, *, config: Mapping[str, Any]) -> "SelectionCounts":
        """The counts of one block that a capture's running summary holds.

        Args:
            config: the model's configuration as a dict.

        Raises:
            ValueError: the summary holds no attention, or the block has none.
        """
        block = summarized_block(summary, "attention", layer, config)
        return cls(
            layer=layer,
            length=summary["tokens"]["length"].sum(axis=0),
            window=int(config["attention_window"]),
            block_size=int(config["attention_block_size"]),
            num_selected=int(config["attention_num_selected"]),
            tiled=config["attention_selection"] == "tile",
            distance_count=block["distance_count"],
            distance_sum=block["distance_sum"],
        )


Selections = SelectionRecord | SelectionCounts
"""What a metric of the block selection takes."""


def counts_of(selections: Selections) -> SelectionCounts:
    """The counts of a record, or the counts themselves."""
    return selections.counts if isinstance(selections, SelectionRecord) else selections
