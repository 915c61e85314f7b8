"""Product keys against brute force over every pair of half-keys."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_lab.ops.product_key import memory_read, product_key_topk

TOLERANCE = (
    1e-5  # float32 against the oracle in float64, relative to the largest value of the tensor compared
)


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    scale = expected.abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def random_lookup(n1: int, n2: int, *, heads: int = 3, half: int = 4, seed: int = 0) -> list[Tensor]:
    """Queries [2, 7, H, 2 half] and the half-keys of either side."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 7, heads, 2 * half), (heads, n1, half), (heads, n2, half)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(deadline=None, max_examples=60)
@given(n1=st.integers(1, 9), n2=st.integers(1, 9), data=st.data(), seed=st.integers(0, 1000))
def test_search_agrees_with_brute_force(n1: int, n2: int, data: st.DataObject, seed: int) -> None:
    top_k = data.draw(st.integers(1, n1 * n2))
    lookup = random_lookup(n1, n2, seed=seed)
    expected_addresses, expected_scores = product_key_topk(*lookup, top_k=top_k, backend="reference")
    addresses, scores = product_key_topk(*lookup, top_k=top_k)
    assert addresses.dtype == torch.int64
    assert torch.equal(addresses, expected_addresses)
    assert_close(scores, expected_scores, "scores", 1e-12)
    single_scores = product_key_topk(*(tensor.float() for tensor in lookup), top_k=top_k)[1]
    assert_close(single_scores, expected_scores, "scores in float32")


@pytest.mark.parametrize("top_k", [1, 3, 8, 20, 24])
def test_ties_return_distinct_keys_with_the_best_scores(top_k: int) -> None:
    """Small integers as queries and keys, so that many keys tie, exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, 2, 6), (2, 6, 3), (2, 4, 3)]
    query, keys1, keys2 = (torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes)
    addresses, scores = product_key_topk(query, keys1, keys2, top_k=top_k)
    all_addresses, all_scores = product_key_topk(query, keys1, keys2, top_k=24, backend="reference")
    assert torch.equal(scores, all_scores[..., :top_k])
    score_of_address = torch.empty_like(all_scores).scatter_(-1, all_addresses, all_scores)
    assert torch.equal(score_of_address.gather(-1, addresses), scores)
    ordered = addresses.sort(dim=-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()


def test_gradients_agree_with_finite_differences() -> None:
    leaves = [tensor.requires_grad_() for tensor in random_lookup(3, 4, heads=2, half=2)]
    assert torch.autograd.gradcheck(
        lambda *args: product_key_topk(*args, top_k=3, backend="reference")[1], leaves
    )
    addresses = torch.randint(0, 6, (2, 3, 2, 2))
    weights = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: memory_read(addresses, *args, backend="reference"), [weights, values]
    )


@pytest.mark.parametrize("top_k", [1, 5, 35])
def test_lookup_and_read_agree_with_brute_force(top_k: int) -> None:
    """Outputs and every gradient of search, softmax and read together, as the model uses them."""
    lookup = random_lookup(7, 5)
    table = torch.randn(35, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    runs: list[tuple[Any, torch.dtype]] = [("reference", torch.float64), ("torch", torch.float32)]
    for backend, dtype in runs:
        options: dict[str, Any] = {"backend": backend}
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (*lookup, table)]
        addresses, scores = product_key_topk(*leaves[:3], top_k=top_k, **options)
        read = memory_read(addresses, scores.softmax(dim=-1), leaves[3], **options)
        read.sin().sum().backward()
        results.append(
            [scores.detach(), read.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        )
    names = ["scores", "read", "query", "keys1", "keys2", "values"]
    for name, actual, expected in zip(names, *reversed(results), strict=True):
        assert_close(actual, expected, name)


def test_scores_stay_in_float32_under_autocast() -> None:
    query, keys1, keys2 = (tensor.float() for tensor in random_lookup(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        addresses, scores = product_key_topk(query, keys1, keys2, top_k=8)
    assert scores.dtype == torch.float32
    assert torch.equal(addresses, product_key_topk(query, keys1, keys2, top_k=8)[0])


@pytest.mark.parametrize("top_k", [0, -1, 36])
def test_top_k_out_of_range_is_an_error(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.35, got {top_k}"):
        product_key_topk(*random_lookup(7, 5), top_k=top_k)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 7, 3, 9), "query_BLH2d"),
        (0, (2, 7, 2, 8), "query_BLH2d"),
        (2, (3, 5, 3), "keys2_Hnd"),
        (1, (7, 4), "keys1_Hnd"),
    ],
)
def test_wrong_lookup_arguments_are_named(position: int, shape: tuple[int, ...], message: str) -> None:
    arguments = random_lookup(7, 5)
    arguments[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        product_key_topk(*arguments, top_k=2)


def test_wrong_read_arguments_are_named() -> None:
    unknown: Any = "fused"
    addresses = torch.zeros(2, 3, 2, 2, dtype=torch.int64)
    weights, values = torch.zeros(2, 3, 2, 2), torch.zeros(6, 3)
    with pytest.raises(ValueError, match="weights"):
        memory_read(addresses, weights[..., :1], values)
    with pytest.raises(ValueError, match="int64"):
        memory_read(addresses.int(), weights, values)
    with pytest.raises(ValueError, match="values"):
        memory_read(addresses, weights, values[0])
    with pytest.raises(ValueError, match="fused"):
        memory_read(addresses, weights, values, backend=unknown)
    with pytest.raises(ValueError, match="fused"):
        product_key_topk(*random_lookup(7, 5), top_k=2, backend=unknown)
