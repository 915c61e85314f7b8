"""Summary of the paths: each one's share of its block's update, and its cosine to it."""

import numpy as np

from hydra_lab.summaries.arrays import Batch
from hydra_lab.summaries.fields import Arrays, Field, Fields

FIELDS: Fields = {
    "share_sum": Field(("layer", "path"), "sum over samples of tokens times the path's mean share of the update"),
    "share_tokens": Field(("layer", "path"), "tokens of the samples where that share is known"),
    "cosine_sum": Field(("layer", "path"), "sum over samples of tokens times the path's mean cosine to the update"),
    "cosine_tokens": Field(("layer", "path"), "tokens of the samples where that cosine is known"),
}  # fmt: skip


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    arrays: Arrays = {}
    for name in ("share", "cosine"):
        value_NYP = batch["paths", name].astype(np.float64)
        known_NYP = ~np.isnan(value_NYP)
        tokens_NYP = known_NYP * batch.length[:, None, None]
        arrays[f"{name}_sum"] = (np.where(known_NYP, value_NYP, 0.0) * tokens_NYP).sum(axis=0)
        arrays[f"{name}_tokens"] = tokens_NYP.sum(axis=0)
    return arrays
