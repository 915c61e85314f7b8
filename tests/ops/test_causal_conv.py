"""The causal convolution against its sum over the last inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.causal_conv import causal_conv

TOLERANCE = (
    1e-5  # float32 against the oracle in float64, relative to the largest value of the tensor compared
)


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    scale = expected.abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def random_inputs(rows: int, length: int, channels: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    shapes = {
        "x_BLD": (rows, length, channels),
        "weight_DW": (channels, width),
        "bias_D": (channels,),
        "initial_state": (rows, channels, width - 1),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def outputs_and_gradients(inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    arguments: dict[str, Any] = {"bias_D": None, **leaves, **options}
    y, state = causal_conv(**arguments)
    (y.double().sin().sum() + state.double().cos().sum()).backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    named = {"y": y, "final_state": state} | {
        name: grad for name, grad in gradients.items() if grad is not None
    }
    return {name: tensor.detach() for name, tensor in named.items()}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_agree_with_finite_differences(backend: Any, activation: Any) -> None:
    inputs = random_inputs(2, 5, 2, 3)

    def outputs(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.tensor([1, 4])
        options: dict[str, Any] = {"activation": activation, "backend": backend, "length": length}
        return causal_conv(x, weight, bias, initial_state=state, **options)

    assert torch.autograd.gradcheck(outputs, [tensor.requires_grad_() for tensor in inputs.values()])


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_fast_path_agrees_with_the_sum(length: int, width: int, activation: Any) -> None:
    inputs = random_inputs(3, length, 10, width)
    lengths = torch.tensor([0, length // 2, length])
    for options in ({}, {"length": lengths}):
        expected = outputs_and_gradients(inputs, backend="reference", activation=activation, **options)
        single = {name: tensor.float() for name, tensor in inputs.items()}
        actual = outputs_and_gradients(single, activation=activation, **options)
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_close(actual[name], expected[name], name)


def test_without_bias_or_initial_state() -> None:
    inputs = random_inputs(2, 9, 5, 4)
    del inputs["bias_D"], inputs["initial_state"]
    expected = outputs_and_gradients(inputs, backend="reference")
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()})
    for name in expected:
        assert_close(actual[name], expected[name], name)


def test_many_slices_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path works on slices of rows and positions that fit a cache; their size changes nothing."""
    inputs = {name: tensor.float() for name, tensor in random_inputs(3, 21, 5, 4).items()}
    whole = outputs_and_gradients(inputs, activation="silu")
    monkeypatch.setattr("hydra_lab.ops.causal_conv.torch.SLICE_ELEMENTS", 7 * 5)
    sliced = outputs_and_gradients(inputs, activation="silu")
    for name in whole:
        assert_close(sliced[name], whole[name], name, 1e-6)


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 8])
def test_pieces_equal_one_pass(cut: int) -> None:
    x, weight, bias, state = (tensor.float() for tensor in random_inputs(2, 9, 5, 4).values())
    whole, final = causal_conv(x, weight, bias, initial_state=state, activation="silu")
    # The first piece is padded on the right, with NaN that must not reach the state.
    padded = torch.cat([x[:, :cut], torch.full((2, 3, 5), float("nan"))], dim=1)
    first, middle = causal_conv(
        padded, weight, bias, initial_state=state, length=torch.tensor([cut, cut]), activation="silu"
    )
    second, last = causal_conv(x[:, cut:], weight, bias, initial_state=middle, activation="silu")
    assert_close(torch.cat([first[:, :cut], second], dim=1), whole, "y")
    assert torch.equal(last, final)


def test_an_input_reaches_no_earlier_output() -> None:
    x, weight, bias, _ = (tensor.float() for tensor in random_inputs(1, 9, 5, 4).values())
    changed = x.clone()
    changed[:, 5] += 1
    before, after = (causal_conv(inputs, weight, bias)[0] for inputs in (x, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:9] != after[:, 5:9]).all()


def test_half_precision_keeps_its_dtype() -> None:
    inputs = random_inputs(2, 30, 5, 4)
    del inputs["initial_state"]
    inputs["x_BLD"] = inputs["x_BLD"].bfloat16().double()
    single = {name: tensor.float() for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_gradients(single | {"x_BLD": inputs["x_BLD"].bfloat16()}, activation="silu")
    expected = outputs_and_gradients(inputs, activation="silu", backend="reference")
    assert actual["y"].dtype == actual["gradient of x_BLD"].dtype == torch.bfloat16
    assert actual["gradient of weight_DW"].dtype == torch.float32
    for name in expected:  # y is rounded to bfloat16, and so is the gradient that comes back to it
        assert_close(actual[name], expected[name], name, 1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BLD": torch.zeros(2, 3)}, "x_BLD"),
        ({"weight_DW": torch.zeros(6, 4)}, "weight_DW"),
        ({"weight_DW": torch.zeros(5, 0)}, "at least one tap"),
        ({"bias_D": torch.zeros(4)}, "bias_D"),
        ({"initial_state": torch.zeros(2, 5, 4)}, "initial_state"),
        ({"length": torch.zeros(3, dtype=torch.int64)}, "length"),
        ({"activation": "relu"}, "relu"),
        ({"backend": "fused"}, "fused"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**random_inputs(2, 3, 5, 4), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv(**arguments)
