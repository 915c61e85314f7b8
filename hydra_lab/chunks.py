"""Where a piece of a sequence lies: absolute positions, and the grid of chunks that they fall into.

A model may be given a sequence whole, in pieces, or token by token, and the rows of a batch may stand at different
positions. What is decided per chunk must not depend on that, so chunks are counted from a row's own first token.

Shape suffixes: B rows, L positions of this piece, C chunks that the piece touches, T tokens per chunk.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The piece of each row that one forward pass is given.

    Attributes:
        size: L, the width of the piece.
        start: [B] absolute position of each row's first token; None means 0 everywhere.
        length: [B] tokens present in each row, the rest is padding on the right; None means L everywhere.
        bound: a number that no position of the piece reaches, where the caller knows one; it saves waiting for the
            device to hear it.
    """

    size: int
    start: Tensor | None = None
    length: Tensor | None = None
    bound: int | None = None

    @property
    def end(self) -> int:
        """A number that no position of the piece reaches: `bound`, or else the least such number."""
        if self.bound is not None:
            return self.bound
        return self.size if self.start is None else int(self.start.max()) + self.size

    @cached_property
    def valid_BL(self) -> Tensor | None:
        """[B, L] True where a token is present; None where all are."""
        if self.length is None:
            return None
        return torch.arange(self.size, device=self.length.device) < self.length[:, None]

    def positions(self, device: torch.device) -> Tensor:
        """[B, L] (or [1, L] when every row starts at 0) absolute positions."""
        index = torch.arange(self.size, device=device)[None]
        return index if self.start is None else index + self.start[:, None]

    def last_index(self, batch: int, device: torch.device) -> Tensor:
        """[B] index within the piece of each row's last token (-1 for a row without tokens)."""
        if self.length is None:
            return torch.full((batch,), self.size - 1, device=device)
        return self.length - 1


class ChunkGrid:
    """The chunks of `chunk_size` tokens that a span touches.

    Chunk 0 of the grid is the one that holds a row's first token of this piece; `offset` of its tokens came in
    earlier pieces.
    """

    def __init__(self, span: Span, chunk_size: int, batch: int, device: torch.device) -> None:
        self.span = span
        self.chunk_size = chunk_size
        self.batch = batch
        self.device = device
        self.offset_B = None if span.start is None else span.start % chunk_size
        if self.offset_B is None or span.size == 1:
            self.num_chunks = -(-span.size // chunk_size)
        else:
            self.num_chunks = -(-(int(self.offset_B.max()) + span.size) // chunk_size)

    @cached_property
    def chunk_of_BL(self) -> Tensor:
        """[B, L] (or [1, L]) chunk of the grid that holds each token."""
        index = torch.arange(self.span.size, device=self.device)[None]
        if self.offset_B is not None:
            index = index + self.offset_B[:, None]
        return index // self.chunk_size

    @cached_property
    def _source_BG(self) -> Tensor:
        """[B, C*T] index within the piece of each cell of the grid; out of range where no token falls."""
        cell = torch.arange(self.num_chunks * self.chunk_size, device=self.device)[None]
        return cell.expand(self.batch, -1) if self.offset_B is None else cell - self.offset_B[:, None]

    @cached_property
    def present_BCT(self) -> Tensor:
        """[B, C, T] True where a token of this piece falls."""
        if self.span.length is None:
            end = torch.full((self.batch, 1), self.span.size, device=self.device)
        else:
            end = self.span.length[:, None]
        present = (self._source_BG >= 0) & (self._source_BG < end)
        return present.unflatten(1, (self.num_chunks, self.chunk_size))

    @cached_property
    def seen_BCT(self) -> Tensor:
        """[B, C, T] True where a token of this piece or of an earlier one falls."""
        if self.offset_B is None:
            return self.present_BCT
        earlier = self._source_BG < 0
        return self.present_BCT | earlier.unflatten(1, (self.num_chunks, self.chunk_size))

    @cached_property
    def complete_BC(self) -> Tensor:
        """[B, C] True for chunks whose every token has been seen."""
        return self.seen_BCT.all(dim=-1)

    @cached_property
    def last_chunk_B(self) -> Tensor:
        """[B] chunk of the grid that holds each row's last token."""
        last = self.span.last_index(self.batch, self.device)
        if self.offset_B is not None:
            last = last + self.offset_B
        return last.clamp(min=0) // self.chunk_size

    def to_grid(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, C, T, ...], zero where no token of this piece falls."""
        tail = x.shape[2:]
        if self.offset_B is None:
            missing = self.num_chunks * self.chunk_size - self.span.size
            if self.span.valid_BL is not None:
                x = torch.where(
                    self.span.valid_BL.reshape(*x.shape[:2], *[1] * len(tail)), x, x.new_zeros(())
                )
            if missing:
                x = torch.cat([x, x.new_zeros(x.shape[0], missing, *tail)], dim=1)
            return x.reshape(x.shape[0], self.num_chunks, self.chunk_size, *tail)
        source = self._source_BG.clamp(0, self.span.size - 1).reshape(self.batch, -1, *[1] * len(tail))
        cells = x.gather(1, source.expand(-1, -1, *tail))
        cells = cells.unflatten(1, (self.num_chunks, self.chunk_size))
        return torch.where(
            self.present_BCT.reshape(*cells.shape[:3], *[1] * len(tail)), cells, x.new_zeros(())
        )

    def from_grid(self, cells: Tensor) -> Tensor:
        """[B, C, T, ...] -> [B, L, ...]; positions of padding hold whatever their cells hold."""
        tail = cells.shape[3:]
        flat = cells.reshape(cells.shape[0], -1, *tail)
        if self.offset_B is None:
            return flat[:, : self.span.size]
        index = torch.arange(self.span.size, device=self.device)[None] + self.offset_B[:, None]
        return flat.gather(1, index.reshape(self.batch, -1, *[1] * len(tail)).expand(-1, -1, *tail))

    def to_tokens(self, per_chunk: Tensor) -> Tensor:
        """[B, C, ...] -> [B, L, ...]: every token gets its chunk's entry."""
        tail = per_chunk.shape[2:]
        index = self.chunk_of_BL.expand(self.batch, -1).reshape(self.batch, -1, *[1] * len(tail))
        return per_chunk.gather(1, index.expand(-1, -1, *tail))

    def at_last(self, per_chunk: Tensor) -> Tensor:
        """[B, C, ...] -> [B, ...]: the entry of the chunk that holds each row's last token."""
        return take(per_chunk, self.last_chunk_B)


def take(x: Tensor, index_B: Tensor) -> Tensor:
    """[B, N, ...], [B] -> [B, ...]: entry `index_B[b]` of row b."""
    return x[torch.arange(x.shape[0], device=x.device), index_B]


def front_order(mask_BL: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """How to move every row's tokens to the front.

    Args:
        mask_BL: [B, L] True where a token is present; padding may lie anywhere.

    Returns:
        (order, length): `order` [B, L] gathers tokens to the front in their order (None if they are there already),
        `length` [B] counts them (None if nothing is padded).
    """
    if bool(mask_BL.all()):
        return None, None
    length = mask_BL.sum(dim=1)
    front = torch.arange(mask_BL.shape[1], device=mask_BL.device) < length[:, None]
    if bool((front == mask_BL).all()):
        return None, length
    return torch.argsort(~mask_BL, dim=1, stable=True), length
