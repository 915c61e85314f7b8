"""The causal convolution as its sum, one position after another."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x_BLD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    length: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """A window of the last W inputs slides over each row."""
    rows, positions, channels = x_BLD.shape
    width = weight_DW.shape[1]
    if initial_state is None:
        initial_state = x_BLD.new_zeros(rows, channels, width - 1)
    outputs: list[Tensor] = []
    states = [initial_state.to(x_BLD.dtype)]  # the inputs to remember after 0, 1, 2, ... positions
    for t in range(positions):
        window_BDW = torch.cat([states[-1], x_BLD[:, t, :, None]], dim=-1)
        y_BD = (window_BDW * weight_DW).sum(-1)
        if bias_D is not None:
            y_BD = y_BD + bias_D
        outputs.append(F.silu(y_BD) if activation == "silu" else y_BD)
        states.append(window_BDW[..., 1:])
    final = [states[positions if length is None else int(length[row])][row] for row in range(rows)]
    return torch.stack(outputs, dim=1).to(x_BLD.dtype), torch.stack(final)
