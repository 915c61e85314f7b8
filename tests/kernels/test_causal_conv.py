"""The kernels of the causal convolution against the sum written out, in float64."""

import mmap
import sys
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.causal_conv import causal_conv, mamba_ssm
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


def problem(
    length: int, *, rows: int = 2, channels: int = 5, width: int = 4, bias: bool = True, state: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"x_BLD": normal(rows, length, channels), "weight_DW": normal(channels, width)}
    inputs |= {"bias_D": normal(channels)} if bias else {}
    return inputs | ({"initial_state": normal(rows, channels, width - 1)} if state else {})


def run(inputs: Mapping[str, Tensor], **options: Any) -> Results:
    given: dict[str, Any] = {"bias_D": None, "activation": "silu"} | dict(inputs) | options
    y, final_state = causal_conv(**given)
    return {"y": y, "final_state": final_state}


def check(inputs: Mapping[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    rounded = {
        name: tensor.to(dtype).double() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    expected = outputs_and_gradients(lambda given: run(given, backend="reference", **options), rounded)
    actual = outputs_and_gradients(
        lambda given: run(given, backend="triton", **options), placed(inputs, dtype)
    )
    assert actual["y"].dtype == actual["final_state"].dtype == dtype
    assert_agree(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [*LENGTHS, 2, 3])
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_reference(length: int, state: bool, dtype: torch.dtype) -> None:
    check(problem(length, state=state), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"channels": 130, "rows": 1}])
def test_any_width_with_or_without_bias(width: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(problem(37, width=width, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_activation(dtype: torch.dtype) -> None:
    check(problem(35), dtype, activation=None)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [(0, 1, 2), (3, 4, 40), (40, 39, 0)])
def test_rows_of_their_own_length(lengths: tuple[int, ...], state: bool) -> None:
    """The final state is the last inputs that count, or those before where a row has fewer."""
    inputs = problem(40, rows=3, state=state) | {"length": torch.tensor(lengths)}
    check(inputs, torch.float32)


def test_the_final_state_alone_has_a_gradient() -> None:
    inputs = placed(problem(3, width=4), torch.float32)

    def final(given: Mapping[str, Tensor]) -> Results:
        return {"final_state": run(given, backend="triton")["final_state"]}

    results = outputs_and_gradients(final, inputs)
    assert torch.equal(results["final_state"], inputs["x_BLD"].transpose(1, 2))
    assert results["gradient of x_BLD"].abs().min() > 0
    assert results["gradient of weight_DW"].abs().max() == 0


def test_steps_equal_the_whole() -> None:
    """Also a row that goes on without a token: its state stays as it is."""
    inputs = placed(problem(12), torch.float32)
    whole = run(inputs, backend="triton")
    state = inputs["initial_state"]
    for t in range(12):
        step = run(
            inputs | {"x_BLD": inputs["x_BLD"][:, t : t + 1], "initial_state": state}, backend="triton"
        )
        assert torch.allclose(step["y"][:, 0], whole["y"][:, t], atol=1e-6)
        state = step["final_state"]
    assert torch.equal(state, whole["final_state"])
    idle = run(
        inputs
        | {
            "x_BLD": inputs["x_BLD"][:, :1],
            "initial_state": state,
            "length": torch.zeros(2, dtype=torch.long, device=DEVICE),
        },
        backend="triton",
    )
    assert torch.equal(idle["final_state"], state)


def test_any_strides() -> None:
    """A slice of a wider tensor, as the model gives it, and axes in another order."""
    inputs = placed(problem(40), torch.float32)
    expected = outputs_and_gradients(lambda given: run(given, backend="triton"), inputs)
    other = {name: strided(tensor) for name, tensor in inputs.items()}
    other["x_BLD"] = torch.cat([torch.full((2, 40, 3), torch.nan, device=DEVICE), inputs["x_BLD"]], dim=-1)[
        ..., 3:
    ]
    assert not other["x_BLD"].is_contiguous()
    actual = outputs_and_gradients(lambda given: run(given, backend="triton"), other)
    # Not to the bit: for other strides Triton compiles another kernel, and a GPU may contract its sums differently.
    assert_agree(actual, {name: tensor.cpu() for name, tensor in expected.items()}, torch.float32)


def test_same_bits_twice() -> None:
    assert_same_bits(lambda given: run(given, backend="triton"), placed(problem(100), torch.float32))


def test_mixed_precision() -> None:
    """Half-precision inputs under float32 filters, as autocast makes them."""
    inputs = placed(problem(20), torch.float32)
    given = inputs | {"x_BLD": inputs["x_BLD"].half(), "initial_state": inputs["initial_state"].half()}
    expected = outputs_and_gradients(
        lambda x: run(x, backend="reference"), {name: tensor.cpu().double() for name, tensor in given.items()}
    )
    actual = outputs_and_gradients(lambda x: run(x, backend="triton"), given)
    assert actual["y"].dtype == actual["gradient of x_BLD"].dtype == torch.float16
    assert actual["gradient of weight_DW"].dtype == torch.float32
    assert_agree(actual, expected, torch.bfloat16)  # y and its gradients are rounded


@pytest.mark.parametrize("name", ["x_BLD", "initial_state"])
def test_float64_is_refused(name: str) -> None:
    inputs = placed(problem(3), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        run(inputs | {name: inputs[name].double()}, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it would need 11 GiB of memory that is really there")
def test_offsets_beyond_32_bits() -> None:
    """Positions 2^26 numbers apart, in an address space of which only the pages that are touched exist."""
    apart, inputs = 1 << 26, placed(problem(40, rows=1), torch.float32)
    without_reserve = 0x4000  # Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | without_reserve
    numbers = torch.frombuffer(mmap.mmap(-1, 4 * 40 * apart, flags=flags), dtype=torch.float32)
    far = numbers.as_strided((1, 40, 5), (40 * apart, apart, 1)).copy_(inputs["x_BLD"])
    near, wide = (
        outputs_and_gradients(lambda x: run(x, backend="triton"), given)
        for given in (inputs, inputs | {"x_BLD": far})
    )
    for name, tensor in near.items():
        assert torch.equal(wide[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": torch.tensor([3, 5])}, "no rows of their own length"),
        ({"weight_DW": torch.zeros(8, 5), "initial_state": torch.zeros(2, 8, 4)}, "not 5"),
        (
            {"x_BLD": torch.zeros(2, 5, 6), "weight_DW": torch.zeros(6, 4), "initial_state": None},
            "multiple of 8",
        ),
    ],
)
def test_what_causal_conv1d_lacks_is_named(change: dict[str, Any], message: str) -> None:
    given = {
        "x_BLD": torch.zeros(2, 5, 8),
        "weight_DW": torch.zeros(8, 4),
        "initial_state": torch.zeros(2, 8, 3),
    }
    given |= change
    with pytest.raises(ValueError, match=message):
        mamba_ssm.causal_conv(
            given["x_BLD"], given["weight_DW"], None, given["initial_state"], given.get("length"), "silu"
        )


class _Stub:
    """As much of causal-conv1d as its signatures promise, on the oracle; it checks what the C++ checks."""

    @staticmethod
    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        initial_states: Tensor | None,
        activation: str,
    ) -> Tensor:
        assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        if initial_states is not None:
            assert initial_states.stride(1) == 1 and initial_states.dtype == x.dtype
        y, _ = causal_conv(
            x.transpose(1, 2),
            weight,
            bias,
            initial_state=initial_states,
            activation="silu",
            backend="reference",
        )
        return y.transpose(1, 2)

    @staticmethod
    def causal_conv1d_update(
        x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        y, state = causal_conv(
            x[:, None], weight, bias, initial_state=conv_state, activation="silu", backend="reference"
        )
        conv_state.copy_(state)
        return y[:, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 40])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_causal_conv1d_is_called_as_it_wants(
    length: int, state: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wiring, on a stand-in: layouts, decoding, the final state and its gradient."""
    monkeypatch.setitem(sys.modules, "causal_conv1d", cast(Any, _Stub))
    inputs = {name: tensor.float() for name, tensor in problem(length, channels=8, state=state).items()}
    wide = torch.cat([inputs["x_BLD"], torch.zeros(2, length, 3)], dim=-1)[..., :8]  # strides of 11

    def through(given: Mapping[str, Tensor]) -> Results:
        arguments = (
            given["x_BLD"],
            given["weight_DW"],
            given["bias_D"],
            given.get("initial_state"),
            None,
            "silu",
        )
        return dict(zip(("y", "final_state"), mamba_ssm.causal_conv(*arguments), strict=True))

    kept = inputs.get("initial_state", torch.zeros(())).clone()
    if not training:
        with torch.no_grad():
            actual, expected = through(inputs | {"x_BLD": wide}), run(inputs, backend="reference")
        assert_agree(actual, {name: tensor.double() for name, tensor in expected.items()}, torch.float32)
    else:
        actual = outputs_and_gradients(through, inputs | {"x_BLD": wide})
        expected = outputs_and_gradients(lambda given: run(given, backend="reference"), inputs)
        assert_agree(actual, {name: tensor.double() for name, tensor in expected.items()}, torch.float32)
    assert torch.equal(inputs.get("initial_state", torch.zeros(())), kept)
