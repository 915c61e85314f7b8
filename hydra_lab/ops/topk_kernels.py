# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# What `triton.jit` turns into kernels cannot be typed.
"""A running top-k in registers, for kernels that score candidates tile by tile.

A score and the index it belongs to make one comparable number, a *key*: the bits of the float32 score, so arranged that
they order like the score, in the high half of an int64, and 2**31 - 1 minus the index in the low half. Of two keys the
larger has the larger score or, where scores are equal, the lower index, and no two candidates have the same key.

A list of the best keys is not kept in order: a new key replaces the least one. Rounds of that end when no row's best
new key beats its least kept one, so most tiles late in a search cost two reductions and no round.

Shape suffixes: T rows, N candidates of a tile, K places of the list (a power of two, at least `top_k`).
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 63))
"""A key below all others: of what is no candidate."""
_HIGHEST = tl.constexpr((1 << 63) - 1)
REGISTERS = 168
"""Most registers of a thread of a search, so that three programs of four warps share a processor. Left to itself the
assembler aims at four, or five, and spills."""
_MAX_INT32 = tl.constexpr((1 << 31) - 1)
_EMPTY = tl.constexpr(((0x807FFFFF - (1 << 32)) << 32) | ((1 << 31) - 1))
"""The largest key of a score of -inf: its bits 0xff800000, arranged to order, and index 0."""


@triton.jit
def make_keys(scores, index):
    """Keys of float32 scores and the indices of their candidates (0 .. 2**31 - 1), of shapes that broadcast."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & _MAX_INT32)  # the bits of negative numbers grow as these fall
    return (ordered.to(tl.int64) << 32) | (index ^ _MAX_INT32).to(tl.int64)  # 2**31 - 1 - index


@triton.jit
def score_of(keys):
    """The float32 score of each key; -inf of keys that stand for no candidate."""
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & _MAX_INT32)
    return tl.where(is_candidate(keys), bits.to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def index_of(keys):
    """The index of each key, int64."""
    return (keys & _MAX_INT32) ^ _MAX_INT32


@triton.jit
def is_candidate(keys):
    """False of keys that stand for no candidate, and of candidates that score -inf."""
    return keys > _EMPTY


@triton.jit
def empty_list(T: tl.constexpr, K: tl.constexpr, top_k: tl.constexpr):
    """[T, K] a list of `top_k` free places; the others are never given away."""
    place = tl.arange(0, K)
    free = tl.where(
        place < top_k, LOWEST + place.to(tl.int64), _HIGHEST
    )  # all different, below all candidates
    return tl.broadcast_to(free[None, :], (T, K))


@triton.jit
def keep_best(best_TK, tile_TN):
    """The list after the candidates of a tile have come in; keys of the tile that are no candidates are `LOWEST`."""
    top_T = tl.max(tile_TN, axis=1)
    worst_T = tl.min(best_TK, axis=1)
    while tl.max((top_T > worst_T).to(tl.int32), axis=0) > 0:
        replaced_TK = (best_TK == worst_T[:, None]) & (top_T > worst_T)[:, None]
        best_TK = tl.where(replaced_TK, top_T[:, None], best_TK)
        tile_TN = tl.where(tile_TN == top_T[:, None], LOWEST, tile_TN)
        top_T = tl.max(tile_TN, axis=1)
        worst_T = tl.min(best_TK, axis=1)
    return best_TK


@triton.jit
def candidates_of(best_TK, top_k: tl.constexpr):
    """The list with `LOWEST` in the places that are never given away."""
    place = tl.arange(0, best_TK.shape[1])
    return tl.where(place[None, :] < top_k, best_TK, LOWEST)


@triton.jit
def best_first(best_TK, top_k: tl.constexpr):
    """The list in order: its first `top_k` places hold the best keys, descending, then what stands for none."""
    return tl.sort(candidates_of(best_TK, top_k), descending=True)


def list_size(top_k: int) -> int:
    """Places K of a list for `top_k` keys."""
    return max(2, triton.next_power_of_2(top_k))


def rows_of_list(top_k: int) -> int:
    """Rows T that a program with four warps searches for at once, so that its lists stay in registers."""
    return max(16, min(32, 1024 // list_size(top_k)))
