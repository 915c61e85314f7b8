"""The rows of a batch in their own coordinates."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab.capture.record import check_inputs
from hydra_lab.chunks import front_order
from hydra_lab.modeling import HydraForCausalLM

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


class Rows(NamedTuple):
    """A batch whose rows begin at index 0 and are padded on the right.

    Attributes:
        ids: [B, L] token ids; whatever they were at padding.
        mask: [B, L] 1 where a token is present; None where all are.
        present: [B, L] bool, the same.
        length: [B] tokens of each row.
    """

    ids: Tensor
    mask: Tensor | None
    present: Tensor
    length: Tensor


def front_rows(model: HydraForCausalLM, ids: Tensor, mask: Tensor | None) -> Rows:
    """The batch with every row's tokens moved to the front, on the model's device.

    Raises:
        ValueError: as `hydra_lab.capture.record.check_inputs`.
    """
    ids, mask = check_inputs(model, ids, mask)
    if mask is None:
        present = torch.ones_like(ids, dtype=torch.bool)
        return Rows(ids, None, present, present.sum(dim=1))
    order, _ = front_order(mask != 0)
    ids = ids if order is None else ids.gather(1, order)
    length = (mask != 0).sum(dim=1)
    present = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    return Rows(ids, present.long(), present, length)


def next_tokens(rows: Rows) -> Tensor:
    """[B, L] the token that follows each one in its row; -1 after the last and at padding."""
    following = torch.full_like(rows.ids, -1)
    following[:, :-1] = torch.where(rows.present[:, 1:], rows.ids[:, 1:], -1)
    return following


def floats(x: Tensor) -> NDArray[np.float32]:
    """A float32 array of the same numbers."""
    return x.detach().float().cpu().numpy()


def ints(x: Tensor) -> IntArray:
    """An int64 array of the same numbers."""
    return x.detach().long().cpu().numpy()
