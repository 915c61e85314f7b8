"""How chunks flow from an expert of one block to an expert of the next.

See `hydra_lab.metrics.arrays` for the shape suffixes. No summary keeps what a chunk chose in two blocks
together, so this
reads records alone.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray
from hydra_lab.metrics.routing_counts import RoutingRecord


@dataclass(frozen=True, eq=False)
class RoutingFlow:
    """First choices of the same chunk in successive blocks that route.

    Attributes:
        layers: [Y] indices of the blocks.
        share: [Y-1, E, E] share of all chunks whose first choice is expert i in block y and expert j in the next; each
            block's entries sum to 1.
        information: [Y-1] mutual information of the two choices, nats, over all chunks; 0 where knowing one says
            nothing of the other. Biased upwards by about (E-1)^2 / (2 num_chunks).
        num_chunks: chunks counted.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    share: FloatArray
    information: FloatArray
    num_chunks: int
    num_samples: int


def routing_flow(record: RoutingRecord) -> RoutingFlow:
    """Flow of chunks between the experts of successive blocks; see `RoutingFlow`.

    Raises:
        ValueError: fewer than two blocks route, or no chunk was recorded.
    """
    num_layers = len(record.layers)
    if num_layers < 2:
        raise ValueError(f"a flow needs two blocks that route, and this model has {num_layers}")
    if not record.chunk_mask.any():
        raise ValueError("the record holds no chunk")
    first_YM = record.experts[..., 0][:, record.chunk_mask].astype(np.int64)
    size = record.num_experts
    share = np.zeros((num_layers - 1, size, size))
    for y in range(num_layers - 1):
        pairs = np.bincount(first_YM[y] * size + first_YM[y + 1], minlength=size * size)
        share[y] = pairs.reshape(size, size) / pairs.sum()
    alone = share.sum(axis=2, keepdims=True) * share.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.where(share > 0, share * np.log(share / alone), 0.0).sum(axis=(1, 2))
    return RoutingFlow(record.layers, share, information, first_YM.shape[1], len(record.length))
