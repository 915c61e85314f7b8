"""The product-key kernels against brute force over all pairs, and against sums of gathered rows."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.product_key import memory_read, product_key_topk
from tests.kernels.checking import (
    DEVICE,
    DTYPES,
    LENGTHS,
    Results,
    Run,
    assert_agree,
    assert_same_bits,
    outputs_and_gradients,
    placed,
    strided,
)


def lookup(n1: int, n2: int, *, heads: int = 1, half: int = 5, length: int = 9, seed: int = 0) -> Results:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (2, length, heads, 2 * half),
        "keys1": (heads, n1, half),
        "keys2": (heads, n2, half),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def bags(
    entries: int = 5, *, heads: int = 2, length: int = 9, size: int = 5, table: int = 40, seed: int = 0
) -> Results:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, length, heads, entries)
    return {
        "addresses": torch.randint(0, table, shape, generator=generator),
        "weights": torch.randn(shape, generator=generator, dtype=torch.float64),
        "values": torch.randn(table, size, generator=generator, dtype=torch.float64),
    }


def search(top_k: int, backend: Any) -> Run:
    def run(inputs: Mapping[str, Tensor]) -> Results:
        query, keys1, keys2 = (inputs[name] for name in ("query", "keys1", "keys2"))
        addresses, scores = product_key_topk(query, keys1, keys2, top_k=top_k, backend=backend)
        return {"addresses": addresses, "scores": scores}

    return run


def read(backend: Any) -> Run:
    def run(inputs: Mapping[str, Tensor]) -> Results:
        return {
            "read": memory_read(inputs["addresses"], inputs["weights"], inputs["values"], backend=backend)
        }

    return run


def both(run: Any, inputs: Results, dtype: torch.dtype) -> tuple[Results, Results]:
    """The kernels' results in `dtype`, and the oracle's, in float64 on the same rounded inputs."""
    rounded = placed(inputs, dtype)
    actual = outputs_and_gradients(run("triton"), rounded)
    exact = {name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in rounded.items()}
    return actual, outputs_and_gradients(run("reference"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n1", "n2", "heads", "top_k"),
    [
        (7, 5, 3, 1),
        (7, 5, 1, 35),
        (40, 33, 1, 8),
        (3, 70, 3, 16),
        (64, 32, 1, 32),
        (1, 1, 1, 1),
        (5, 2, 1, 3),
    ],
)
def test_search_agrees_with_brute_force(n1: int, n2: int, heads: int, top_k: int, dtype: torch.dtype) -> None:
    inputs = lookup(n1, n2, heads=heads)
    assert_agree(*both(lambda backend: search(top_k, backend), inputs, dtype), dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_search_at_every_length(length: int) -> None:
    inputs = lookup(6, 9, half=2, length=length)
    assert_agree(*both(lambda backend: search(2, backend), inputs, torch.float32), torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
def test_search_of_four_million_keys_agrees_with_torch() -> None:
    """Multiples of 1/64, so that sums are exact and every score comes out the same, ties included."""
    inputs = {
        name: (x * 64).round() / 64 for name, x in lookup(2048, 2048, heads=2, half=128, length=64).items()
    }
    found = search(64, "triton")(placed(inputs, torch.float32))
    assert torch.equal(found["scores"].cpu().double(), search(64, "torch")(inputs)["scores"])
    address = found["addresses"].cpu()
    chosen1, chosen2 = (
        torch.stack([inputs[name][head, index[:, :, head]] for head in range(2)], dim=2)
        for name, index in (("keys1", address // 2048), ("keys2", address % 2048))
    )
    scores = (torch.cat([chosen1, chosen2], dim=-1) * inputs["query"][..., None, :]).sum(-1)
    assert torch.equal(found["scores"].cpu().double(), scores)
    ordered = address.sort(dim=-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()


@pytest.mark.parametrize("top_k", [1, 3, 20, 24])
def test_ties_return_distinct_keys_with_the_best_scores(top_k: int) -> None:
    """Small integers, and keys that are there twice, so that many keys tie, exactly."""
    inputs = {name: x.sign() for name, x in lookup(6, 4, heads=2, half=3).items()}
    for name in ("keys1", "keys2"):
        inputs[name][:, 1] = inputs[name][:, 0]
    found = search(top_k, "triton")(placed(inputs, torch.float32))
    everything = search(24, "reference")(inputs)
    addresses, scores = (found[name].cpu() for name in ("addresses", "scores"))
    assert torch.equal(scores.double(), everything["scores"][..., :top_k])
    score_of = torch.empty_like(everything["scores"]).scatter_(
        -1, everything["addresses"], everything["scores"]
    )
    assert torch.equal(score_of.gather(-1, addresses), scores.double())
    ordered = addresses.sort(dim=-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()


def test_gradients_of_keys_that_many_tokens_chose() -> None:
    """Two half-keys and 600 tokens: every row of the gradient is put together from several pieces."""
    inputs = lookup(2, 1, half=2, length=300)
    assert_agree(*both(lambda backend: search(1, backend), inputs, torch.float32), torch.float32)


def test_only_the_gradients_asked_for() -> None:
    inputs = placed(lookup(6, 9), torch.float32)
    expected = outputs_and_gradients(search(2, "triton"), inputs)
    for name in inputs:
        leaves = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        scores = search(2, "triton")(leaves)["scores"]
        factor = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (scores.cpu().double() * factor).sum().backward()
        for other, leaf in leaves.items():
            assert (leaf.grad is None) == (other != name)
        gradient = leaves[name].grad
        assert gradient is not None and torch.equal(gradient, expected[f"gradient of {name}"])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_infinite_scores_give_addresses_that_exist() -> None:
    inputs = placed(lookup(6, 4), torch.float32)
    inputs["query"][0, 0] = torch.inf
    inputs["query"][0, 1] = torch.nan
    addresses = search(8, "triton")(inputs)["addresses"]
    assert addresses.min() >= 0 and addresses.max() < 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "entries", "size"), [(1, 1, 5), (3, 7, 5), (1, 32, 33), (2, 40, 16), (1, 3, 600), (1, 2, 1)]
)
def test_read_agrees_with_gathered_rows(heads: int, entries: int, size: int, dtype: torch.dtype) -> None:
    inputs = bags(entries, heads=heads, size=size, length=4)
    assert_agree(*both(read, inputs, dtype), dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_read_at_every_length(length: int) -> None:
    inputs = bags(2, heads=1, length=length, table=9)
    assert_agree(*both(read, inputs, torch.float32), torch.float32)


@pytest.mark.parametrize("count", [255, 256, 257, 1100])
def test_a_row_that_everyone_reads(count: int) -> None:
    """Its gradient is put together from many pieces, those of its neighbours from one each."""
    inputs = bags(1, heads=1, length=count, table=3)
    inputs["addresses"][0] = 1
    assert_agree(*both(read, inputs, torch.float32), torch.float32)


def test_an_entry_that_is_listed_twice_counts_twice() -> None:
    inputs = bags(6)
    inputs["addresses"][..., 3:] = inputs["addresses"][..., :3]
    assert_agree(*both(read, inputs, torch.float32), torch.float32)


def test_only_used_rows_of_the_table_are_touched() -> None:
    """What nobody reads may be NaN, and its gradient is zero."""
    inputs = bags(2, table=1000, length=3)
    unused = torch.ones(1000, dtype=torch.bool)
    unused[inputs["addresses"].flatten()] = False
    inputs["values"][unused] = torch.nan
    found = outputs_and_gradients(read("triton"), placed(inputs, torch.float32))
    assert not found["read"].isnan().any()
    gradient = found["gradient of values"].cpu()
    assert (gradient[unused] == 0).all() and gradient[~unused].any(dim=1).all()


def test_empty_bags_read_nothing() -> None:
    inputs = bags(0)
    assert_agree(*both(read, inputs, torch.float32), torch.float32)


@pytest.mark.parametrize("run", [lambda backend: search(3, backend), read], ids=["search", "read"])
def test_other_strides_give_the_same_results(run: Any) -> None:
    inputs = lookup(6, 9) | bags()
    rounded = placed(inputs, torch.float32)
    expected = outputs_and_gradients(run("triton"), rounded)
    actual = outputs_and_gradients(run("triton"), {name: strided(x) for name, x in rounded.items()})
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


@pytest.mark.parametrize("run", [lambda backend: search(3, backend), read], ids=["search", "read"])
def test_same_bits_twice(run: Any) -> None:
    assert_same_bits(run("triton"), placed(lookup(6, 9, length=20) | bags(length=80, table=3), torch.float32))


def test_mixed_precision_reads_in_the_precision_of_the_values() -> None:
    inputs = placed(bags(), torch.float32)
    for name in ("weights", "values"):
        halved = inputs | {name: inputs[name].half()}
        exact = {key: x.cpu().double() if x.is_floating_point() else x.cpu() for key, x in halved.items()}
        actual = outputs_and_gradients(read("triton"), halved)
        for key, x in actual.items():
            assert x.dtype == halved["values" if key == "read" else key.removeprefix("gradient of ")].dtype
        expected = outputs_and_gradients(read("reference"), exact)
        assert_agree(actual, expected, torch.bfloat16)  # one rounding to float16


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 9 GiB of GPU memory")
def test_a_table_beyond_32_bit_offsets() -> None:
    """The last row of 2**22 x 1024 values, and of its gradient, lies 2**32 elements behind the first."""
    rows = 1 << 22
    values = torch.zeros(rows, 1024, dtype=torch.float16, device=DEVICE)
    values[-1] = 2.0
    addresses = torch.tensor([rows - 1, 0], device=DEVICE).view(1, 1, 1, 2)
    weights = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float16, device=DEVICE, requires_grad=True)
    out = memory_read(addresses, weights, values, backend="triton")
    assert (out == 1.0).all()
    out.sum().backward()
    assert weights.grad is not None and weights.grad.flatten().tolist() == [2048.0, 0.0]


def test_float64_is_refused() -> None:
    backend: Any = "triton"
    inputs = lookup(6, 9)
    with pytest.raises(ValueError, match="no float64"):
        product_key_topk(inputs["query"], inputs["keys1"], inputs["keys2"], top_k=2, backend=backend)
    with pytest.raises(ValueError, match="no float64"):
        memory_read(**bags(), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_torch_path_has_gradients_where_kernels_run(dtype: torch.dtype) -> None:
    """Of bfloat16 weights too, for which torch's own bag has none on a GPU."""
    inputs = bags()
    rounded = {
        name: tensor.to(dtype).double() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    expected = outputs_and_gradients(read("reference"), rounded)
    assert_agree(outputs_and_gradients(read("torch"), placed(inputs, dtype)), expected, dtype)
