"""The model's loss on the captured text, by domain and along the text.

See `hydra_lab.metrics.arrays` for the shape suffixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray, bin_edges, domain_order, ratio, rebinned
from hydra_lab.summaries import Summary, position_edges


@dataclass(frozen=True, eq=False)
class LossByDomain:
    """Loss of the model in each domain.

    The loss of a token is -ln p(token | the window's earlier ones), nats; the first token of a sample has none.

    Attributes:
        domains: [Z] names of the domains, in order of first appearance.
        mean: [Z] mean over tokens, nats; NaN where no token has a loss.
        sample_mean: [Z] mean over samples of the sample's mean loss, nats.
        error: [Z] standard error of `sample_mean` over the samples; NaN below two.
        edges: [V+1] edges of the position bins, in tokens from the start of the sample.
        by_position: [Z, V] mean over the bin's tokens, nats; NaN where the domain has none there.
        num_tokens: [Z] tokens that have a loss.
        num_samples: [Z] samples that have a loss.
    """

    domains: tuple[str, ...]
    mean: FloatArray
    sample_mean: FloatArray
    error: FloatArray
    edges: IntArray
    by_position: FloatArray
    num_tokens: IntArray
    num_samples: IntArray


def loss_by_domain(summary: Summary, *, domains: Sequence[str], num_bins: int = 32) -> LossByDomain:
    """Loss by domain and position of a whole capture, from its running summary; see `LossByDomain`.

    Args:
        domains: the labels that the summary's axis `domain` runs over.
        num_bins: bins of positions: 128, 64, 32, ...

    Raises:
        ValueError: the summary's bins of positions cannot be put together to that many.
    """
    arrays = summary["tokens"]
    present: list[int] = domain_order(arrays["first_sample"]).tolist()
    of = {name: array[present] for name, array in arrays.items()}
    num_positions = of["length"].shape[1] - 1
    have, want = position_edges(num_positions), bin_edges(num_positions, num_bins)
    samples_Z = of["sample_loss_count"].astype(np.float64)
    sample_mean_Z = ratio(of["sample_loss_sum"], samples_Z)
    squares_Z = np.maximum(
        0.0, of["sample_loss_square"] - of["sample_loss_sum"] * np.nan_to_num(sample_mean_Z)
    )
    variance_Z = ratio(squares_Z, np.maximum(0.0, samples_Z - 1))
    sum_ZV, count_ZV = (
        rebinned(of[name], have, want, axis=1) for name in ("loss_by_position", "loss_count_by_position")
    )
    return LossByDomain(
        domains=tuple(domains[z] for z in present),
        mean=ratio(of["loss_sum"], of["loss_count"].astype(np.float64)),
        sample_mean=sample_mean_Z,
        error=np.sqrt(ratio(variance_Z, samples_Z)),
        edges=want,
        by_position=ratio(sum_ZV, count_ZV.astype(np.float64)),
        num_tokens=of["loss_count"],
        num_samples=of["sample_loss_count"],
    )
