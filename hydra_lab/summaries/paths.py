"""Summary of the paths: each one's share of its block's update, and its cosine to it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import Batch, IntArray
from hydra_lab.summaries.fields import Arrays, Field, Fields

FIELDS: Fields = {
    "share_sum": Field(("layer", "path"), "sum over samples of tokens times the path's mean share of the update"),
    "share_tokens": Field(("layer", "path"), "tokens of the samples where that share is known"),
    "cosine_sum": Field(("layer", "path"), "sum over samples of tokens times the path's mean cosine to the update"),
    "cosine_tokens": Field(("layer", "path"), "tokens of the samples where that cosine is known"),
}  # fmt: skip


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    return token_sums(batch["paths", "share"], batch["paths", "cosine"], batch.samples.length)


def token_sums(share_NYP: NDArray[Any], cosine_NYP: NDArray[Any], length_N: IntArray) -> Arrays:
    """The arrays of `FIELDS`: numerators and denominators of the means over tokens."""
    arrays: Arrays = {}
    for name, value_NYP in (("share", share_NYP), ("cosine", cosine_NYP)):
        known_NYP = ~np.isnan(value_NYP)
        tokens_NYP = known_NYP * length_N[:, None, None]
        arrays[f"{name}_sum"] = (np.where(known_NYP, value_NYP, 0.0).astype(np.float64) * tokens_NYP).sum(
            axis=0
        )
        arrays[f"{name}_tokens"] = tokens_NYP.sum(axis=0)
    return arrays
