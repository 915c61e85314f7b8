"""What removing each expert costs each domain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray, check_shape, domain_codes


@dataclass(frozen=True, eq=False)
class ExpertCost:
    """Mean loss increase when one expert is removed.

    Attributes:
        layers: [Y] indices of the blocks.
        domains: [Z] names of the domains.
        cost: [Y, Z, E] mean over samples of the loss without the expert less the loss with it, nats per token.
        error: [Y, Z, E] standard error of `cost` over samples; NaN for a single sample.
        num_samples: [Z] samples per domain.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    cost: FloatArray
    error: FloatArray
    num_samples: IntArray


def expert_cost(cost: FloatArray, layers: Sequence[int], domains: Sequence[str]) -> ExpertCost:
    """Means and errors by domain; see `ExpertCost`.

    Args:
        cost: [Y, E, N] loss of each sample without each expert less its loss with it, nats per token.
        layers: [Y] indices of the blocks.
        domains: [N] domain label of each sample.
    """
    check_shape("cost", cost, (len(layers), None, len(domains)))
    names, domain_N = domain_codes(domains)
    means, errors = np.full((2, cost.shape[0], len(names), cost.shape[1]), np.nan)
    counts = np.bincount(domain_N, minlength=len(names))
    for z in range(len(names)):
        of_domain = cost[:, :, domain_N == z]
        means[:, z] = of_domain.mean(axis=2)
        if counts[z] > 1:
            errors[:, z] = of_domain.std(axis=2, ddof=1) / np.sqrt(counts[z])
    return ExpertCost(tuple(layers), tuple(names), means, errors, counts)
