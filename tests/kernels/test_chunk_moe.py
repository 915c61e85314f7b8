"""The mixture's kernels against its sum over tokens and experts."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.chunk_moe import chunk_moe
from hydra_lab.ops.chunk_moe import kernels as kernels_module
from tests.kernels.checking import (
    DEVICE,
    DTYPES,
    LENGTHS,
    Results,
    assert_agree,
    assert_same_bits,
    outputs_and_gradients,
    placed,
    strided,
)

NUM_EXPERTS = 6
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(
    length: int = 70,
    *,
    chunk_size: int = 16,
    rows: int = 2,
    top_k: int = 2,
    hidden: int = 20,
    expert: int = 12,
    ragged: bool = False,
) -> dict[str, Tensor]:
    """Inputs in which nobody chooses expert 2; `ragged` rows start inside a chunk and end early, the second has no
    token at all, and what lies past their tokens is NaN."""
    generator = torch.Generator().manual_seed(length)
    offset = torch.zeros(rows, dtype=torch.int64)
    end = torch.full((rows,), length)
    if ragged:
        offset[:3] = torch.tensor([min(5, chunk_size - 1), 0, chunk_size - 1])[:rows]
        end[:3] = torch.tensor([max(1, length - 9), 0, length])[:rows]
    num_chunks = -(-(length + chunk_size - 1) // chunk_size)
    used = torch.tensor([0, 1, 3, 4, 5])
    chosen = torch.rand(rows, num_chunks, len(used), generator=generator).topk(top_k).indices

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weights = normal(rows, length, hidden), torch.rand(rows, length, top_k, generator=generator)
    for row, stop in enumerate(end.tolist()):
        x[row, stop:] = torch.nan
        weights[row, stop:] = torch.nan
    return {
        "x": x,
        "experts": used[chosen],
        "weights": weights.double(),
        "w_gate_up": normal(NUM_EXPERTS, 2 * expert, hidden, scale=hidden**-0.5),
        "w_down": normal(NUM_EXPERTS, hidden, expert, scale=expert**-0.5),
        "offset": offset,
        "length": end,
    }


def run(inputs: Mapping[str, Tensor], backend: Any, chunk_size: int) -> Results:
    return {"y": chunk_moe(**inputs, chunk_size=chunk_size, backend=backend)}


def check(inputs: Mapping[str, Tensor], dtype: torch.dtype, chunk_size: int = 16) -> None:
    """Output and gradients agree with the reference."""
    expected = outputs_and_gradients(lambda leaves: run(leaves, "reference", chunk_size), inputs)
    actual = outputs_and_gradients(lambda leaves: run(leaves, "triton", chunk_size), placed(inputs, dtype))
    assert_agree(actual, expected, dtype)


@DTYPE
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, dtype: torch.dtype) -> None:
    check(problem(length, chunk_size=64, rows=1), dtype, chunk_size=64)


@DTYPE
@pytest.mark.parametrize("chunk_size", [1, 16, 32, 64, 100])
def test_every_chunk_size_of_rows_that_start_and_end_inside_a_chunk(
    chunk_size: int, dtype: torch.dtype
) -> None:
    check(problem(chunk_size=chunk_size, rows=3, ragged=True), dtype, chunk_size)


@DTYPE
@pytest.mark.parametrize("top_k", [1, 3])
def test_one_and_three_experts(top_k: int, dtype: torch.dtype) -> None:
    check(problem(top_k=top_k, ragged=True), dtype)


@DTYPE
@pytest.mark.parametrize(("hidden", "expert"), [(5, 3), (72, 40), (40, 72)])
def test_sizes_that_are_no_powers_of_two(hidden: int, expert: int, dtype: torch.dtype) -> None:
    check(problem(40, hidden=hidden, expert=expert), dtype)


@DTYPE
def test_an_expert_listed_twice_counts_twice(dtype: torch.dtype) -> None:
    inputs = problem(40)
    inputs["experts"][0] = 1
    check(inputs, dtype)


@DTYPE
def test_one_expert_takes_everything(dtype: torch.dtype) -> None:
    inputs = problem(40)
    inputs["experts"][:] = NUM_EXPERTS - 1
    check(inputs, dtype)


@DTYPE
def test_rows_without_any_token(dtype: torch.dtype) -> None:
    inputs = problem(20)
    inputs["length"][:] = 0
    for name, tensor in outputs_and_gradients(
        lambda leaves: run(leaves, "triton", 16), placed(inputs, dtype)
    ).items():
        assert (tensor == 0).all(), name


@DTYPE
def test_rows_that_fill_little_of_their_chunk(dtype: torch.dtype) -> None:
    """Whole tiles of the chunk have no token; what they would have stored is not used."""
    inputs = problem(64, chunk_size=64)
    inputs["length"] = torch.tensor([5, 33])
    check(inputs, dtype, chunk_size=64)


@DTYPE
def test_fewer_experts_listed_than_positions(dtype: torch.dtype) -> None:
    """`experts` need only reach the last token's chunk."""
    inputs = problem(70)
    inputs["length"][:] = 30
    inputs["experts"] = inputs["experts"][:, :2]
    check(inputs, dtype)


@DTYPE
def test_the_next_token_of_rows_in_the_middle_of_their_chunks(dtype: torch.dtype) -> None:
    inputs = problem(1, rows=5)
    inputs["offset"] = torch.tensor([0, 3, 15, 7, 8])
    inputs["length"] = torch.tensor([1, 1, 1, 0, 1])
    check(inputs, dtype)


@DTYPE
def test_other_strides(dtype: torch.dtype) -> None:
    inputs = problem(40, ragged=True)
    expected = outputs_and_gradients(lambda leaves: run(leaves, "triton", 16), placed(inputs, dtype))
    views = {
        name: strided(tensor) if tensor.is_floating_point() else tensor.repeat_interleave(2, 0)[::2]
        for name, tensor in placed(inputs, dtype).items()
    }
    assert not any(tensor.is_contiguous() for tensor in views.values())
    for name, tensor in outputs_and_gradients(lambda leaves: run(leaves, "triton", 16), views).items():
        assert torch.equal(tensor, expected[name]), name


@DTYPE
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    assert_same_bits(lambda leaves: run(leaves, "triton", 16), placed(problem(ragged=True), dtype))


def test_more_pairs_than_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(150, chunk_size=8, rows=3, ragged=True)
    whole = outputs_and_gradients(lambda leaves: run(leaves, "triton", 8), placed(inputs, torch.float32))
    monkeypatch.setattr(kernels_module, "SORT_BLOCK", 16)
    parts = outputs_and_gradients(lambda leaves: run(leaves, "triton", 8), placed(inputs, torch.float32))
    for name, tensor in parts.items():
        assert torch.equal(tensor, whole[name]), name


def test_autocast_computes_in_its_dtype_and_keeps_those_of_the_inputs() -> None:
    """float16, which the interpreter can do; its 11 bits leave 1e-3 after three products."""
    inputs = problem(40, ragged=True)
    expected = outputs_and_gradients(lambda leaves: run(leaves, "reference", 16), inputs)
    single = placed(inputs, torch.float32)

    def half(leaves: Mapping[str, Tensor]) -> Results:
        with torch.autocast(DEVICE, dtype=torch.float16):
            return run(leaves, "triton", 16)

    actual = outputs_and_gradients(half, single)
    plain = outputs_and_gradients(lambda leaves: run(leaves, "triton", 16), single)
    for name, tensor in actual.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, plain[name]), f"{name} was not computed in float16"
        scale = expected[name].abs().max()
        assert (tensor.cpu().double() - expected[name]).abs().max() <= 5e-3 * scale, name


def test_half_precision_input_with_fp32_experts_under_autocast() -> None:
    inputs = placed(problem(40), torch.float32)
    inputs["x"] = inputs["x"].half()

    def half(leaves: Mapping[str, Tensor]) -> Results:
        with torch.autocast(DEVICE, dtype=torch.float16):
            return run(leaves, "triton", 16)

    results = outputs_and_gradients(half, inputs)
    assert results["y"].dtype == results["gradient of x"].dtype == torch.float16
    assert results["gradient of w_down"].dtype == results["gradient of weights"].dtype == torch.float32


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = placed(problem(40, ragged=True), torch.float32)
    saved: list[bool] = []
    original = kernels_module._ChunkMoE.forward

    def forward(ctx: Any, *arguments: Any) -> Tensor:
        saved.append(arguments[-1])
        return original(ctx, *arguments)

    monkeypatch.setattr(kernels_module._ChunkMoE, "forward", staticmethod(forward))
    y = run(inputs, "triton", 16)["y"]
    leaf = inputs | {"x": inputs["x"].clone().requires_grad_()}
    assert torch.equal(run(leaf, "triton", 16)["y"], y)
    with torch.no_grad():
        run(leaf, "triton", 16)
    assert saved == [False, True, False]


def test_what_the_kernels_cannot_do_is_named() -> None:
    inputs = placed(problem(5), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        run(inputs | {"x": inputs["x"].double()}, "triton", 16)
    with pytest.raises(ValueError, match="float64, which is the dtype of w_down"):
        run(inputs | {"w_down": inputs["w_down"].double()}, "triton", 16)
    with pytest.raises(ValueError, match="at most 128 tokens, got 129"):
        run(inputs, "triton", 129)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 11 GiB of GPU memory")
def test_offsets_beyond_2_to_the_31() -> None:
    """The rows of g and u have 2^31 elements and more; the last chunk is as if it were alone."""
    length, hidden, expert = 2**17 + 64, 16, 4096
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    x, weights = normal(1, length, hidden), normal(1, length, 2)
    experts = torch.zeros(1, length // 64, 2, dtype=torch.int64, device=DEVICE)
    matrices = [normal(1, 2 * expert, hidden), normal(1, hidden, expert)]
    results: list[tuple[Tensor, ...]] = []
    for first in (0, length - 64):
        leaves = [x[:, first:].clone().requires_grad_(), weights[:, first:].clone().requires_grad_()]
        y = chunk_moe(
            leaves[0], experts[:, first // 64 :], leaves[1], *matrices, chunk_size=64, backend="triton"
        )
        gradients = torch.autograd.grad(y.float().sum(), leaves)
        results.append(tuple(tensor[:, -64:] for tensor in (y, *gradients)))
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole, alone)
