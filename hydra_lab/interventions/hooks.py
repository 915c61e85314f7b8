"""How a change gets into a pass: on the way into a module that hands on what it is given.

A tap, and what carries a path's contribution, is an identity, so an edit of its input is an edit of its output. Made
there, before the module runs, it is seen by whoever reads the output: forward hooks (`capture.record`), whenever they
were registered, and nnsight (`lens.HydraLens`), which looks inside `forward`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hydra_lab.chunks import ChunkGrid, Span


@contextmanager
def edited(module: nn.Module, edit: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, `module` is given `edit(value)` for its only input; edits are made in order of entry."""

    def replace(_module: nn.Module, inputs: tuple[Any]) -> tuple[Any]:
        return (edit(inputs[0]),)  # in a tuple, for a decision is a tuple too

    handle = module.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def removed(weights: Tensor, is_removed: Tensor, renormalize: bool) -> Tensor:
    """`weights` [..., K] with some of them 0; renormalised, the others take over their sum in proportion.

    Where all are removed nothing is left to take it over. Entries that keep their weights keep them to the bit.
    """
    kept = weights.masked_fill(is_removed, 0.0)
    if not renormalize:
        return kept
    before, after = (each.sum(dim=-1, keepdim=True) for each in (weights, kept))
    scaled = kept * (before / after.clamp(min=torch.finfo(weights.dtype).tiny))
    return torch.where(is_removed.any(dim=-1, keepdim=True), scaled, weights)


class Passage:
    """What a path is given in the pass under way.

    Attributes:
        hidden: [B, L, D] its input.
        span: where the piece of every row lies.
    """

    hidden: Tensor
    span: Span

    def grid(self, chunk_size: int) -> ChunkGrid:
        """The chunks that the piece touches."""
        return ChunkGrid(self.span, chunk_size, self.hidden.shape[0], self.hidden.device)

    def chunk_indices(self, grid: ChunkGrid) -> Tensor:
        """[B, C] index of each chunk of `grid`, counted from its row's first token."""
        chunks = torch.arange(grid.num_chunks, device=grid.device).expand(grid.batch, -1)
        return chunks if self.span.start is None else chunks + (self.span.start // grid.chunk_size)[:, None]

    def positions(self) -> Tensor:
        """[B, L] index of each token, counted from its row's first."""
        return self.span.positions(self.hidden.device).expand(self.hidden.shape[0], -1)


@contextmanager
def noted(path: nn.Module) -> Iterator[Passage]:
    """Within the context, the passage says what `path` was last given."""
    passage = Passage()

    def note(_path: nn.Module, inputs: tuple[Any, ...]) -> None:
        passage.hidden, passage.span = inputs[:2]

    handle = path.register_forward_pre_hook(note)
    try:
        yield passage
    finally:
        handle.remove()
