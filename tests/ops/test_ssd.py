"""The state-space recurrence: the chunked path against the step-by-step oracle, and the oracle against its gradient."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_lab.ops.ssd import ssd, ssd_step, state_passing

TOLERANCE = (
    1e-5  # float32 against the oracle in float64, relative to the largest value of the tensor compared
)
POSITIONAL = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")  # arguments that have a value for each position
HEADS_AND_GROUPS = [(1, 1), (3, 1), (6, 3), (5, 5)]


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Deterministic mode fills new uninitialised tensors with NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    scale = expected.abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def random_inputs(
    rows: int,
    length: int,
    heads: int,
    groups: int,
    *,
    head_dim: int = 5,
    state_dim: int = 7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments of `ssd`, by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x_BLHP": normal(rows, length, heads, head_dim),
        "dt_BLH": 0.3 * uniform(rows, length, heads),
        "A_H": -0.1 - 4 * uniform(heads),
        "B_BLGN": normal(rows, length, groups, state_dim),
        "C_BLGN": normal(rows, length, groups, state_dim),
        "D": normal(heads),
        "initial_state": normal(rows, heads, head_dim, state_dim),
    }


def outputs_and_gradients(inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Everything `ssd` returns, and the gradient of a fixed random combination of it with respect to each input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output = ssd(**leaves, squared_norms=True, chunk_states=True, **options)._asdict()
    generator = torch.Generator().manual_seed(1)
    parts = [
        (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
        for name, tensor in output.items()
        if name != "squared_norms"
    ]
    torch.stack(parts).sum().backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return output | {name: grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_agree_with_finite_differences(backend: Any) -> None:
    inputs = random_inputs(2, 5, 2, 1, head_dim=2, state_dim=2)
    inputs["log_decay"] = -torch.rand(2, 5, 2, dtype=torch.float64)
    names = list(inputs)

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(names, tensors, strict=True))
        output = ssd(**arguments, chunk_states=True, chunk_size=2, backend=backend)
        assert output.chunk_states is not None
        return output.y, output.final_state, output.chunk_states

    assert torch.autograd.gradcheck(outputs, [tensor.requires_grad_() for tensor in inputs.values()])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize(("heads", "groups"), HEADS_AND_GROUPS)
def test_chunks_agree_with_steps(length: int, heads: int, groups: int) -> None:
    inputs = random_inputs(3, length, heads, groups)
    expected = outputs_and_gradients(inputs, backend="reference")
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()})
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape
        assert_close(actual[name], expected[name], name)


def test_without_skip_or_initial_state() -> None:
    inputs = random_inputs(2, 65, 4, 2)
    del inputs["D"], inputs["initial_state"]
    expected = outputs_and_gradients(inputs, backend="reference")
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()})
    for name in expected:
        assert_close(actual[name], expected[name], name)


@pytest.mark.parametrize("rows", [1, 2, 9, 33])
def test_any_number_of_rows(rows: int) -> None:
    """The fast path takes rows in slices; the last slice may be a smaller one."""
    inputs = random_inputs(rows, 70, 3, 1)
    inputs["A_H"] = inputs["A_H"].clone()
    expected = outputs_and_gradients(inputs, backend="reference", chunk_size=16)
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()}, chunk_size=16)
    for name in expected:
        assert_close(actual[name], expected[name], name)


def test_a_given_decay_replaces_dt_times_A() -> None:
    """An edited decay may also be 0 (keep everything), very negative (forget everything), or positive (grow)."""
    inputs = random_inputs(2, 67, 3, 1)
    del inputs["A_H"]
    log_decay = -torch.rand(2, 67, 3, dtype=torch.float64)
    log_decay[:, 10:20] = 0
    log_decay[:, 30] = -1e4
    log_decay[:, 40] = 0.5
    inputs["log_decay"] = log_decay
    rates = torch.full((3,), -1.0)
    expected = outputs_and_gradients(inputs, A_H=rates.double(), backend="reference")
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()}, A_H=rates)
    for name in expected:
        assert_close(actual[name], expected[name], name)
    given_decay = inputs["dt_BLH"] * rates.double()
    assert torch.equal(
        ssd(**(inputs | {"log_decay": given_decay}), A_H=rates.double()).y,
        ssd(**{name: t for name, t in inputs.items() if name != "log_decay"}, A_H=rates.double()).y,
    )


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 80),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    layout=st.sampled_from(HEADS_AND_GROUPS),
    seed=st.integers(0, 1000),
)
def test_chunk_size_changes_nothing(
    length: int, sizes: tuple[int, int], layout: tuple[int, int], seed: int
) -> None:
    inputs = random_inputs(2, length, *layout, head_dim=3, state_dim=4, dtype=torch.float32, seed=seed)
    first, second = (outputs_and_gradients_of_y(inputs, chunk_size=size) for size in sizes)
    for name in first:
        assert_close(first[name], second[name], name)


def outputs_and_gradients_of_y(inputs: dict[str, Any], *, chunk_size: int) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output = ssd(**leaves, chunk_size=chunk_size)
    (output.y.square().sum() + output.final_state.square().sum()).backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    named = {"y": output.y, "final_state": output.final_state} | gradients
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("real", [0, 1, 63, 64, 65])
def test_padding_leaves_the_state_untouched(backend: Any, real: int) -> None:
    inputs = random_inputs(2, 80, 3, 1, dtype=torch.float32)
    inputs["dt_BLH"][:, real:] = 0
    output = ssd(**inputs, backend=backend)
    if real == 0:
        assert torch.equal(output.final_state, inputs["initial_state"])
        return
    alone = ssd(**{name: t[:, :real] if name in POSITIONAL else t for name, t in inputs.items()})
    assert_close(output.final_state, alone.final_state, "final state", 1e-6)
    assert_close(output.y[:, :real], alone.y, "y", 1e-6)


@settings(deadline=None, max_examples=20)
@given(pieces=st.lists(st.integers(1, 40), min_size=1, max_size=4), chunk_size=st.integers(1, 64))
def test_pieces_equal_one_pass(pieces: list[int], chunk_size: int) -> None:
    inputs = random_inputs(2, sum(pieces), 6, 3, dtype=torch.float32)
    whole = ssd(**inputs, chunk_size=chunk_size)
    state = inputs["initial_state"]
    outputs: list[Tensor] = []
    start = 0
    for size in pieces:
        piece: dict[str, Any] = {
            name: t[:, start : start + size] if name in POSITIONAL else t for name, t in inputs.items()
        }
        output = ssd(**{**piece, "initial_state": state}, chunk_size=chunk_size)
        state = output.final_state
        outputs.append(output.y)
        start += size
    assert_close(torch.cat(outputs, dim=1), whole.y, "y")
    assert_close(state, whole.final_state, "final state")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_single_steps_equal_one_pass(backend: Any) -> None:
    inputs = random_inputs(2, 40, 6, 3, dtype=torch.float32)
    whole = ssd(**inputs, chunk_size=16)
    state = inputs["initial_state"].clone()
    for t in range(40):
        at_t = [inputs[name][:, t] for name in ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")]
        before = state.clone()
        y, new_state = ssd_step(
            at_t[0],
            at_t[1],
            inputs["A_H"],
            at_t[2],
            at_t[3],
            state,
            D=inputs["D"],
            backend=backend,
        )
        assert torch.equal(state, before), "a step must not change the state it is given"
        state = new_state
        assert_close(y, whole.y[:, t], f"y at {t}")
    assert_close(state, whole.final_state, "final state")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_chunk_states_are_the_states_at_chunk_ends(backend: Any) -> None:
    inputs = random_inputs(2, 50, 3, 1, dtype=torch.float32)
    output = ssd(**inputs, chunk_size=16, chunk_states=True, squared_norms=True, backend=backend)
    assert output.chunk_states is not None and output.squared_norms is not None
    assert output.chunk_states.shape == (2, 4, 3, 5, 7)
    assert torch.equal(output.chunk_states[:, -1], output.final_state)
    assert_close(output.squared_norms, output.chunk_states.square().sum((-2, -1)), "squared norms", 1e-6)
    for chunk, end in enumerate([16, 32, 48]):
        shorter = ssd(
            **{name: t[:, :end] if name in POSITIONAL else t for name, t in inputs.items()}, chunk_size=16
        )
        assert_close(output.chunk_states[:, chunk], shorter.final_state, f"state of chunk {chunk}")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [1, 20])
def test_states_and_norms_come_only_if_asked_for(length: int, backend: Any) -> None:
    inputs = random_inputs(2, length, 3, 1, dtype=torch.float32)
    bare = ssd(**inputs, backend=backend)
    assert bare.squared_norms is None and bare.chunk_states is None
    leaves: dict[str, Any] = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    asked = ssd(**leaves, squared_norms=True, backend=backend)
    assert asked.squared_norms is not None and not asked.squared_norms.requires_grad
    assert asked.chunk_states is None


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("given", [False, True])
def test_each_document_is_computed_as_if_alone(given: bool, backend: Any) -> None:
    inputs = random_inputs(2, 40, 3, 1)
    if given:
        inputs["log_decay"] = -torch.rand(2, 40, 3, dtype=torch.float64)
    positional = (*POSITIONAL, "log_decay")
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, [9, 24]] = True
    starts[1, 0] = True
    whole = ssd(**inputs, starts=starts, chunk_size=16, backend=backend)
    for first, end in ((0, 9), (9, 24), (24, 40)):
        piece: dict[str, Any] = {n: t[:, first:end] if n in positional else t for n, t in inputs.items()}
        piece["initial_state"] = inputs["initial_state"].clone()
        piece["initial_state"][1] = 0
        if first > 0:
            piece["initial_state"][0] = 0
        alone = ssd(**piece, backend="reference")
        assert_close(whole.y[:, first:end], alone.y, f"y of the document at {first}", 1e-9)
    assert_close(whole.final_state, alone.final_state, "final state", 1e-9)


def test_no_gradient_flows_over_a_start() -> None:
    inputs = random_inputs(1, 20, 2, 1)
    inputs["log_decay"] = -torch.rand(1, 20, 2, dtype=torch.float64)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[:, 7] = True
    for backend in ("reference", "torch"):
        leaves: dict[str, Any] = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        output = ssd(**leaves, starts=starts, chunk_size=16, backend=backend)
        (output.y[:, 7:].sum() + output.final_state.sum()).backward()
        assert leaves["log_decay"].grad[:, 7].abs().max() == 0
        assert leaves["x_BLHP"].grad[:, :7].abs().max() == 0
        assert leaves["initial_state"].grad.abs().max() == 0
        assert leaves["x_BLHP"].grad[:, 7:].abs().min() > 0


@pytest.mark.parametrize("length", [1, 63, 65])
def test_documents_agree_with_steps(length: int) -> None:
    inputs = random_inputs(3, length, 6, 3)
    starts = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.1
    starts[0, 0] = True
    expected = outputs_and_gradients(inputs, starts=starts, backend="reference")
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()}, starts=starts)
    for name in expected:
        assert_close(actual[name], expected[name], name)


def test_strong_decay_neither_overflows_nor_loses_what_follows() -> None:
    """Decays of exp(-1000) per step, then weak ones: running sums near -60000 must not swallow the weak ones."""
    inputs = random_inputs(1, 256, 3, 1)
    inputs["A_H"] = torch.tensor([-1000.0, -1.0, -1e-3], dtype=torch.float64)
    inputs["dt_BLH"] = torch.full_like(inputs["dt_BLH"], 1e-3)
    inputs["dt_BLH"][:, :64, 0] = 1.0
    expected = outputs_and_gradients(inputs, backend="reference")
    actual = outputs_and_gradients({name: tensor.float() for name, tensor in inputs.items()})
    for name in expected:
        assert actual[name].isfinite().all(), name
        assert_close(actual[name], expected[name], name)


def test_half_precision_inputs_keep_float32_states() -> None:
    exact = random_inputs(2, 100, 4, 1, dtype=torch.bfloat16)
    inputs = {
        name: tensor.to(torch.bfloat16 if tensor.ndim == 4 else torch.float32)
        for name, tensor in exact.items()
    }
    inputs["initial_state"] = inputs["initial_state"].float()
    with torch.autocast("cpu", torch.bfloat16):
        output = ssd(**inputs, squared_norms=True, chunk_states=True)
        step_y, step_state = ssd_step(
            *(inputs[name][:, 0] if name != "A_H" else inputs[name] for name in list(inputs)[:5]),
            state=inputs["initial_state"],
        )
    assert output.y.dtype == step_y.dtype == torch.bfloat16
    assert output.chunk_states is not None and output.squared_norms is not None
    states = (output.final_state, output.chunk_states, output.squared_norms, step_state)
    assert all(tensor.dtype == torch.float32 for tensor in states)
    expected = ssd(**{name: tensor.double() for name, tensor in inputs.items()}, backend="reference")
    assert_close(output.final_state, expected.final_state, "final state")
    assert_close(output.y, expected.y, "y", 4e-3)  # y itself is rounded to bfloat16, 8 bits


def test_half_precision_gradients_have_the_dtype_of_their_inputs() -> None:
    inputs = random_inputs(2, 70, 4, 1)
    inputs = {
        name: t.to(torch.bfloat16 if t.ndim == 4 else torch.float32).double() for name, t in inputs.items()
    }
    half = {name: t.to(torch.bfloat16 if t.ndim == 4 else torch.float32) for name, t in inputs.items()}
    half["initial_state"] = half["initial_state"].float()
    leaves = {name: tensor.requires_grad_() for name, tensor in half.items()}
    ssd(**leaves).y.float().sum().backward()
    doubles = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    ssd(**doubles, backend="reference").y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        expected = doubles[name].grad
        assert expected is not None
        assert_close(leaf.grad, expected, name, 4e-3 if leaf.dtype == torch.bfloat16 else TOLERANCE)


def test_a_decay_of_minus_infinity_forgets_everything() -> None:
    inputs = random_inputs(2, 20, 3, 1, dtype=torch.float32)
    log_decay = -torch.rand(2, 20, 3)
    log_decay[:, 7] = float("-inf")
    output = ssd(**inputs, log_decay=log_decay, chunk_size=16)
    from_7: dict[str, Any] = {
        name: tensor[:, 7:] if name in POSITIONAL else tensor for name, tensor in inputs.items()
    }
    fresh = ssd(
        **{**from_7, "initial_state": torch.zeros(2, 3, 5, 7)}, log_decay=log_decay[:, 7:], chunk_size=16
    )
    assert_close(output.y[:, 7:], fresh.y, "y")
    assert_close(output.final_state, fresh.final_state, "final state")


@pytest.mark.parametrize("chunks", [1, 5, 63, 64, 65, 130])
def test_state_passing_agrees_with_steps(chunks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(2, chunks, 3, 5, generator=generator, dtype=torch.float64)
    log_decay = -torch.rand(2, chunks, 3, generator=generator, dtype=torch.float64)
    log_decay[:, chunks // 2, 0] = -1e5
    log_decay[:, chunks // 3, 1] = float("-inf")  # a slot that is wholly replaced
    initial = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    results: list[list[Tensor]] = []
    runs: list[tuple[Any, torch.dtype]] = [("reference", torch.float64), ("torch", torch.float32)]
    for backend, dtype in runs:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (update, log_decay, initial)]
        entering, final = state_passing(*leaves, backend=backend)
        (entering.sin().sum() + final.square().sum()).backward()
        results.append([entering, final, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for name, actual, expected in zip(
        "entering final update log_decay initial".split(), *reversed(results), strict=True
    ):
        assert_close(actual, expected, name)


def test_state_passing_gradients() -> None:
    inputs = [torch.randn(2, 3, 2, 2), -torch.rand(2, 3, 2), torch.randn(2, 2, 2)]
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: state_passing(*args, backend="reference"), leaves)
    assert torch.autograd.gradcheck(lambda *args: state_passing(*args, backend="torch"), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_BLH": torch.zeros(2, 3, 9)}, "dt_BLH"),
        ({"A_H": torch.zeros(9)}, "A_H"),
        ({"B_BLGN": torch.zeros(2, 4, 1, 7)}, "B_BLGN"),
        ({"C_BLGN": torch.zeros(2, 3, 1, 9)}, "C_BLGN"),
        ({"D": torch.zeros(9)}, "D"),
        ({"initial_state": torch.zeros(2, 4, 7, 5)}, "initial_state"),
        ({"log_decay": torch.zeros(2, 3)}, "log_decay"),
        ({"starts": torch.zeros(2, 4, dtype=torch.bool)}, "starts"),
        ({"starts": torch.zeros(2, 3)}, "starts must be bool"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "fused"}, "fused"),
        (
            {"B_BLGN": torch.zeros(2, 3, 3, 7), "C_BLGN": torch.zeros(2, 3, 3, 7)},
            "multiple of the number of groups",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**random_inputs(2, 3, 4, 1, dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        ssd(**arguments)


def test_no_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one position"):
        ssd(**random_inputs(2, 0, 4, 1))


def test_second_derivatives_are_refused_by_the_fast_path() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs(1, 5, 2, 1).items()}
    for backend in ("reference", "torch"):
        arguments: dict[str, Any] = {**inputs, "backend": backend}
        first = ssd(**arguments).y.sin().sum()
        if backend == "reference":
            (grad,) = torch.autograd.grad(first, inputs["x_BLHP"], create_graph=True)
            assert grad.requires_grad
        else:
            with pytest.raises(NotImplementedError, match="second derivative"):
                torch.autograd.grad(first, inputs["x_BLHP"], create_graph=True)


# --- mamba-ssm's kernels, in place of which the oracle stands here: what is checked is how they are called ---


def oracle_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **given: Any
) -> Any:
    """As `_mamba_chunk_scan_combined_fwd`: out, out_x, dt, sums of decays, entering states, final state."""
    initial, documents = given["initial_states"], given["seq_idx"]
    starts = None
    if documents is not None:
        before = torch.zeros_like(documents)
        before[:, 1:] = documents[:, :-1]
        starts = documents != before
    output = ssd(
        x,
        dt,
        A,
        B,
        C,
        D=given["D"],
        initial_state=initial,
        starts=starts,
        chunk_size=chunk_size,
        chunk_states=True,
        backend="reference",
    )
    assert output.chunk_states is not None
    first = torch.zeros_like(output.final_state) if initial is None else initial
    entering = torch.cat([first[:, None], output.chunk_states[:, :-1]], dim=1)
    return output.y, None, dt, None, entering, output.final_state


def oracle_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    _out: Tensor,
    size: int,
    **given: Any,
) -> Any:
    """As `_mamba_chunk_scan_combined_bwd`: gradients of x, dt, A, B, C, D, z, dt_bias, initial states."""
    grad_final = given.pop("dfinal_states")
    tensors = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": given["D"],
        "initial_states": given["initial_states"],
    }
    with torch.enable_grad():
        leaves: dict[str, Any] = {
            n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()
        }
        output = oracle_forward(chunk_size=size, seq_idx=given["seq_idx"], **leaves)
        loss = (output[0] * grad).sum()
        if grad_final is not None:
            loss = loss + (output[-1] * grad_final).sum()
        wanted = [leaf for leaf in leaves.values() if leaf is not None]
        found = iter(torch.autograd.grad(loss, wanted))
    grads = [None if leaf is None else next(found) for leaf in leaves.values()]
    return *grads[:6], None, None, grads[6]


def oracle_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **given: Any
) -> Any:
    """As `selective_state_update`, which needs rates, step sizes and biases as views that share one value per head."""
    for tensor in (dt, A, given["dt_bias"]):
        assert tensor.stride(-1) == 0
    y, new = ssd_step(x, dt[..., 0], A[:, 0, 0], B, C, state, D=D[:, 0], backend="reference")
    state.copy_(new)
    return y


@pytest.fixture
def mamba(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend, with the oracle in place of mamba-ssm."""
    combined = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    update = ModuleType("mamba_ssm.ops.triton.selective_state_update")
    combined._mamba_chunk_scan_combined_fwd = oracle_forward  # pyright: ignore[reportAttributeAccessIssue]
    combined._mamba_chunk_scan_combined_bwd = oracle_backward  # pyright: ignore[reportAttributeAccessIssue]
    update.selective_state_update = oracle_step  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (combined, update):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return importlib.import_module("hydra_lab.ops.ssd.mamba_ssm")


def run_mamba(mamba: ModuleType, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    names = ("x_BLHP", "dt_BLH", "A_H", "B_BLGN", "C_BLGN", "D", "log_decay", "initial_state", "starts")
    rest = {"chunk_size": 16, "squared_norms": True, "chunk_states": True} | options
    output = mamba.ssd(*((inputs | rest).get(name) for name in names), *list(rest.values())[:3])
    return output._asdict()


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("with_documents", [False, True])
def test_mamba_ssm_is_called_as_it_wants(mamba: ModuleType, with_documents: bool, length: int) -> None:
    inputs = random_inputs(2, length, 6, 3, dtype=torch.float32)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, length // 2] = True
    starts[1, 0] = True
    options = {"starts": starts if with_documents else None}
    if length == 1 and not with_documents:  # a step
        del inputs["D"], inputs["initial_state"]
        actual = run_mamba(mamba, inputs)
    results: list[dict[str, Tensor]] = []
    for backend in ("mamba_ssm", "reference"):
        leaves: dict[str, Any] = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        if backend == "mamba_ssm":
            output = run_mamba(mamba, leaves, **options)
        else:
            asked = {"squared_norms": True, "chunk_states": True, "chunk_size": 16}
            output = ssd(**leaves, **options, **asked, backend="reference")._asdict()
        (output["y"].sin().sum() + output["final_state"].square().sum()).backward()
        grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        results.append({n: t.detach() for n, t in (output | grads).items()})
    for name, expected in results[1].items():
        assert_close(results[0][name], expected, name)
        if length == 1 and not with_documents and name in actual:
            assert_close(actual[name], expected, f"{name} of a step")


def test_what_mamba_ssm_cannot_do_is_said(mamba: ModuleType) -> None:
    inputs = random_inputs(1, 20, 2, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="takes no log_decay"):
        run_mamba(mamba, {**inputs, "log_decay": torch.zeros(1, 20, 2)})
    with pytest.raises(ValueError, match="not of 100"):
        run_mamba(mamba, inputs, chunk_size=100)
    leaves: dict[str, Any] = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match="through chunk_states"):
        run_mamba(mamba, leaves)["chunk_states"].sum().backward()
    with pytest.raises(ValueError, match="without a gradient"):
        at_0 = [leaves[name] if name == "A_H" else leaves[name][:, 0] for name in list(leaves)[:5]]
        mamba.ssd_step(*at_0, leaves["initial_state"], None)
    with pytest.raises(ValueError, match="cannot run ssd here"):
        ssd(**random_inputs(1, 3, 2, 1, dtype=torch.float32), backend="mamba_ssm")
