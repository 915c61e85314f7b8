"""Summary of the tokens: how many and how long the samples are, and the loss."""

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    Batch,
    IntArray,
    Samples,
    count,
    in_bin,
    position_edges,
    sum_by_domain,
    weigh,
)
from hydra_lab.summaries.fields import Arrays, Field, Fields

LOSS_EDGES: NDArray[np.float64] = np.append(np.arange(129) / 8, np.inf)
"""Edges of the bins of `loss_histogram`, nats: eighths up to 16, and what lies beyond."""

NO_SAMPLE = np.iinfo(np.int64).max
"""`first_sample` of a domain that has none."""

FIELDS: Fields = {
    "length": Field(("domain", "length"), "samples with 0, 1, ... L tokens; every other number of samples, chunks and "
                    "tokens follows from these"),
    "first_sample": Field(("domain",), "index of the domain's first sample in the capture", "least"),
    "loss_sum": Field(("domain",), "sum over tokens of the loss, nats"),
    "loss_square": Field(("domain",), "sum over tokens of the squared loss, nats^2"),
    "loss_count": Field(("domain",), "tokens that have a loss: all but the first of each sample"),
    "loss_histogram": Field(("domain", "loss_bin"), "those tokens by their loss (edges: LOSS_EDGES)"),
    "loss_by_position": Field(("domain", "position_bin"), "sum over the bin's tokens of the loss, nats"),
    "loss_count_by_position": Field(("domain", "position_bin"), "tokens of the bin that have a loss"),
    "sample_loss_sum": Field(("domain",), "sum over samples of the sample's mean loss, nats"),
    "sample_loss_square": Field(("domain",), "sum over samples of its square, nats^2"),
    "sample_loss_count": Field(("domain",), "samples that have a loss"),
}  # fmt: skip


def length_counts(samples: Samples, size: int) -> IntArray:
    """[Z, size + 1] samples of each domain by their number of tokens."""
    cell_N = samples.domain * (size + 1) + samples.length
    return count(cell_N, samples.num_domains * (size + 1)).reshape(samples.num_domains, size + 1)


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    loss_NL = batch["tokens", "loss"].astype(np.float64)
    size, num_domains = loss_NL.shape[1], batch.samples.num_domains
    known_NL = ~np.isnan(loss_NL)
    loss_NL = np.where(known_NL, loss_NL, 0.0)
    edges = position_edges(size)
    first_sample = np.full(num_domains, NO_SAMPLE)
    np.minimum.at(
        first_sample, batch.samples.domain, batch.samples.first + np.arange(len(batch.samples.domain))
    )
    loss_N, count_N = loss_NL.sum(axis=1), known_NL.sum(axis=1)
    mean_N = loss_N / np.maximum(count_N, 1)
    num_bins = len(LOSS_EDGES) - 1
    domain_NL = np.broadcast_to(batch.samples.domain[:, None], loss_NL.shape)
    histogram = count(
        domain_NL[known_NL] * num_bins + in_bin(loss_NL[known_NL], LOSS_EDGES), num_domains * num_bins
    )
    bin_NL = np.broadcast_to(in_bin(np.arange(size), edges.astype(np.float64)), loss_NL.shape)
    cell = domain_NL[known_NL] * (len(edges) - 1) + bin_NL[known_NL]
    by_position = (num_domains, len(edges) - 1)

    def of_domain(values_N: NDArray[np.generic]) -> NDArray[np.generic]:
        return sum_by_domain(values_N, batch.samples)

    return {
        "length": length_counts(batch.samples, size),
        "first_sample": first_sample,
        "loss_sum": of_domain(loss_N),
        "loss_square": of_domain((loss_NL**2).sum(axis=1)),
        "loss_count": of_domain(count_N),
        "loss_histogram": histogram.reshape(num_domains, num_bins),
        "loss_by_position": weigh(cell, loss_NL[known_NL], int(np.prod(by_position))).reshape(by_position),
        "loss_count_by_position": count(cell, int(np.prod(by_position))).reshape(by_position),
        "sample_loss_sum": of_domain(mean_N),
        "sample_loss_square": of_domain(mean_N**2),
        "sample_loss_count": of_domain((count_N > 0).astype(np.int64)),
    }
