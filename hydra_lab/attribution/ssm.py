"""Effective attention of a state-space path: how much each earlier token weighs in a head's output.

Shape suffixes: B rows, H heads, L positions (t reading, s written), P channels per head, N state size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydra_lab.attribution.rows import FloatArray, IntArray, floats, front_rows, ints
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.ssm import ScanInputs
from hydra_lab.taps import StateSummary


@dataclass(frozen=True, eq=False)
class SSMAttention:
    """The recurrence of a state-space path as a matrix: its output is `y_t = sum over s <= t of M_ts x_s, plus D x_t`.

    `M_ts = dt_s (C_t . B_s) exp(sum of the log decays of s+1 .. t)` (Dao and Gu 2024, arXiv 2405.21060, sec. 3; Ali et
    al. 2024, arXiv 2403.01590, read it as attention). The entries have either sign, and x_s is what the convolution
    made of token s and the few before it. What multiplies y afterwards, the gate z and the output norm, is not in M.

    Axes: B rows, H the chosen heads, L positions. Past a row's end everything is 0.

    Attributes:
        layer: index of the block.
        heads: [H] indices of the heads.
        matrix: [B, H, L, L] float32 M, reading position first; 0 above the diagonal.
        inputs: [B, H, L, P] float32 x.
        skip: [H] D.
        ids: [B, L] the tokens.
        length: [B] tokens of each row.
    """

    layer: int
    heads: tuple[int, ...]
    matrix: FloatArray
    inputs: FloatArray
    skip: FloatArray
    ids: IntArray
    length: IntArray

    def output(self) -> FloatArray:
        """[B, H, L, P] `M x + D x`: what the path's recurrence put out."""
        return self.matrix @ self.inputs + self.skip[:, None, None] * self.inputs

    def normalised(self) -> FloatArray:
        """[B, H, L, L] `|M_ts| / sum over s of |M_ts|`: rows sum to 1 like attention's (0 past a row's end)."""
        return _shares(np.abs(self.matrix))

    def contribution(self) -> FloatArray:
        """[B, H, L, L] `|M_ts x_s|`: Euclidean norm of what token s adds to the output at t. The skip `D x_t` is not
        in it."""
        return np.abs(self.matrix) * np.linalg.norm(self.inputs, axis=-1)[:, :, None]


def ssm_attention(
    model: HydraForCausalLM,
    ids: Tensor,
    layer: int,
    *,
    heads: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> SSMAttention:
    """Effective attention of the ssm path of block `layer`.

    It takes B H L^2 numbers of 4 bytes, one head's worth more while it works: for long texts ask for the heads that
    you need. A decay that a hook writes at the tap `ssm.state` is in M; a state that one writes is not.

    Args:
        ids: [B, L] token ids.
        heads: one head or several; None for all.
        mask: [B, L] nonzero where a token is present; None: all.

    Raises:
        ValueError: there is no such block or head, its ssm path is switched off, or the ids do not fit the model.
    """
    num_layers = len(model.model.blocks)
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is not among the blocks 0 to {num_layers - 1}")
    path = model.model.blocks[layer].ssm
    chosen = _heads(heads, path.num_heads)
    rows = front_rows(model, ids, mask)
    seen: list[Any] = []

    def keep_decay(_module: Any, _args: Any, summary: StateSummary) -> None:
        seen.append(summary.decay)

    def keep_inputs(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
        seen.append(path.scan_inputs(args[0], args[1]))

    with model_lock(model), torch.no_grad():
        handles = [path.state.register_forward_hook(keep_decay), path.register_forward_hook(keep_inputs)]
        try:
            model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise ValueError(f"the ssm path of block {layer} is switched off (set_path_scale)")
        decay_BLH, inputs = seen
        size = rows.ids.shape
        matrix = np.empty((size[0], len(chosen), size[1], size[1]), dtype=np.float32)
        for index, head in enumerate(chosen):
            group = head // (path.num_heads // path.num_groups)
            one = _matrix(inputs, decay_BLH, head, group).masked_fill(~rows.present[:, :, None], 0.0)
            matrix[:, index] = floats(one)
    x_BHLP = inputs.x[:, :, list(chosen)].transpose(1, 2) * rows.present[:, None, :, None]
    return SSMAttention(
        layer=layer,
        heads=chosen,
        matrix=matrix,
        inputs=floats(x_BHLP),
        skip=floats(path.D[list(chosen)]),
        ids=ints(rows.ids),
        length=ints(rows.length),
    )


def _matrix(inputs: ScanInputs, decay_BLH: Tensor, head: int, group: int) -> Tensor:
    """[B, L, L] M of one head."""
    # Sums of decays grow, and what counts is the difference of two of them: double precision, as in the scan.
    passed_BL = decay_BLH[:, :, head].double().cumsum(dim=1)
    log_kept_BLL = passed_BL[:, :, None] - passed_BL[:, None, :]
    future_LL = torch.ones_like(log_kept_BLL[0], dtype=torch.bool).triu(1)
    kept_BLL = log_kept_BLL.masked_fill_(future_LL, -torch.inf).exp_().float()
    product_BLL = inputs.C[:, :, group].float() @ inputs.B[:, :, group].float().transpose(1, 2)
    return kept_BLL.mul_(product_BLL).mul_(inputs.dt[:, None, :, head])


def _heads(heads: int | Sequence[int] | None, num_heads: int) -> tuple[int, ...]:
    chosen = range(num_heads) if heads is None else (heads,) if isinstance(heads, int) else tuple(heads)
    wrong = [head for head in chosen if not 0 <= head < num_heads]
    if wrong or not chosen:
        raise ValueError(f"heads {wrong or '[]'} are not among the heads 0 to {num_heads - 1}")
    return tuple(chosen)


def _shares(values: FloatArray) -> FloatArray:
    total = values.sum(axis=-1, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values), where=total > 0)
