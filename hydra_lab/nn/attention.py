"""The attention path: sparse global attention over a sliding window, a sink block and selected earlier blocks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hydra_lab.chunks import ChunkGrid, Span, take
from hydra_lab.config import HydraConfig
from hydra_lab.nn.layers import OutputProjection
from hydra_lab.ops.sparse_attention import block_means, select_blocks, sparse_attention
from hydra_lab.taps import AttentionMass, RequestedTap, Selection, Tap


class Storage:
    """Says which state may write behind its tokens in the tensors that several states share.

    A state and its copy share memory. The first of them that is continued writes in place, where the other does not
    look, and takes its turn; the other finds that its turn is over and moves to memory of its own.
    """

    def __init__(self) -> None:
        self.turn = 0


class AttentionState(NamedTuple):
    """What the path keeps of earlier tokens; row b's token at absolute position p lies at index p. What lies behind a
    row's last token is not this state's.

    Attributes:
        keys, values: [B, capacity, H_kv, d].
        key_means: [B, capacity / block, H_kv, d] mean key of every complete block.
        tile_blocks, tile_scores: [B, H_kv, K] selection of the tile that is open (tile selection only).
        storage, turn: this state may write into its tensors as long as `storage.turn == turn`.
    """

    keys: Tensor
    values: Tensor
    key_means: Tensor
    tile_blocks: Tensor
    tile_scores: Tensor
    storage: Storage
    turn: int

    def with_capacity(self, tokens: int) -> "AttentionState":
        """This state in memory of its own, where at least so many tokens fit."""
        block = self.keys.shape[1] // self.key_means.shape[1]
        blocks = max(-(-tokens // block), self.key_means.shape[1])
        return self._replace(
            keys=_grow(self.keys, self.keys, blocks * block).clone(),
            values=_grow(self.values, self.values, blocks * block).clone(),
            key_means=_grow(self.key_means, self.key_means, blocks).clone(),
            storage=(storage := Storage()),
            turn=storage.turn,
        )


class AttentionPath(nn.Module):
    """Grouped-query attention in which a query sees its window, the first block and the top-k complete earlier
    blocks by `query . mean(key)` (compare MoBA, arXiv 2502.13189, and NSA, arXiv 2502.11089)."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.num_heads = config.attention_num_heads
        self.num_kv_heads = config.attention_num_kv_heads
        self.head_dim = config.attention_head_dim
        self.window = config.attention_window
        self.block_size = config.attention_block_size
        self.num_selected = config.attention_num_selected
        self.tiled = config.attention_selection == "tile"
        self.rope_theta = config.attention_rope_theta
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = OutputProjection(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.selection = Tap()
        self.mass = RequestedTap()

    def forward(
        self, hidden_BLD: Tensor, span: Span, state: AttentionState | None, keep_state: bool
    ) -> tuple[Tensor, AttentionState | None]:
        query, key = self.queries_and_keys(hidden_BLD, span)
        value = self.v_proj(hidden_BLD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if state is None and not keep_state:
            keys, values, key_means = key, value, block_means(key, block_size=self.block_size)
            storage = Storage()
        else:
            keys, values, key_means, storage = self._append(key, value, span, state)

        selection: Selection = self.selection(self._select(query, key_means, span, state))
        out = sparse_attention(
            query,
            keys,
            values,
            selection.blocks,
            start=span.start,
            window=self.window,
            block_size=self.block_size,
            mass=self.mass.num_requests > 0,
        )
        if out.mass is not None and self.mass(AttentionMass(out.mass)).mass is not out.mass:
            raise ValueError(
                "attention.mass is a measurement and cannot be written; write attention.selection"
            )
        new_state = None
        if keep_state:
            last_B = span.last_index(query.shape[0], query.device).clamp(min=0)
            tile_blocks, tile_scores = take(selection.blocks, last_B), take(selection.scores, last_B)
            if state is not None and span.length is not None:
                # Rows without tokens keep their tile's selection.
                empty = (span.length == 0)[:, None, None]
                tile_blocks = torch.where(empty, state.tile_blocks, tile_blocks)
                tile_scores = torch.where(empty, state.tile_scores, tile_scores)
            new_state = AttentionState(
                keys, values, key_means, tile_blocks, tile_scores, storage, storage.turn
            )
        return self.o_proj(out.y.flatten(-2)), new_state

    def queries_and_keys(self, hidden_BLD: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """[B, L, heads, head_dim] queries and [B, L, kv_heads, head_dim] keys of the path's input, rotated
        where the model
        has rotary embeddings."""
        query = self.q_proj(hidden_BLD).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(hidden_BLD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_theta is not None:
            positions_BL = span.positions(hidden_BLD.device)
            query, key = (rotate(x, positions_BL, self.rope_theta) for x in (query, key))
        return query, key

    def _select(
        self, query: Tensor, key_means: Tensor, span: Span, state: AttentionState | None
    ) -> Selection:
        if not self.tiled:
            blocks, scores = select_blocks(
                query,
                key_means,
                start=span.start,
                window=self.window,
                block_size=self.block_size,
                num_selected=self.num_selected,
            )
            return Selection(blocks, scores)
        grid = ChunkGrid(span, self.block_size, query.shape[0], query.device)
        first_query = grid.to_grid(query)[:, :, 0]
        # A tile's first query stands at a multiple of the block size.
        start = None if span.start is None else span.start // self.block_size * self.block_size
        blocks_BC, scores_BC = select_blocks(
            first_query,
            key_means,
            start=start,
            window=self.window,
            block_size=self.block_size,
            num_selected=self.num_selected,
            serves=self.block_size,
        )
        if state is not None and grid.offset_B is not None:
            is_open = (grid.offset_B > 0)[:, None, None]
            blocks_BC[:, 0] = torch.where(is_open, state.tile_blocks, blocks_BC[:, 0])
            scores_BC[:, 0] = torch.where(is_open, state.tile_scores, scores_BC[:, 0])
        return Selection(grid.to_tokens(blocks_BC), grid.to_tokens(scores_BC))

    def _append(
        self, key: Tensor, value: Tensor, span: Span, state: AttentionState | None
    ) -> tuple[Tensor, Tensor, Tensor, Storage]:
        """Write the piece's keys and values behind the earlier ones and refresh the means of the blocks touched."""
        batch, size = key.shape[:2]
        positions_BL = span.positions(key.device).expand(batch, -1)
        needed = span.end
        capacity = 0 if state is None else state.keys.shape[1]
        grown = capacity
        if needed > capacity:
            grown = max(needed, capacity + capacity // 4)
            grown = -(-grown // self.block_size) * self.block_size
        continued = state is not None and grown == capacity and _may_write(state)
        if state is not None and continued:
            storage = state.storage
            storage.turn += 1
        else:
            storage = Storage()
        # New memory may be written in place too, unless a gradient flows through it.
        new_memory = grown != capacity and not torch.is_grad_enabled()
        write = Tensor.scatter_ if continued or new_memory else Tensor.scatter
        keys, values = (
            _grow(None if state is None else old, new, grown)
            for old, new in ((state and state.keys, key), (state and state.values, value))
        )
        if span.valid_BL is not None:
            # Padding is written behind the row's last token, where nothing looks yet.
            key = torch.where(span.valid_BL[..., None, None], key, key.new_zeros(()))
            value = torch.where(span.valid_BL[..., None, None], value, value.new_zeros(()))
        index = positions_BL[..., None, None].expand(-1, -1, *key.shape[2:])
        keys, values = write(keys, 1, index, key), write(values, 1, index, value)
        if state is None:
            return keys, values, block_means(keys, block_size=self.block_size), storage

        key_means = _grow(state.key_means, key, grown // self.block_size)
        first_block_B = positions_BL[:, 0] // self.block_size
        touched = torch.arange((size - 1) // self.block_size + 2, device=key.device)
        blocks_BM = (first_block_B[:, None] + touched).clamp(max=key_means.shape[1] - 1)
        cells = (
            blocks_BM[..., None] * self.block_size + torch.arange(self.block_size, device=key.device)
        ).flatten(1)
        gathered = keys.gather(1, cells[..., None, None].expand(-1, -1, *key.shape[2:]))
        means = block_means(gathered, block_size=self.block_size)
        index = blocks_BM[..., None, None].expand(-1, -1, *key.shape[2:])
        return keys, values, write(key_means, 1, index, means), storage


def _may_write(state: AttentionState) -> bool:
    """Whether the state's tensors may be written in place: it is its turn, and no gradient needs the old values."""
    writable = torch.is_inference_mode_enabled() or not state.keys.is_inference()
    return state.turn == state.storage.turn and writable and not torch.is_grad_enabled()


def _grow(old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
    """`old` [B, capacity', ...] with zeros behind it up to `capacity`."""
    if old is None:
        return like.new_zeros(like.shape[0], capacity, *like.shape[2:])
    if old.shape[1] == capacity:
        return old
    return torch.cat([old, old.new_zeros(old.shape[0], capacity - old.shape[1], *old.shape[2:])], dim=1)


def rotate(x_BLHd: Tensor, positions_BL: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) with the halves layout of Llama."""
    half = x_BLHd.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x_BLHd.device, dtype=torch.float32) / half)
    angle = positions_BL[..., None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BLHd.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BLHd.dtype)
