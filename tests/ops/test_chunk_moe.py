"""The chunk mixture of experts against its sum over tokens and experts, and against Mixtral's layer."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hydra_lab.ops.chunk_moe import chunk_moe

TOLERANCE = 1e-5
"""float32 against the oracle in float64, relative to the largest value of the tensor compared."""
CHUNK, EXPERTS = 16, 6


class Problem(NamedTuple):
    """Arguments of `chunk_moe`; expert 2 is never chosen."""

    x: Tensor
    experts: Tensor
    weights: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    offset: Tensor | None
    length: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(
            self.x.to(dtype),
            self.experts,
            self.weights.to(dtype),
            self.w_gate_up.to(dtype),
            self.w_down.to(dtype),
            self.offset,
            self.length,
        )


def problem(length: int, *, ragged: bool, top_k: int = 2, hidden: int = 7, expert: int = 5) -> Problem:
    torch.manual_seed(length)
    num_chunks = -(-(length + CHUNK - 1) // CHUNK)
    used = torch.tensor([0, 1, 3, 4, 5])
    experts = used[torch.rand(3, num_chunks, len(used)).topk(top_k).indices]
    return Problem(
        x=torch.randn(3, length, hidden, dtype=torch.float64),
        experts=experts,
        weights=torch.rand(3, length, top_k, dtype=torch.float64),
        w_gate_up=0.4 * torch.randn(EXPERTS, 2 * expert, hidden, dtype=torch.float64),
        w_down=0.4 * torch.randn(EXPERTS, hidden, expert, dtype=torch.float64),
        offset=torch.tensor([0, 5, CHUNK - 1]) if ragged else None,
        length=torch.tensor([length, 0, max(1, length - 9)]) if ragged else None,
    )


def outputs_and_gradients(case: Problem, **options: Any) -> dict[str, Tensor]:
    leaves = {
        name: getattr(case, name).clone().requires_grad_() for name in ("x", "weights", "w_gate_up", "w_down")
    }
    y = chunk_moe(**(case._asdict() | leaves), chunk_size=CHUNK, **options)
    gradients = torch.autograd.grad(y.double().sin().sum(), list(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_close(actual: Tensor, expected: Tensor, name: str = "", tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=0.1)  # inputs are of order 1; a gradient may be exactly 0
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_agree_with_finite_differences(backend: str) -> None:
    case = problem(5, ragged=True, hidden=3, expert=2)

    def output(x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        options: dict[str, Any] = {"backend": backend, "offset": case.offset, "length": case.length}
        return chunk_moe(x, case.experts, weights, w_gate_up, w_down, chunk_size=CHUNK, **options)

    leaves = [case.x, case.weights, case.w_gate_up, case.w_down]
    assert torch.autograd.gradcheck(output, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 31, 64, 65])
def test_fast_path_equals_the_reference(length: int, ragged: bool) -> None:
    case = problem(length, ragged=ragged)
    if case.length is not None:  # what lies past a row's tokens is not read
        for row, end in enumerate(case.length.tolist()):
            case.x[row, end:] = torch.nan
    expected = outputs_and_gradients(case, backend="reference")
    for name, actual in outputs_and_gradients(case.to(torch.float32)).items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_positions_past_the_length_give_zero(backend: str) -> None:
    case = problem(31, ragged=True)
    assert case.length is not None
    y = outputs_and_gradients(case, backend=backend)["y"]
    for row, end in enumerate(case.length.tolist()):
        assert (y[row, end:] == 0).all() and (y[row, :end] != 0).all()


def test_an_unused_expert_is_not_computed_and_gets_a_zero_gradient() -> None:
    case = problem(31, ragged=False)
    plain = outputs_and_gradients(case)
    assert (plain["w_gate_up"][2] == 0).all() and (plain["w_down"][2] == 0).all()
    case.w_gate_up[2] = case.w_down[2] = torch.nan
    assert torch.equal(outputs_and_gradients(case)["y"], plain["y"])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_token_at_all(backend: str) -> None:
    case = problem(5, ragged=False)._replace(length=torch.zeros(3, dtype=torch.int64))
    options: dict[str, Any] = {"backend": backend, "chunk_size": CHUNK}
    assert torch.equal(chunk_moe(*case[:5], length=case.length, **options), torch.zeros_like(case.x))


def test_an_expert_listed_twice_counts_twice() -> None:
    case = problem(31, ragged=False)._replace(experts=torch.ones(3, 3, 2, dtype=torch.int64))
    expected = outputs_and_gradients(case, backend="reference")
    for name, actual in outputs_and_gradients(case.to(torch.float32)).items():
        assert_close(actual, expected[name], name)


def test_renaming_the_experts_changes_nothing() -> None:
    case = problem(65, ragged=True)
    order = torch.randperm(EXPERTS)
    renamed = case._replace(
        experts=order.argsort()[case.experts], w_gate_up=case.w_gate_up[order], w_down=case.w_down[order]
    )
    expected, actual = outputs_and_gradients(case), outputs_and_gradients(renamed)
    for name in ("y", "x", "weights"):
        assert_close(actual[name], expected[name], name, tolerance=1e-12)
    for name in ("w_gate_up", "w_down"):
        assert_close(actual[name], expected[name][order], name, tolerance=1e-12)


def test_pieces_of_a_row_equal_the_row() -> None:
    """A piece that starts inside a chunk, told by `offset` and given the chunks from its own on."""
    case = problem(65, ragged=False)
    whole = outputs_and_gradients(case)["y"]
    for first, end in ((0, 21), (21, 64), (64, 65)):
        piece = case._replace(
            x=case.x[:, first:end],
            weights=case.weights[:, first:end],
            experts=case.experts[:, first // CHUNK :],
            offset=torch.full((3,), first % CHUNK),
        )
        assert_close(outputs_and_gradients(piece)["y"], whole[:, first:end], tolerance=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_chunks_of_one_token_equal_mixtral(backend: str) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)
    layer = MixtralSparseMoeBlock(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 33, 16, requires_grad=True)
    expected = layer(x)

    _, weights, experts = layer.gate(x.reshape(-1, 16))
    options: dict[str, Any] = {"backend": backend, "chunk_size": 1}
    gate_up, down = layer.experts.get_parameter("gate_up_proj"), layer.experts.get_parameter("down_proj")
    actual = chunk_moe(x, experts.view(2, 33, 2), weights.view(2, 33, 2), gate_up, down, **options)
    assert_close(actual, expected)
    inputs = [x, *layer.parameters()]
    for got, want in zip(
        torch.autograd.grad(actual.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        assert_close(got, want)


def test_autocast_keeps_the_dtype_of_the_input() -> None:
    case = problem(31, ragged=False)
    expected = outputs_and_gradients(case, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(case.to(torch.float32))
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert_close(value, expected[name], name, tolerance=3e-2)  # products in bfloat16, 8 bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 31)}, "x must have shape"),
        ({"experts": torch.full((3, 3, 2), 6)}, r"experts must lie in 0 \.\. 5, got 6 \.\. 6"),
        ({"experts": torch.zeros(3, 1, 2, dtype=torch.int64)}, "experts holds 1 chunks"),
        ({"experts": torch.zeros(3, 3, 2)}, "experts must be int64"),
        ({"weights": torch.zeros(3, 31, 3)}, "weights must have shape"),
        ({"w_down": torch.zeros(6, 7, 4)}, "w_down must have shape"),
        ({"length": torch.zeros(2)}, "length must have shape"),
        ({"offset": torch.zeros(2)}, "offset must have shape"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = problem(31, ragged=False)._asdict() | {"chunk_size": CHUNK} | change
    with pytest.raises(ValueError, match=message):
        chunk_moe(**arguments)
