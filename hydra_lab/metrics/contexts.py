"""The places of the text that an expert, a memory row or a workspace slot answers to most, from a running summary."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray, summarized_block, total_tokens
from hydra_lab.summaries import NO_SCORE, Summary

ContextKind = Literal["expert", "memory row", "slot read", "slot write"]

_ARRAYS: dict[ContextKind, tuple[str, str]] = {
    "expert": ("routing", "context"),
    "memory row": ("memory", "context"),
    "slot read": ("workspace", "read"),
    "slot write": ("workspace", "write"),
}
SCORES: dict[ContextKind, str] = {
    "expert": "router probability",
    "memory row": "read weight",
    "slot read": "read gate x attention",
    "slot write": "write gate x attention",
}
"""What the contexts of each kind are ranked by."""


@dataclass(frozen=True, eq=False)
class TopContexts:
    """The strongest contexts of one expert, row or slot, each from another sample.

    Attributes:
        layer: index of the block.
        kind: what they are contexts of: "expert", "memory row", "slot read" or "slot write".
        item: number of the expert, row or slot.
        score: [M] strength, falling, 0..1: the router's probability of the expert; the weight with which a head reads
            the row; the read or write gate times the attention.
        sample: [M] sample of the context, to be looked up in the capture's group `tokens`.
        position: [M] its token there: the one that reads or is written, or the first of the expert's chunk.
        num_tokens: tokens of the capture.
        num_samples: samples of the capture.
    """

    layer: int
    kind: ContextKind
    item: int
    score: FloatArray
    sample: IntArray
    position: IntArray
    num_tokens: int
    num_samples: int


def top_contexts(
    summary: Summary, kind: ContextKind, layer: int, item: int, *, config: Mapping[str, Any]
) -> TopContexts:
    """The strongest contexts of an expert, memory row or slot; see `TopContexts`.

    Args:
        summary: the running summary of a capture.
        config: the model's configuration as a dict.

    Raises:
        ValueError: the summary does not hold such contexts, or there is no such block or item.
    """
    group, name = _ARRAYS[kind]
    if f"{name}_score" not in summary.get(group, {}):
        raise ValueError(f"the summary has no contexts of kind {kind!r}")
    block = summarized_block(summary, group, layer, config)
    score, sample, position = (block[f"{name}_{part}"] for part in ("score", "sample", "position"))
    if not 0 <= item < len(score):
        raise ValueError(f"{kind} {item} is not one of 0..{len(score) - 1}")
    found = score[item] != NO_SCORE
    length_L: IntArray = summary["tokens"]["length"].sum(axis=0)
    return TopContexts(
        layer=layer,
        kind=kind,
        item=item,
        score=score[item][found].astype(np.float64),
        sample=sample[item][found].astype(np.int64),
        position=position[item][found].astype(np.int64),
        num_tokens=total_tokens(length_L),
        num_samples=int(length_L.sum()),
    )
