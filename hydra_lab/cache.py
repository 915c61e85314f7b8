"""Decode state: what a model keeps of the tokens it has seen."""

from typing import Any

from torch import Tensor

from hydra_lab.nn.block import BlockState


class HydraCache:
    """State of every path of every block, and how many tokens each row has seen.

    Constant in size but for the attention path's keys and values. Tensors are replaced, or written only where no other
    cache looks (`hydra_lab.nn.attention.Storage`), so a `copy()` stays what it was.

    Attributes:
        states: per block, the state of each of its paths.
        lengths: [B] tokens that each row has seen, padding not counted; None while empty.
    """

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[BlockState] = [{} for _ in range(num_layers)]
        self.lengths: Tensor | None = None
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input seen so far, padding included: what `generate` counts."""
        return self.columns

    def advance(self, lengths: Tensor, columns: int) -> None:
        """Note that another piece has been seen: `lengths` [B] tokens in `columns` columns."""
        self.lengths = lengths if self.lengths is None else self.lengths + lengths
        self.columns += columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue what row `beam_idx[i]` was (beam search)."""
        self.states = [
            {path: _index(state, beam_idx) for path, state in block.items()} for block in self.states
        ]
        if self.lengths is not None:
            self.lengths = self.lengths[beam_idx]

    def copy(self) -> "HydraCache":
        """Another cache with the same state; continuing one leaves the other alone."""
        other = HydraCache(len(self.states))
        other.states = [dict(block) for block in self.states]
        other.lengths, other.columns = self.lengths, self.columns
        return other

    def num_bytes(self) -> int:
        """Bytes held by the state."""
        tensors = [t for block in self.states for state in block.values() for t in _tensors(state)]
        return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(state: Any) -> list[Tensor]:
    return [field for field in state if isinstance(field, Tensor)]


def _index(state: Any, rows: Tensor) -> Any:
    tensors = {
        name: field.index_select(0, rows.to(field.device))
        for name, field in state._asdict().items()
        if isinstance(field, Tensor)
    }
    return state._replace(**tensors)
