"""What dense attention would have looked at with the same queries and keys, and how much of that the selection shows.

Shape suffixes: B rows, H heads, L positions (t reading, s read), K key-value heads, N blocks of keys.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydra_lab.attribution.rows import FloatArray, IntArray, floats, front_rows, ints
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Selection


@dataclass(frozen=True, eq=False)
class DenseAttention:
    """Dense causal attention of a block beside the sparse one that the model runs, over the same queries and keys.

    Axes: B rows, L positions, N blocks of keys. Past a row's end everything is 0.

    Attributes:
        layer: index of the block.
        block_size: tokens per block of keys.
        wanted: [B, L, N] probability that dense softmax attention gives each block, mean over heads; a token's
        blocks sum
            to 1.
        shown: [B, L, N] share of that probability that falls on keys which the sparse attention shows (window, first
            block, selected blocks), 0..1 of `wanted`, mean over heads.
        length: [B] tokens of each row.
    """

    layer: int
    block_size: int
    wanted: FloatArray
    shown: FloatArray
    length: IntArray

    @property
    def coverage(self) -> FloatArray:
        """[B, L] probability of dense attention that the sparse one can see, 0..1; 0 past a row's end."""
        return self.shown.sum(axis=-1)


def dense_attention(
    model: HydraForCausalLM, ids: Tensor, layer: int, *, mask: Tensor | None = None
) -> DenseAttention:
    """What dense attention would have looked at in block `layer`, were the rest of the model as it is.

    It takes H L^2 numbers of 4 bytes while it works.

    Args:
        ids: [B, L] token ids.
        mask: [B, L] nonzero where a token is present; None: all.

    Raises:
        ValueError: the block has no attention path, the path is switched off, or the ids do not fit the model.
    """
    present = model.config.layers_with("attention")
    if layer not in present:
        raise ValueError(f"layer {layer} has no attention path; blocks {present} have one")
    path = model.model.blocks[layer].attention
    rows = front_rows(model, ids, mask)
    seen: dict[str, Any] = {}

    def keep_input(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
        seen["query"], seen["key"] = path.queries_and_keys(args[0], args[1])

    def keep_selection(_module: Any, _args: Any, selection: Selection) -> None:
        seen["blocks"] = selection.blocks

    with model_lock(model), torch.no_grad():
        handles = [
            path.register_forward_hook(keep_input),
            path.selection.register_forward_hook(keep_selection),
        ]
        try:
            model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise ValueError(f"the attention path of block {layer} is switched off (set_path_scale)")
        wanted, shown = _by_block(seen["query"], seen["key"], seen["blocks"], path.window, path.block_size)
        wanted, shown = (each * rows.present[..., None] for each in (wanted, shown))
    return DenseAttention(layer, path.block_size, floats(wanted), floats(shown), ints(rows.length))


def _by_block(
    query_BLHd: Tensor, key_BLKd: Tensor, blocks_BLKk: Tensor, window: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """[B, L, N] dense probability by block of keys, and the part of it on keys that are shown; means over heads."""
    num_tokens, num_heads = query_BLHd.shape[1:3]
    num_kv_heads = key_BLKd.shape[2]
    num_blocks = -(-num_tokens // block_size)
    position_L = torch.arange(num_tokens, device=query_BLHd.device)
    block_L = position_L // block_size
    back_LL = position_L[:, None] - position_L
    near_LL = (back_LL < window) | (block_L == 0)
    wanted = query_BLHd.new_zeros(*query_BLHd.shape[:2], num_blocks, dtype=torch.float32)
    shown = torch.zeros_like(wanted)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = query_BLHd[:, :, head].float() @ key_BLKd[:, :, kv_head].float().transpose(1, 2)
        scores = scores * query_BLHd.shape[-1] ** -0.5
        probability = scores.masked_fill(back_LL < 0, -torch.inf).softmax(dim=-1)
        selected = (blocks_BLKk[:, :, kv_head, :, None] == block_L).any(dim=2)
        index = block_L.expand_as(probability)
        wanted.scatter_add_(2, index, probability / num_heads)
        shown.scatter_add_(2, index, probability * (near_LL | selected) / num_heads)
    return wanted, shown


def mean_coverage(result: DenseAttention, *, beyond: int = 0) -> float:
    """Mean of `coverage` over the tokens that have at least `beyond` tokens before them; NaN where there are none."""
    position = np.arange(result.wanted.shape[1])
    counted = (position >= beyond) & (position < result.length[:, None])
    return float(result.coverage[counted].mean()) if counted.any() else float("nan")
