"""The inverse of an index: for every target, the entries that point at it, cut into pieces of bounded length.

Gradients of a gather are sums over such entries. Sorted once, they can be added up without atomic operations, in
the same order every time, and a target that thousands of entries point at is shared by many programs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inverse(NamedTuple):
    """Entries by target, in pieces. Pieces of one target lie side by side, targets ascend.

    Attributes:
        order: [n] int64 entries, sorted by target; entries of one target keep their order, those without one come last.
        target: [M] int64 target of each piece; -1 past the last piece.
        start, stop: [M] int64 piece p holds the entries `order[start[p]:stop[p]]`; empty past the last piece.
        run: [M] int64 number of pieces of the target, at its first piece; 0 at all others.
    """

    order: Tensor
    target: Tensor
    start: Tensor
    stop: Tensor
    run: Tensor


def invert(target: Tensor, num_targets: int, piece_size: int) -> Inverse:
    """Sort entries by target and cut them into pieces, without waiting for the device.

    Args:
        target: [n] int64 target of each entry, in 0 .. num_targets-1, or -1 for an entry without one.
        num_targets: number of targets; memory does not depend on it.
        piece_size: most entries of a piece.

    Returns:
        An `Inverse` with M = n // piece_size + min(n, num_targets) pieces, the last of them empty.
    """
    num_entries = target.shape[0]
    num_pieces = num_entries // piece_size + min(num_entries, num_targets)
    sorted_target, order = torch.where(target < 0, num_targets, target).sort(stable=True)
    index = torch.arange(num_entries, device=target.device)
    is_first = torch.ones_like(index, dtype=torch.bool)
    is_first[1:] = sorted_target[1:] != sorted_target[:-1]
    begin = torch.where(is_first, index, 0).cummax(0).values
    present = sorted_target < num_targets
    opens = (is_first | ((index - begin) % piece_size == 0)) & present
    piece = torch.where(
        opens, opens.cumsum(0) - 1, num_pieces
    )  # the place `num_pieces` takes what opens no piece

    def of_pieces(values: Tensor, fill: int) -> Tensor:
        return values.new_full((num_pieces + 1,), fill).scatter_(0, piece, values)[:-1]

    num_present = present.sum()
    start = of_pieces(index, num_entries).minimum(num_present)
    stop = torch.cat([start[1:], num_present[None]])
    piece_target = of_pieces(sorted_target, -1)
    # A target's pieces: from its first one to the first of the next target.
    heads = of_pieces(is_first.long(), 0) > 0
    number = torch.arange(num_pieces, device=target.device)
    used = opens.sum()
    following = torch.where(heads, number, used).flip(0).cummin(0).values.flip(0)  # first head at or after
    following = torch.cat([following[1:], used[None]])
    run = torch.where(heads, following - number, 0)
    return Inverse(order, piece_target, start, stop, run)
