"""What `sparse_attention` returns, whichever backend ran it."""

from typing import NamedTuple

from torch import Tensor


class AttentionOutput(NamedTuple):
    """Result of `hydra_lab.ops.sparse_attention`.

    Attributes:
        y: [B, Lq, Hq, d] in the dtype of `q`.
        mass: [B, Lq, Hq, 3] fp32 share of each query's probability that went to its window, the sink block and the
            selected blocks; sums to 1. A key that qualifies twice counts for the first of the three. Not
            differentiable; None unless asked for.
    """

    y: Tensor
    mass: Tensor | None
