"""What a configuration costs, worked out from its numbers alone: parameters, FLOPs per token, bytes of decode state.

Symbols in the formulas: L tokens of context, D hidden size; ssm: I = H P inner channels, H heads, N state size, G
groups, W convolution width, T chunk; attention: H query and J key-value heads of d channels, w window, b block size, K
selected blocks; moe: E experts of hidden width F, K of them used, T chunk; workspace: S slots of width V, key size k,
T chunk; memory: h heads, n1 and n2 half-keys of size k, K rows of width V read per head.

Parameters and bytes are exact; `flops_per_token` says what it counts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hydra_lab.config import HydraConfig
from hydra_lab.ops.sparse_attention.torch import WINDOW_TILE
from hydra_lab.ops.ssd.torch import CHUNKS_AT_ONCE
from hydra_lab.taps import PATHS

COMPONENTS: tuple[str, ...] = ("embedding", *PATHS, "norm", "gates", "head")
"""Parts that parameters, FLOPs and bytes are counted under."""


@dataclass(frozen=True)
class ParameterRow:
    """Parameters of one component in one place.

    Attributes:
        component: one of `COMPONENTS`.
        block: index of the block, or None for what lies outside the blocks.
        total: parameters that exist (a tied head has none of its own).
        active: parameters that take part in computing one token: one row of the embedding, the chosen experts of a
            moe path, the value rows that a memory path reads, the whole head even if it is tied, all of the rest.
    """

    component: str
    block: int | None
    total: int
    active: int


@dataclass(frozen=True)
class ParameterTable:
    """Parameters by component and block.

    Attributes:
        rows: in the order of the computation.
    """

    rows: tuple[ParameterRow, ...]

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(row.total for row in self.rows)

    @property
    def active(self) -> int:
        """Parameters that take part in computing one token."""
        return sum(row.active for row in self.rows)

    def by_component(self) -> dict[str, tuple[int, int]]:
        """(total, active) of every component that the model has, in the order of `COMPONENTS`."""
        return {name: (_sum(rows, "total"), _sum(rows, "active")) for name, rows in _components(self.rows)}

    def by_block(self) -> dict[int | None, tuple[int, int]]:
        """(total, active) of every block; None is what lies outside the blocks."""
        return {block: (_sum(rows, "total"), _sum(rows, "active")) for block, rows in _blocks(self.rows)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "total": self.total,
            "active": self.active,
            "by_component": {
                name: {"total": total, "active": active}
                for name, (total, active) in self.by_component().items()
            },
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class FlopRow:
    """FLOPs per token of one component in one place.

    Attributes:
        component: one of `COMPONENTS`.
        block: index of the block, or None for what lies outside the blocks.
        prefill: mean over the tokens of a context that is processed in one pass.
        decode: for the last token of the context, given the state of the others.
    """

    component: str
    block: int | None
    prefill: float
    decode: float


@dataclass(frozen=True)
class FlopTable:
    """FLOPs per token at one context length, forward pass; a backward pass takes about twice as many again.

    Attributes:
        context_length: L in tokens.
        rows: in the order of the computation.
    """

    context_length: int
    rows: tuple[FlopRow, ...]

    @property
    def prefill(self) -> float:
        """FLOPs per token when the context is processed in one pass."""
        return sum(row.prefill for row in self.rows)

    @property
    def decode(self) -> float:
        """FLOPs for the last token of the context, given the state of the others."""
        return sum(row.decode for row in self.rows)

    def by_component(self) -> dict[str, tuple[float, float]]:
        """(prefill, decode) of every component that computes, in the order of `COMPONENTS`."""
        return {name: (_sum(rows, "prefill"), _sum(rows, "decode")) for name, rows in _components(self.rows)}

    def by_block(self) -> dict[int | None, tuple[float, float]]:
        """(prefill, decode) of every block; None is the head."""
        return {block: (_sum(rows, "prefill"), _sum(rows, "decode")) for block, rows in _blocks(self.rows)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "context_length": self.context_length,
            "prefill": self.prefill,
            "decode": self.decode,
            "by_component": {
                name: {"prefill": prefill, "decode": decode}
                for name, (prefill, decode) in self.by_component().items()
            },
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class StateRow:
    """Bytes of decode state that one path of one block keeps for one sequence."""

    component: str
    block: int
    num_bytes: int


@dataclass(frozen=True)
class StateTable:
    """Bytes of decode state of one sequence at one context length.

    Attributes:
        context_length: L in tokens.
        rows: in the order of the computation.
    """

    context_length: int
    rows: tuple[StateRow, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(row.num_bytes for row in self.rows)

    def by_component(self) -> dict[str, int]:
        """Bytes of every path that keeps a state."""
        return {name: _sum(rows, "num_bytes") for name, rows in _components(self.rows)}

    def by_block(self) -> dict[int, int]:
        """Bytes of every block."""
        return {block: _sum(rows, "num_bytes") for block, rows in _blocks(self.rows)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "context_length": self.context_length,
            "num_bytes": self.num_bytes,
            "by_component": self.by_component(),
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class Accounting:
    """Everything at once: parameters, and costs at several context lengths."""

    parameters: ParameterTable
    flops: tuple[FlopTable, ...]
    state: tuple[StateTable, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "parameters": self.parameters.to_dict(),
            "flops_per_token": [table.to_dict() for table in self.flops],
            "state_bytes": [table.to_dict() for table in self.state],
        }


def account(
    config: HydraConfig,
    context_lengths: Sequence[int] = (1024, 8192, 65536),
    dtype: torch.dtype = torch.float32,
) -> Accounting:
    """Parameters, FLOPs per token and bytes of state at each of `context_lengths`.

    Raises:
        ValueError: if a context length is below 1.
    """
    return Accounting(
        parameter_table(config),
        tuple(flops_per_token(config, length) for length in context_lengths),
        tuple(state_bytes(config, length, dtype) for length in context_lengths),
    )


# --- parameters ---------------------------------------------------------------------------------------------------


def parameter_table(config: HydraConfig) -> ParameterTable:
    """Parameters by component and block, total and active per token.

    Per block that has the path:

        ssm         D (2 I + 2 G N + H) + (I + 2 G N)(W + 1) + 3 H + I + I D
        attention   2 D H d + 2 D J d
        moe         E (2 D + D) + D + E 3 F D       ("first" and "mean" pooling: E (D + D) + E 3 F D)
        workspace   S V + 2 S k + D (2 k + V + S + 1) + S + 1 + V + V k + V D
        memory      2 D h k + h (n1 + n2) k + n1 n2 V + D + 1 + V D

    besides a norm (D) and a gate per path. Active: K instead of E experts, h K instead of n1 n2 value rows.
    """
    size, vocabulary = config.hidden_size, config.vocab_size
    table = vocabulary * size
    rows = [ParameterRow("embedding", None, table, size)]
    for block in range(config.num_hidden_layers):
        paths = _paths_of(config, block)
        rows.append(ParameterRow("norm", block, size, size))
        rows += [ParameterRow(path, block, *_PARAMETERS[path](config)) for path in paths]
        rows.append(ParameterRow("gates", block, len(paths), len(paths)))
    rows.append(ParameterRow("norm", None, size, size))
    rows.append(ParameterRow("head", None, 0 if config.tie_word_embeddings else table, table))
    return ParameterTable(tuple(rows))


def _ssm_parameters(config: HydraConfig) -> tuple[int, int]:
    size, inner, heads = config.hidden_size, config.ssm_inner_size, config.ssm_num_heads
    channels = _conv_channels(config)
    count = size * (inner + channels + heads) + channels * (config.ssm_conv_kernel + 1) + 3 * heads
    count += inner + inner * size
    return count, count


def _attention_parameters(config: HydraConfig) -> tuple[int, int]:
    heads = config.attention_num_heads + config.attention_num_kv_heads
    count = 2 * config.hidden_size * heads * config.attention_head_dim
    return count, count


def _moe_parameters(config: HydraConfig) -> tuple[int, int]:
    size, experts = config.hidden_size, config.moe_num_experts
    routers = experts * (_router_input(config) + size)
    if config.moe_chunk_pooling == "ema":
        routers += size
    expert = 3 * config.moe_hidden_size * size
    return routers + experts * expert, routers + config.moe_top_k * expert


def _workspace_parameters(config: HydraConfig) -> tuple[int, int]:
    size, slots, key = config.hidden_size, config.workspace_num_slots, config.workspace_key_size
    value = config.workspace_slot_size
    count = slots * value + 2 * slots * key + size * (2 * key + value + slots + 1) + slots + 1
    count += value + value * key + value * size
    return count, count


def _memory_parameters(config: HydraConfig) -> tuple[int, int]:
    size, heads, key, value = (
        config.hidden_size,
        config.memory_num_heads,
        config.memory_key_size,
        _value_size(config),
    )
    n1, n2 = config.memory_num_keys
    others = 2 * size * heads * key + heads * (n1 + n2) * key + size + 1 + value * size
    return others + n1 * n2 * value, others + min(heads * config.memory_top_k, n1 * n2) * value


_PARAMETERS: dict[str, Callable[[HydraConfig], tuple[int, int]]] = {
    "ssm": _ssm_parameters,
    "attention": _attention_parameters,
    "moe": _moe_parameters,
    "workspace": _workspace_parameters,
    "memory": _memory_parameters,
}


# --- FLOPs --------------------------------------------------------------------------------------------------------


def flops_per_token(config: HydraConfig, context_length: int) -> FlopTable:
    """FLOPs per token of a forward pass of the torch backend, at a context of `context_length` tokens.

    What counts: matrix products, two FLOPs per multiply-add, as `torch.utils.flop_counter` counts them, with
    everything that the torch path multiplies and then masks (the upper half of a chunk, the edges of tiles). What does
    not: lookups, norms, softmax, activations, the short convolution and other element-wise work, and the weighted sums
    of rows that were looked up (values of the memory, outputs of the experts); all of that is bound by memory. The
    head is computed at every position.

    A matrix of m x n weights costs 2 m n per token. Besides these, per pass over L tokens in C = ceil(L / T) chunks:

        ssm         2 C T T (G N + I) inside the chunks, 4 C T I N between them; 2 I N for a single token, whose state
                    is brought up to date element by element
        attention   4 H d (window keys + keys of the blocks), 2 J d floor(L / b) per selection
        moe         per chunk the router, per token K experts
        workspace   2 C T S (2 k + 2 V) writes and reads, 2 C D S gates, 2 C S V k slot keys
        memory      2 L h (n1 + n2) k
        chunk to chunk (ssm, moe, workspace): 2 c c values, for every c <= 64 chunks at once

    One thing is left out because it depends on the data: in prefill, queries that select the same block are computed
    together in tiles, whose empty places are multiplied too (3 to 6% of all on the tiny `nano`). Decode has no such
    tiles; there the state's capacity is taken to be the context length.

    Raises:
        ValueError: if `context_length` is below 1.
    """
    _check_length(context_length)
    rows: list[FlopRow] = []
    for block in range(config.num_hidden_layers):
        for path in _paths_of(config, block):
            count = _FLOPS[path]
            prefill = count(config, context_length, 0) / context_length
            rows.append(FlopRow(path, block, prefill, float(count(config, 1, context_length - 1))))
    head = 2.0 * config.hidden_size * config.vocab_size
    return FlopTable(context_length, (*rows, FlopRow("head", None, head, head)))


def _chunks(length: int, start: int, chunk_size: int) -> int:
    """Chunks that `length` tokens from position `start` on touch."""
    return -(-(start % chunk_size + length) // chunk_size)


def _passing_flops(num_chunks: int, values: int) -> int:
    """From chunk to chunk, for `values` numbers: a lower triangular matrix per span of chunks."""
    full, rest = divmod(num_chunks, CHUNKS_AT_ONCE)
    return 2 * values * (full * CHUNKS_AT_ONCE**2 + rest**2)


def _ssm_flops(config: HydraConfig, length: int, start: int) -> int:
    size, inner, state = config.hidden_size, config.ssm_inner_size, config.ssm_state_size
    channels = _conv_channels(config)
    chunk = min(config.ssm_chunk_size, length)
    chunks = -(-length // chunk)
    projections = 2 * length * size * (inner + channels + config.ssm_num_heads + inner)
    if length == 1:
        return projections + 2 * inner * state
    within = 2 * chunks * chunk * chunk * (config.ssm_num_groups * state + inner)
    between = 4 * chunks * chunk * inner * state
    return projections + within + between + _passing_flops(chunks, inner * state)


def _moe_flops(config: HydraConfig, length: int, start: int) -> int:
    size, experts = config.hidden_size, config.moe_num_experts
    chunks = _chunks(length, start, config.moe_chunk_size)
    routing = 2 * experts * (chunks * _router_input(config) + length * size) + _passing_flops(chunks, size)
    return routing + 2 * length * config.moe_top_k * 3 * config.moe_hidden_size * size


def _workspace_flops(config: HydraConfig, length: int, start: int) -> int:
    size, slots, key = config.hidden_size, config.workspace_num_slots, config.workspace_key_size
    value, chunk = config.workspace_slot_size, config.workspace_chunk_size
    chunks = _chunks(length, start, chunk)
    cells = chunks * chunk
    projections = 2 * length * size * (2 * key + 2 * value + 1)
    per_chunk = 2 * chunks * slots * (size + value * key)
    return (
        projections
        + per_chunk
        + 2 * cells * slots * (2 * key + 2 * value)
        + _passing_flops(chunks, slots * value)
    )


def _memory_flops(config: HydraConfig, length: int, start: int) -> int:
    size, heads, key = config.hidden_size, config.memory_num_heads, config.memory_key_size
    search = 2 * size * heads * key + heads * sum(config.memory_num_keys) * key
    return 2 * length * (search + size + _value_size(config) * size)


def _attention_flops(config: HydraConfig, length: int, start: int) -> int:
    heads, kv_heads, head_dim = (
        config.attention_num_heads,
        config.attention_num_kv_heads,
        config.attention_head_dim,
    )
    projections = 2 * length * 2 * config.hidden_size * (heads + kv_heads) * head_dim
    tiled = config.attention_selection == "tile"
    selections = _chunks(length, start, config.attention_block_size) if tiled else length
    if start:
        num_means = -(-(start + length) // config.attention_block_size)
    else:
        num_means = length // config.attention_block_size
    scoring = 2 * selections * kv_heads * head_dim * num_means
    seen = heads * (_window_pairs(config, length, start) + _block_pairs(config, length, start))
    return projections + scoring + 4 * head_dim * seen


def _window_pairs(config: HydraConfig, length: int, start: int) -> int:
    """(query, key) pairs that the tiles of the window part multiply, per query head."""
    before = config.attention_window - 1
    pairs = 0
    for first in range(0, length, WINDOW_TILE):
        end = min(first + WINDOW_TILE, length)
        pairs += (end - first) * (end + before - max(first, before - start))
    return pairs


def _block_pairs(config: HydraConfig, length: int, start: int) -> int:
    """(query, key) pairs of the sink and the selected blocks, per query head."""
    block_size, window = config.attention_block_size, config.attention_window
    position = torch.arange(start, start + length)
    if config.attention_selection == "tile":
        tile = position // block_size
        last_candidate = torch.minimum(tile - 1, (tile * block_size + block_size - 1 - window) // block_size)
    else:
        last_candidate = torch.minimum(position // block_size - 1, (position - window) // block_size)
    selected = last_candidate.clamp(min=0, max=config.attention_num_selected)  # block 0 is no candidate
    return block_size * int((selected + (position >= window)).sum())


_FLOPS: dict[str, Callable[[HydraConfig, int, int], int]] = {
    "ssm": _ssm_flops,
    "attention": _attention_flops,
    "moe": _moe_flops,
    "workspace": _workspace_flops,
    "memory": _memory_flops,
}


# --- decode state -------------------------------------------------------------------------------------------------


def state_bytes(config: HydraConfig, context_length: int, dtype: torch.dtype = torch.float32) -> StateTable:
    """Bytes of decode state of one sequence after `context_length` tokens, activations in `dtype` of s bytes.

        ssm         s (W - 1)(I + 2 G N) + 4 I N
        attention   s J d (2 L' + L' / b) + 12 J K,   L' = L rounded up to whole blocks
        moe         4 (2 D + E) + 8 K
        workspace   4 S V + s T (k + V) + 4 D
        memory      nothing

    Only the attention path's share grows with the context. It equals `HydraCache.num_bytes()` of a context that was
    processed in one pass; a cache that grows token by token doubles its capacity and so holds up to twice as much.

    Raises:
        ValueError: if `context_length` is below 1.
    """
    _check_length(context_length)
    rows = [
        StateRow(path, block, _STATE_BYTES[path](config, context_length, dtype.itemsize))
        for block in range(config.num_hidden_layers)
        for path in _paths_of(config, block)
        if path in _STATE_BYTES
    ]
    return StateTable(context_length, tuple(rows))


def _ssm_bytes(config: HydraConfig, length: int, itemsize: int) -> int:
    conv = (config.ssm_conv_kernel - 1) * _conv_channels(config)
    return itemsize * conv + 4 * config.ssm_inner_size * config.ssm_state_size


def _attention_bytes(config: HydraConfig, length: int, itemsize: int) -> int:
    blocks = -(-length // config.attention_block_size)
    width = config.attention_num_kv_heads * config.attention_head_dim
    kept = width * blocks * (2 * config.attention_block_size + 1)
    return itemsize * kept + 12 * config.attention_num_kv_heads * config.attention_num_selected


def _moe_bytes(config: HydraConfig, length: int, itemsize: int) -> int:
    return 4 * (2 * config.hidden_size + config.moe_num_experts) + 8 * config.moe_top_k


def _workspace_bytes(config: HydraConfig, length: int, itemsize: int) -> int:
    slots = config.workspace_num_slots * config.workspace_slot_size
    open_chunk = config.workspace_chunk_size * (config.workspace_key_size + config.workspace_slot_size)
    return 4 * slots + itemsize * open_chunk + 4 * config.hidden_size


_STATE_BYTES: dict[str, Callable[[HydraConfig, int, int], int]] = {
    "ssm": _ssm_bytes,
    "attention": _attention_bytes,
    "moe": _moe_bytes,
    "workspace": _workspace_bytes,
}


# --- shared -------------------------------------------------------------------------------------------------------


def _conv_channels(config: HydraConfig) -> int:
    return config.ssm_inner_size + 2 * config.ssm_num_groups * config.ssm_state_size


def _router_input(config: HydraConfig) -> int:
    return config.hidden_size * (2 if config.moe_chunk_pooling == "ema" else 1)


def _value_size(config: HydraConfig) -> int:
    assert config.memory_value_size is not None
    return config.memory_value_size


def _paths_of(config: HydraConfig, block: int) -> list[str]:
    return [path for path in PATHS if block in config.layers_with(path)]


def _check_length(context_length: int) -> None:
    if context_length < 1:
        raise ValueError(f"context_length={context_length} must be at least 1")


def _sum(rows: Iterable[Any], field: str) -> Any:
    return sum(getattr(row, field) for row in rows)


def _components(rows: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    found = {row.component for row in rows}
    return [(name, [row for row in rows if row.component == name]) for name in COMPONENTS if name in found]


def _blocks(rows: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    found = dict.fromkeys(row.block for row in rows)
    return [(block, [row for row in rows if row.block == block]) for block in found]
