"""What one text shows token by token: the model's guesses at the next token, and the memory's gate.

See `hydra_lab.metrics.arrays` for the shape suffixes.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray
from hydra_lab.metrics.memory import LookupRecord


@dataclass(frozen=True, eq=False)
class NextTokens:
    """The likeliest next tokens after one position.

    Attributes:
        position: index of the last token that the model has read.
        tokens: [V] token ids, likeliest first.
        probability: [V] their probabilities, 0..1.
        entropy: entropy of the whole distribution, nats.
        actual: id of the token that follows in the text; None at its end.
        actual_probability: its probability; NaN at the end.
    """

    position: int
    tokens: IntArray
    probability: FloatArray
    entropy: float
    actual: int | None
    actual_probability: float


@dataclass(frozen=True, eq=False)
class BetaByToken:
    """The memory gate along one text, and the row that each token reads most.

    Attributes:
        layer: index of the block.
        beta: [L] gate, 0..1.
        address: [L] the row with the largest weight, over all heads.
        weight: [L] its weight (sum over the heads that read it; a head's weights sum to 1).
        num_heads: H.
    """

    layer: int
    beta: FloatArray
    address: IntArray
    weight: FloatArray
    num_heads: int


def beta_by_token(record: LookupRecord, sample: int = 0) -> BetaByToken:
    """Memory gate and most read row of each token of one sample; see `BetaByToken`.

    Raises:
        ValueError: there is no such sample.
    """
    if not 0 <= sample < len(record.length):
        raise ValueError(f"sample {sample} is not among the {len(record.length)} recorded")
    length = int(record.length[sample])
    addresses_LM = record.addresses[sample, :length].astype(np.int64).reshape(length, -1)
    weights_LM = record.weights[sample, :length].astype(np.float64).reshape(length, -1)
    same_LMM = addresses_LM[:, :, None] == addresses_LM[:, None, :]
    total_LM = np.einsum("lmn,ln->lm", same_LMM, weights_LM)
    best_L = total_LM.argmax(axis=1)
    row_L = np.arange(length)
    return BetaByToken(
        layer=record.layer,
        beta=record.gate[sample, :length].astype(np.float64),
        address=addresses_LM[row_L, best_L],
        weight=total_LM[row_L, best_L],
        num_heads=record.addresses.shape[2],
    )
