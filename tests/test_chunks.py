"""The grid of chunks against one cell at a time."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hydra_lab.chunks import ChunkGrid, Span, front_order, take

CPU = torch.device("cpu")


@st.composite
def spans(draw: st.DrawFn) -> tuple[Span, int, int]:
    """A span, its number of rows, and a chunk size."""
    batch, size = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    numbers = st.lists(st.integers(0, 20), min_size=batch, max_size=batch)
    start = draw(st.none() | numbers)
    length = draw(st.none() | st.lists(st.integers(0, size), min_size=batch, max_size=batch))
    start_B, length_B = (None if values is None else torch.tensor(values) for values in (start, length))
    return Span(size, start_B, length_B), batch, draw(st.integers(1, 9))


def cell_of(span: Span, row: int, t: int, chunk_size: int) -> tuple[int, int]:
    """Chunk of the grid and place in it of token t of the piece."""
    start = 0 if span.start is None else int(span.start[row])
    return (start + t) // chunk_size - start // chunk_size, (start + t) % chunk_size


def length_of(span: Span, row: int) -> int:
    return span.size if span.length is None else int(span.length[row])


@given(spans())
def test_tokens_fall_where_their_positions_say(case: tuple[Span, int, int]) -> None:
    span, batch, chunk_size = case
    grid = ChunkGrid(span, chunk_size, batch, CPU)
    present = torch.zeros(batch, grid.num_chunks, chunk_size, dtype=torch.bool)
    seen = present.clone()
    last = torch.zeros(batch, dtype=torch.long)
    for row in range(batch):
        first = cell_of(span, row, 0, chunk_size)
        seen[row, 0, : first[1]] = True
        for t in range(span.size):
            chunk, place = cell_of(span, row, t, chunk_size)
            assert int(grid.chunk_of_BL.expand(batch, -1)[row, t]) == chunk < grid.num_chunks
            if t < length_of(span, row):
                present[row, chunk, place] = seen[row, chunk, place] = True
                last[row] = chunk
    assert torch.equal(grid.present_BCT, present)
    assert torch.equal(grid.seen_BCT, seen)
    assert torch.equal(grid.complete_BC, seen.all(-1))
    assert torch.equal(grid.last_chunk_B, last)


@given(spans())
def test_the_grid_holds_the_tokens_and_zeros_and_gives_them_back(case: tuple[Span, int, int]) -> None:
    span, batch, chunk_size = case
    grid = ChunkGrid(span, chunk_size, batch, CPU)
    x = torch.arange(1.0, 1 + batch * span.size * 2).reshape(batch, span.size, 2)
    expected = torch.zeros(batch, grid.num_chunks, chunk_size, 2)
    valid = torch.zeros(batch, span.size, dtype=torch.bool)
    for row in range(batch):
        for t in range(length_of(span, row)):
            expected[(row, *cell_of(span, row, t, chunk_size))] = x[row, t]
            valid[row, t] = True
    x_with_garbage = x.masked_fill(~valid[..., None], torch.nan)
    cells = grid.to_grid(x_with_garbage)
    assert torch.equal(cells, expected)
    assert torch.equal(grid.from_grid(cells)[valid], x[valid])
    if span.valid_BL is not None:
        assert torch.equal(span.valid_BL, valid)


@given(spans())
def test_what_belongs_to_a_chunk_reaches_its_tokens(case: tuple[Span, int, int]) -> None:
    span, batch, chunk_size = case
    grid = ChunkGrid(span, chunk_size, batch, CPU)
    per_chunk = torch.randn(batch, grid.num_chunks, 3)
    spread = grid.to_tokens(per_chunk)
    for row in range(batch):
        for t in range(span.size):
            assert torch.equal(spread[row, t], per_chunk[row, cell_of(span, row, t, chunk_size)[0]])
        last = max(length_of(span, row) - 1, 0)
        assert torch.equal(
            grid.at_last(per_chunk)[row], per_chunk[row, cell_of(span, row, last, chunk_size)[0]]
        )


@given(spans())
def test_positions_and_last_tokens(case: tuple[Span, int, int]) -> None:
    span, batch, _ = case
    positions = span.positions(CPU).expand(batch, -1)
    for row in range(batch):
        start = 0 if span.start is None else int(span.start[row])
        assert positions[row].tolist() == list(range(start, start + span.size))
        assert int(span.last_index(batch, CPU)[row]) == length_of(span, row) - 1


masks = st.integers(1, 8).flatmap(
    lambda size: st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=1, max_size=3)
)


@given(masks)
def test_tokens_move_to_the_front_in_their_order(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    order, length = front_order(mask)
    expected: list[list[int]] = [[t for t, present in enumerate(row) if present] for row in rows]
    if length is None:
        assert mask.all() and order is None
        return
    assert length.tolist() == [len(row) for row in expected]
    columns: Tensor = torch.arange(mask.shape[1]).expand_as(mask) if order is None else order
    for row, found in zip(expected, columns, strict=True):
        assert found[: len(row)].tolist() == row
        assert sorted(found.tolist()) == list(range(mask.shape[1]))


def test_take_picks_one_entry_per_row() -> None:
    x = torch.arange(12).reshape(2, 3, 2)
    assert torch.equal(take(x, torch.tensor([2, 0])), torch.stack([x[0, 2], x[1, 0]]))
