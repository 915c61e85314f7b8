"""Sparse attention against a dense softmax under the explicit mask, and the selection against its definition."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_lab.ops.sparse_attention import block_means, select_blocks, sparse_attention

TOLERANCE = 1e-5
"""float32 against the oracle in float64, relative to the largest value of the tensor compared."""
WINDOW, BLOCK = 12, 8


class Problem(NamedTuple):
    """q [B, Lq, 4, d], k and v [B, Lk, 2, d], blocks [B, Lq, 2, K], start [B] or None; NaN past the valid keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    start: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def problem(length: int, *, offsets: bool, spare: int = 11, head_size: int = 5) -> Problem:
    """Random queries; selected, repeated, overlapping, current, future and missing blocks among each other."""
    torch.manual_seed(length)
    start = torch.tensor([0, 37, 90]) if offsets else None
    num_keys = length + spare + (90 if offsets else 0)
    q = torch.randn(3, length, 4, head_size, dtype=torch.float64)
    k = torch.randn(3, num_keys, 2, head_size, dtype=torch.float64)
    v = torch.randn_like(k)
    chosen, _ = select_blocks(
        q, block_means(k, block_size=BLOCK), start=start, window=WINDOW, block_size=BLOCK, num_selected=3
    )
    anything = torch.randint(-1, num_keys // BLOCK + 3, (3, length, 2, 2))
    blocks = torch.cat([chosen, anything, chosen[..., :1], torch.full_like(chosen[..., :1], -1)], dim=-1)
    for row in range(3):
        end = length + (0 if start is None else int(start[row]))
        k[row, end:] = v[row, end:] = torch.nan
    return Problem(q, k, v, blocks, start)


def explicit_mask(blocks: Tensor, start: Tensor | None, num_keys: int) -> Tensor:
    """[B, Lq, Hkv, Lk], element by element from the definition."""
    mask = torch.zeros(*blocks.shape[:3], num_keys, dtype=torch.bool)
    for b, i, h, j in torch.cartesian_prod(*[torch.arange(size) for size in mask.shape]).tolist():
        t = i + (0 if start is None else int(start[b]))
        listed = j // BLOCK in blocks[b, i, h].tolist()
        mask[b, i, h, j] = j <= t and (t - j < WINDOW or j < BLOCK or listed)
    return mask


def outputs_and_gradients(case: Problem, **options: Any) -> dict[str, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (case.q, case.k, case.v)]
    q, k, v = leaves
    y = sparse_attention(q, k, v, case.blocks, start=case.start, window=WINDOW, block_size=BLOCK, **options).y
    gradients = torch.autograd.grad(y.double().sin().sum(), leaves)
    return {"y": y.detach(), "q": gradients[0], "k": gradients[1], "v": gradients[2]}


def assert_close(actual: Tensor, expected: Tensor, name: str = "", tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=0.1)  # inputs are of order 1; a gradient may be exactly 0
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_agree_with_finite_differences(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 2, dtype=torch.float64) for n, h in ((5, 2), (14, 1), (14, 1)))
    blocks = torch.randint(-1, 8, (2, 5, 1, 2))
    start = torch.tensor([2, 9])

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"backend": backend}
        return sparse_attention(q, k, v, blocks, start=start, window=3, block_size=2, **options).y

    assert torch.autograd.gradcheck(output, [tensor.requires_grad_() for tensor in (q, k, v)])


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("length", [1, 31, 64, 65])
def test_fast_path_equals_the_reference(length: int, offsets: bool) -> None:
    case = problem(length, offsets=offsets)
    expected = outputs_and_gradients(case, backend="reference")
    for name, actual in outputs_and_gradients(case.to(torch.float32)).items():
        assert_close(actual, expected[name], name)


def test_fast_path_equals_the_reference_where_tiles_and_slices_are_many() -> None:
    case = problem(300, offsets=True, head_size=16)
    expected = outputs_and_gradients(case, backend="reference")
    for name, actual in outputs_and_gradients(case.to(torch.float32)).items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_dense_attention_under_the_explicit_mask(backend: str) -> None:
    case = problem(31, offsets=True, spare=0)
    options: dict[str, Any] = {"backend": backend}
    actual = sparse_attention(*case[:4], start=case.start, window=WINDOW, block_size=BLOCK, **options).y
    mask = explicit_mask(case.blocks, case.start, case.k.shape[1]).transpose(1, 2).repeat_interleave(2, dim=1)
    q, k, v = (tensor.nan_to_num().transpose(1, 2) for tensor in case[:3])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_plain_causal_attention_where_the_window_covers_all() -> None:
    case = problem(64, offsets=False, spare=0).to(torch.float32)
    actual = sparse_attention(*case[:4], window=64, block_size=BLOCK, scale=0.3).y
    q, k, v = (tensor.transpose(1, 2) for tensor in case[:3])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_close(actual, expected.transpose(1, 2))


def test_no_selected_blocks_leaves_window_and_sink() -> None:
    case = problem(65, offsets=False)
    none = case._replace(blocks=case.blocks[..., :0])
    missing = case._replace(blocks=torch.full_like(case.blocks, -1))
    expected = outputs_and_gradients(missing, backend="reference")
    for name, actual in outputs_and_gradients(none.to(torch.float32)).items():
        assert_close(actual, expected[name], name)


def test_repeated_blocks_and_the_sink_count_once() -> None:
    case = problem(65, offsets=False)
    once = case.blocks[..., :3]
    again = torch.cat([once.flip(-1), once, torch.zeros_like(once)], dim=-1)
    expected = outputs_and_gradients(case._replace(blocks=once))
    for name, actual in outputs_and_gradients(case._replace(blocks=again)).items():
        assert_close(actual, expected[name], name, tolerance=1e-12)


def test_one_step_equals_the_row_of_the_full_pass() -> None:
    """Decoding: one query per row, at its own position, over a longer cache whose rest is garbage."""
    case = problem(150, offsets=False, spare=20).to(torch.float32)
    full = sparse_attention(*case[:4], window=WINDOW, block_size=BLOCK).y
    for positions in ([0, 3, 149], [WINDOW, 64, 100]):
        start, row = torch.tensor(positions), torch.arange(3)
        q, blocks = case.q[row, start][:, None], case.blocks[row, start][:, None]
        k, v = case.k.clone(), case.v.clone()
        for b, t in enumerate(positions):
            k[b, t + 1 :] = v[b, t + 1 :] = torch.nan
        step = sparse_attention(q, k, v, blocks, start=start, window=WINDOW, block_size=BLOCK).y
        assert_close(step[:, 0], full[row, start])


def test_rows_do_not_depend_on_each_other() -> None:
    case = problem(65, offsets=True)
    assert case.start is not None
    together = outputs_and_gradients(case)
    for b in range(3):
        q, k, v, blocks, start = (tensor[b : b + 1] for tensor in (*case[:4], case.start))
        alone = Problem(q, k, v, blocks, start)
        for name, actual in outputs_and_gradients(alone).items():
            assert_close(actual, together[name][b : b + 1], name, tolerance=1e-12)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = problem(65, offsets=False)
    case = case._replace(q=case.q * 100)
    expected = outputs_and_gradients(case, backend="reference")
    # Scores of several hundred carry their float32 rounding into the exponent.
    for name, actual in outputs_and_gradients(case.to(torch.float32)).items():
        assert_close(actual, expected[name], name, tolerance=1e-3)


def test_half_precision_is_computed_in_single() -> None:
    case = problem(64, offsets=False).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(case)
    assert {tensor.dtype for tensor in actual.values()} == {torch.bfloat16}
    expected = outputs_and_gradients(case.to(torch.float64), backend="reference")
    for (
        name,
        value,
    ) in actual.items():  # what remains is the rounding of inputs' gradients and output to bfloat16
        assert_close(value, expected[name], name, tolerance=1e-2)


def test_memory_is_linear_in_the_length() -> None:
    """Bytes saved for the backward pass and the largest tensor made grow with L, not with L * L."""

    def largest_tensor(length: int) -> int:
        sizes: list[int] = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                sizes.extend(tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
                return result

        q, k, v = (torch.randn(1, length, heads, 4, requires_grad=True) for heads in (2, 1, 1))
        blocks = torch.randint(0, max(1, length // BLOCK), (1, length, 1, 2))
        with Sizes():
            sparse_attention(q, k, v, blocks, window=WINDOW, block_size=BLOCK).y.sum().backward()
        return max(sizes)

    assert largest_tensor(4096) <= 2.2 * largest_tensor(2048)


def slow_selection(case: Problem, means: Tensor, num_selected: int, serves: int) -> tuple[Tensor, Tensor]:
    """One query at a time, one candidate at a time."""
    rows, length = case.q.shape[:2]
    blocks = torch.full((rows, length, 2, num_selected), -1)
    scores = torch.full((rows, length, 2, num_selected), -torch.inf)
    for b in range(rows):
        for i in range(length):
            t = i * serves + (0 if case.start is None else int(case.start[b]))
            for h in range(2):
                candidates: list[tuple[float, int]] = []
                for j in range(1, means.shape[1]):
                    outside = j * BLOCK <= t + serves - 1 - WINDOW
                    if j < t // BLOCK and outside:
                        score = (case.q[b, i, 2 * h : 2 * h + 2] @ means[b, j, h]).mean()
                        candidates.append((-float(score), j))
                for rank, (negative_score, j) in enumerate(sorted(candidates)[:num_selected]):
                    blocks[b, i, h, rank], scores[b, i, h, rank] = j, -negative_score
    return blocks, scores


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("serves", [1, 16])
def test_selection_equals_the_slow_loop(length: int, offsets: bool, serves: int, backend: str) -> None:
    case = problem(length, offsets=offsets)
    # Small integers: scores tie often and are exact in every order of summation.
    q, k = (2.0 * torch.randint(-1, 2, tensor.shape) for tensor in (case.q, case.k))
    case = case._replace(q=q.double(), k=k.double())
    means = block_means(case.k, block_size=BLOCK)
    options: dict[str, Any] = {"backend": backend}
    blocks, scores = select_blocks(
        case.q.float(),
        means.float(),
        start=case.start,
        window=WINDOW,
        block_size=BLOCK,
        num_selected=3,
        serves=serves,
        **options,
    )
    expected_blocks, expected_scores = slow_selection(case, means, 3, serves)
    assert torch.equal(blocks, expected_blocks)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_selection_ignores_the_means_of_blocks_that_are_not_completed(backend: str) -> None:
    case = problem(65, offsets=True)  # NaN past each row's keys
    means = block_means(case.k, block_size=BLOCK)
    assert means.isnan().any()
    options: dict[str, Any] = {"backend": backend, "window": WINDOW, "block_size": BLOCK, "num_selected": 4}
    got = select_blocks(case.q, means, start=case.start, **options)
    want = select_blocks(case.q, means.nan_to_num(nan=1e6), start=case.start, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert not got[0].requires_grad and got[0].dtype == torch.int64 and got[1].dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_block_means_are_the_means_of_completed_blocks(backend: str) -> None:
    k = torch.randn(2, 29, 2, 3, dtype=torch.float64)
    options: dict[str, Any] = {"backend": backend, "block_size": BLOCK}
    means = block_means(k, **options)
    assert means.shape == (2, 3, 2, 3)
    for j in range(3):
        torch.testing.assert_close(means[:, j], sum(k[:, 8 * j + i] for i in range(8)) / 8)
    assert block_means(k[:, :7], **options).shape == (2, 0, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4, 3, 5)}, "q has 3 heads"),
        ({"k": torch.zeros(3, 4, 2, 6)}, "k must have shape"),
        ({"v": torch.zeros(3, 4, 2, 5)}, "v must have shape"),
        ({"blocks": torch.zeros(3, 9, 2, 1, dtype=torch.int64)}, "blocks must have shape"),
        ({"blocks": torch.zeros(3, 31, 2, 1)}, "blocks must be int64"),
        ({"start": torch.tensor([0, 0])}, "start must have shape"),
        ({"start": torch.tensor([0, 0, 50])}, "the queries reach position 80"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = (
        problem(31, offsets=False)._asdict() | {"window": WINDOW, "block_size": BLOCK} | change
    )
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)
