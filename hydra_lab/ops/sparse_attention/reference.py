"""Oracle of `hydra_lab.ops.sparse_attention`: an explicit mask, a dense softmax.

Shape suffixes: B rows, I queries, J keys (J also blocks where said), H query heads, G key-value heads,
Q query heads per key-value head, K selected blocks, d head size.
"""

import torch
from torch import Tensor

from hydra_lab.ops.sparse_attention.output import AttentionOutput


def block_means(k: Tensor, *, block_size: int) -> Tensor:
    """See `hydra_lab.ops.sparse_attention.block_means`."""
    num_blocks = k.shape[1] // block_size
    means = [k[:, j * block_size : (j + 1) * block_size].mean(dim=1) for j in range(num_blocks)]
    return torch.stack(means, dim=1) if means else k[:, :0]


def select_blocks(
    q: Tensor,
    key_means: Tensor,
    *,
    start: Tensor | None,
    window: int,
    block_size: int,
    num_selected: int,
    serves: int,
) -> tuple[Tensor, Tensor]:
    """See `hydra_lab.ops.sparse_attention.select_blocks`."""
    num_rows, num_queries, num_heads, _ = q.shape
    num_blocks, num_key_heads = key_means.shape[1], key_means.shape[2]
    q_BIGQd = q.detach().float().reshape(num_rows, num_queries, num_key_heads, num_heads // num_key_heads, -1)
    score_BIGJ = torch.einsum("bigqd,bjgd->bigqj", q_BIGQd, key_means.detach().float()).mean(dim=3)

    t_BI1 = positions(start, num_rows, num_queries, q.device, apart=serves)[:, :, None]
    j = torch.arange(num_blocks, device=q.device)
    candidate_BIJ = (j >= 1) & (j < t_BI1 // block_size) & (j * block_size <= t_BI1 + serves - 1 - window)
    score_BIGJ = score_BIGJ.masked_fill(~candidate_BIJ[:, :, None, :], -torch.inf)
    score_BIGJ = torch.nn.functional.pad(score_BIGJ, (0, num_selected), value=-torch.inf)

    scores, blocks = score_BIGJ.sort(dim=-1, descending=True, stable=True)
    scores, blocks = scores[..., :num_selected], blocks[..., :num_selected]
    return blocks.masked_fill(scores == -torch.inf, -1), scores


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    start: Tensor | None,
    window: int,
    block_size: int,
    scale: float,
    mass: bool,
) -> AttentionOutput:
    """See `hydra_lab.ops.sparse_attention.sparse_attention`."""
    window_BIGJ, sink_BIGJ, selected_BIGJ = parts(
        blocks, num_keys=k.shape[1], start=start, window=window, block_size=block_size
    )
    visible_BIGJ = window_BIGJ | sink_BIGJ | selected_BIGJ
    # A masked key has probability 0, but 0 * nan is nan: keys that no query of the row sees are removed.
    used_BJ = visible_BIGJ.any(dim=2).any(dim=1)[:, :, None, None]
    k, v = k.where(used_BJ, 0.0), v.where(used_BJ, 0.0)

    q_BIGQd = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    score_BIGQJ = scale * torch.einsum("bigqd,bjgd->bigqj", q_BIGQd, k)
    probability_BIGQJ = score_BIGQJ.masked_fill(~visible_BIGJ[:, :, :, None, :], -torch.inf).softmax(dim=-1)
    y = torch.einsum("bigqj,bjgd->bigqd", probability_BIGQJ, v).flatten(2, 3)
    if not mass:
        return AttentionOutput(y, None)
    part_3BIGJ = torch.stack([window_BIGJ, sink_BIGJ, selected_BIGJ]).to(probability_BIGQJ.dtype)
    mass_BIGQ3 = torch.einsum("bigqj,pbigj->bigqp", probability_BIGQJ.detach(), part_3BIGJ)
    return AttentionOutput(y, mass_BIGQ3.flatten(2, 3).float())


def parts(
    blocks: Tensor, *, num_keys: int, start: Tensor | None, window: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask written out, [B, Lq, Hkv, Lk] bool: the keys that a query sees in its window; of the others those in
    the sink block; of the others those in its selected blocks."""
    num_rows, num_queries = blocks.shape[:2]
    t_BI1 = positions(start, num_rows, num_queries, blocks.device)[:, :, None]
    j_J = torch.arange(num_keys, device=blocks.device)
    causal_BIGJ = (j_J <= t_BI1)[:, :, None, :].expand(num_rows, -1, blocks.shape[2], -1)
    window_BIGJ = causal_BIGJ & (t_BI1 - j_J < window)[:, :, None, :]
    sink_BIGJ = causal_BIGJ & ~window_BIGJ & (j_J < block_size)
    selected_BIGJ = (blocks[..., None] == j_J // block_size).any(dim=3)
    return window_BIGJ, sink_BIGJ, causal_BIGJ & ~window_BIGJ & ~sink_BIGJ & selected_BIGJ


def positions(
    start: Tensor | None, num_rows: int, num_queries: int, device: torch.device, apart: int = 1
) -> Tensor:
    """Absolute position of each query, [B, Lq] (or [1, Lq] where all rows start at 0)."""
    i_I = torch.arange(num_queries, device=device) * apart
    return i_I[None] if start is None else start[:, None] + i_I
