"""The selection kernel against sorting all scores."""

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_lab.ops.sparse_attention import block_means, select_blocks
from hydra_lab.ops.topk_kernels import index_of, make_keys, score_of
from tests.kernels.checking import DEVICE, DTYPES, LENGTHS, assert_agree, strided

WINDOW, BLOCK = 12, 8


class Problem(NamedTuple):
    """q [B, Lq, Hq, d], key means [B, NB, Hkv, d], start [B] or None."""

    q: Tensor
    key_means: Tensor
    start: Tensor | None


def problem(
    length: int,
    num_blocks: int,
    *,
    heads: int = 2,
    key_heads: int = 1,
    head_size: int = 5,
    start: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    generator = torch.Generator().manual_seed(length)
    rows = 1 if start is None else len(start)
    q = torch.randn(rows, length, heads, head_size, generator=generator).to(DEVICE, dtype)
    means = torch.randn(rows, num_blocks, key_heads, head_size, generator=generator).to(DEVICE, dtype)
    return Problem(q, means, None if start is None else torch.tensor(start, device=DEVICE))


def select(
    case: Problem, backend: Any, num_selected: int = 3, serves: int = 1, window: int = WINDOW
) -> dict[str, Tensor]:
    blocks, scores = select_blocks(
        case.q,
        case.key_means,
        start=case.start,
        window=window,
        block_size=BLOCK,
        num_selected=num_selected,
        serves=serves,
        backend=backend,
    )
    assert blocks.dtype == torch.int64 and scores.dtype == torch.float32
    # -inf has no relative error
    return {"blocks": blocks, "scores": scores.clamp(min=-1e3), "missing": (scores == -torch.inf).long()}


def check(case: Problem, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    on_cpu = Problem(*(None if x is None else x.cpu() for x in case))  # pyright: ignore[reportArgumentType]
    expected = select(on_cpu, "reference", **options)
    assert (expected["blocks"] >= 0).any()
    scores = expected.pop("scores")
    actual = select(case, "triton", **options)
    present = expected["missing"] == 0
    assert_agree({"scores": actual.pop("scores").cpu()[present]}, {"scores": scores[present]}, dtype)
    assert_agree(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_sorting_all_scores(length: int, dtype: torch.dtype) -> None:
    start = None if length == 500 else [37, 300]
    check(problem(length, 70, start=start, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_size", "num_selected"),
    [(3, 3, 16, 1), (3, 1, 33, 2), (6, 2, 8, 16), (1, 1, 64, 7), (2, 2, 1, 64)],
)
def test_agrees_at_other_sizes(
    heads: int, key_heads: int, head_size: int, num_selected: int, dtype: torch.dtype
) -> None:
    case = problem(20, 70, heads=heads, key_heads=key_heads, head_size=head_size, start=[550], dtype=dtype)
    check(case, dtype, num_selected=num_selected)


@pytest.mark.parametrize("num_selected", [1, 3, 17])
@pytest.mark.parametrize("serves", [1, 5, 16])
def test_the_lower_index_goes_first_where_scores_tie(serves: int, num_selected: int) -> None:
    """Small integers: scores tie often and are exact in every order of summation."""
    case = problem(33, 70, heads=4, key_heads=2, start=[0, 300])
    case = case._replace(q=(2 * case.q).round() * 2, key_means=case.key_means.sign())
    expected = select_blocks(
        *case[:2], start=case.start, window=WINDOW, block_size=BLOCK, num_selected=num_selected, serves=serves,
        backend="reference",
    )  # fmt: skip
    found = select_blocks(
        *case[:2], start=case.start, window=WINDOW, block_size=BLOCK, num_selected=num_selected, serves=serves,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@triton.jit
def _keys_kernel(scores_ptr, keys_ptr, back_ptr, index_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    keys = make_keys(tl.load(scores_ptr + place), place)
    tl.store(keys_ptr + place, keys)
    tl.store(back_ptr + place, score_of(keys))
    tl.store(index_ptr + place, index_of(keys))


def test_keys_order_like_scores_and_then_like_indices() -> None:
    some = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        3e38,
        -3e38,
        torch.inf,
        -torch.inf,
        1e-30,
        -1e-30,
        1.5,
        -1.5,
        -0.0,
        1.0,
        0.0,
        -1.0,
    ]
    scores = torch.tensor(some, device=DEVICE)
    keys, index = (torch.empty(16, dtype=torch.int64, device=DEVICE) for _ in range(2))
    back = torch.empty(16, device=DEVICE)
    _keys_kernel[(1,)](scores, keys, back, index, N=16)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    expected = scores.sort(descending=True, stable=True).indices
    assert torch.equal(keys.sort(descending=True).indices, expected)
    assert torch.equal(back, scores) and torch.equal(index.cpu(), torch.arange(16))


@pytest.mark.parametrize("window", [1, 8, 100, 1000])
def test_a_window_of_any_size(window: int) -> None:
    case = problem(65, 30, start=[0, 150])
    if window < 1000:
        check(case, window=window)
    else:
        assert (select(case, "triton", window=window)["blocks"] == -1).all()


def test_blocks_that_are_not_completed_may_be_garbage() -> None:
    case = problem(20, 30, start=[0, 100])
    assert case.start is not None
    dirty = case.key_means.clone()
    for row, start in enumerate((0, 100)):
        dirty[row, (start + 20) // BLOCK :] = torch.nan
    found = select(case._replace(key_means=dirty), "triton")
    for name, want in select(case, "triton").items():
        assert torch.equal(found[name], want)


def test_none_to_select_and_none_to_select_from() -> None:
    case = problem(20, 3)
    assert select(case, "triton", num_selected=0)["blocks"].shape == (1, 20, 1, 0)
    nothing = select(case._replace(key_means=case.key_means[:, :0]), "triton")
    assert (nothing["blocks"] == -1).all() and nothing["missing"].all()


def test_other_strides_give_the_same_results() -> None:
    case = problem(20, 30, start=[0, 100])
    other = Problem(strided(case.q), strided(case.key_means), case.start)
    transposed = case._replace(q=case.q.transpose(1, 2).contiguous().transpose(1, 2))
    for name, want in select(case, "triton").items():
        assert torch.equal(select(other, "triton")[name], want)
        assert torch.equal(select(transposed, "triton")[name], want)


def test_block_means_are_those_of_the_fast_path() -> None:
    k = torch.randn(2, 29, 2, 5, device=DEVICE)
    backends: list[Any] = ["triton", "torch"]
    found, expected = (block_means(k, block_size=BLOCK, backend=backend) for backend in backends)
    assert torch.equal(found, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 9 GiB of GPU memory")
def test_means_beyond_32_bit_offsets() -> None:
    """The last block lies 2**32 elements behind the first."""
    num_blocks = 1 + (1 << 19)
    means = torch.zeros(1, num_blocks, 128, 64, dtype=torch.float16, device=DEVICE)
    means[:, -2] = 1.0
    q = torch.ones(1, 1, 128, 64, dtype=torch.float16, device=DEVICE)
    start = torch.tensor([num_blocks * BLOCK], device=DEVICE)
    blocks, scores = select_blocks(
        q, means, start=start, window=1, block_size=BLOCK, num_selected=1, backend="triton"
    )
    assert (blocks == num_blocks - 2).all() and (scores == 64.0).all()


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        select(problem(9, 8, dtype=torch.float64), "triton")
