"""The state-space kernels against the step-by-step oracle in float64."""

import mmap
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.ssd import kernels, ssd, ssd_step, state_passing
from tests.kernels.checking import (
    DEVICE,
    DTYPES,
    LENGTHS,
    Results,
    assert_agree,
    assert_same_bits,
    outputs_and_gradients,
    strided,
)

SEQUENCES = ("x_BLHP", "B_BLGN", "C_BLGN")
"""What comes in half precision under autocast; step sizes, rates and states stay in float32."""


def random_inputs(
    rows: int = 2,
    length: int = 65,
    heads: int = 3,
    groups: int = 1,
    *,
    head_dim: int = 5,
    state_dim: int = 7,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random arguments of `ssd`, by name, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return {
        "x_BLHP": normal(rows, length, heads, head_dim),
        "dt_BLH": 0.3 * uniform(rows, length, heads),
        "A_H": -0.1 - 4 * uniform(heads),
        "B_BLGN": normal(rows, length, groups, state_dim),
        "C_BLGN": normal(rows, length, groups, state_dim),
        "D": normal(heads),
        "initial_state": normal(rows, heads, head_dim, state_dim),
    }


def placed(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`inputs` on the device of the tests, as autocast would give them."""
    return {
        name: tensor.to(DEVICE, dtype if name in SEQUENCES else torch.float32)
        if tensor.is_floating_point()
        else tensor.to(DEVICE)
        for name, tensor in inputs.items()
    }


def rounded(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same values for the oracle, in float64 on the CPU."""
    return {
        name: tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in placed(inputs, dtype).items()
    }


def run(inputs: Mapping[str, Any], **options: Any) -> Results:
    """Everything that `ssd` returns, by name."""
    arguments: dict[str, Any] = {"squared_norms": True, "chunk_states": True, **inputs, **options}
    output = ssd(**arguments)._asdict()
    return {name: tensor for name, tensor in output.items() if tensor is not None}


def check(inputs: Mapping[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    """Outputs, states, norms and all gradients are the oracle's."""

    def ours(leaves: Mapping[str, Tensor]) -> Results:
        return run(leaves, backend="triton", **options)

    def oracle(leaves: Mapping[str, Tensor]) -> Results:
        on_cpu = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in options.items()}
        return run(leaves, backend="reference", **on_cpu)

    expected = outputs_and_gradients(oracle, rounded(inputs, dtype))
    assert_agree(outputs_and_gradients(ours, placed(inputs, dtype)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_steps(length: int, dtype: torch.dtype) -> None:
    check(random_inputs(1 if length == 500 else 2, length, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (6, 3)])
def test_heads_and_groups(heads: int, groups: int, dtype: torch.dtype) -> None:
    check(random_inputs(1, 33, heads, groups), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "length"), [(8, 20), (16, 32), (100, 130), (256, 200)])
def test_chunk_sizes(chunk_size: int, length: int, dtype: torch.dtype) -> None:
    """Chunks of 100 are cut into two tiles of 50, and the last chunk of 130 positions has an empty one."""
    check(random_inputs(1, length, 2), dtype, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_share_a_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of three heads, two of which one program takes in turn."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "MOST_HEADS", 2)
    check(random_inputs(1, 40, 6, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_program_for_a_whole_group(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    check(random_inputs(2, 40, 4, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "state_dim"), [(70, 20), (20, 140), (96, 200)])
def test_states_of_several_blocks(head_dim: int, state_dim: int, dtype: torch.dtype) -> None:
    check(random_inputs(1, 20, 2, head_dim=head_dim, state_dim=state_dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_skip_or_initial_state(dtype: torch.dtype) -> None:
    for length in (1, 70):
        inputs = random_inputs(1, length, 2)
        del inputs["D"], inputs["initial_state"]
        check(inputs, dtype, squared_norms=False, chunk_states=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["y", "final_state", "chunk_states"])
def test_gradients_through_one_output_alone(output: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(1, 70, 2)
    for length in (1, 70):
        part = {n: t[:, :length] if n in (*SEQUENCES, "dt_BLH") else t for n, t in inputs.items()}
        expected, actual = (
            outputs_and_gradients(
                lambda leaves, backend=backend: {output: run(leaves, backend=backend, chunk_size=32)[output]},
                leaves,
            )
            for backend, leaves in (("reference", rounded(part, dtype)), ("triton", placed(part, dtype)))
        )
        assert_agree(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_decays(dtype: torch.dtype) -> None:
    """They may keep everything, forget (almost) everything, or grow."""
    inputs = random_inputs(1, 90, 2)
    log_decay = -torch.rand(1, 90, 2, dtype=torch.float64)
    log_decay[:, 10:20] = 0
    log_decay[:, 30, 0] = -1e4
    log_decay[:, 40] = 0.5
    log_decay[:, 70, 1] = float("-inf")
    inputs["log_decay"] = log_decay
    check(inputs, dtype, chunk_size=50)
    at_0 = {n: t[:, :1] if n in (*SEQUENCES, "dt_BLH", "log_decay") else t for n, t in inputs.items()}
    check(at_0, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_growth_that_would_overflow_against_time(dtype: torch.dtype) -> None:
    """What decays by exp(-96) grows by exp(96), which is infinite, from later positions to earlier ones: there it must
    not be formed. A decay that grows, by exp(32) here, is another matter."""
    inputs = random_inputs(1, 64, 1)
    inputs["log_decay"] = torch.full((1, 64, 1), -3.0, dtype=torch.float64)
    inputs["log_decay"][:, 32:] = 1.0
    check(inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strong_decays_lose_nothing_of_what_follows(dtype: torch.dtype) -> None:
    """Running sums near -2000 (a decay of exp(-30) per step), then weak decays; a new document in the midst of each."""
    inputs = random_inputs(1, 96, 2)
    log_decay = torch.full((1, 96, 2), -1e-3, dtype=torch.float64)
    log_decay[:, :60, 0] = -30.0
    log_decay[:, 20:50, 1] = -30.0
    inputs["log_decay"] = log_decay
    starts = torch.zeros(1, 96, dtype=torch.bool)
    starts[:, [40, 55, 62, 80]] = True
    check(inputs, dtype)
    check(inputs, dtype, starts=starts.to(DEVICE))


@pytest.mark.parametrize("strength", [8.0, 30.0])
def test_gradients_of_strong_decays_are_not_noise(strength: float) -> None:
    """A decay of exp(-8) has a gradient 3000 times smaller than what a position does with itself, which must not be in
    any difference that it is made from."""
    inputs = random_inputs(1, 40, 2)
    inputs["log_decay"] = torch.full((1, 40, 2), -strength, dtype=torch.float64)
    gradients: list[Tensor] = []
    for backend, given in (("triton", placed(inputs, torch.float32)), ("reference", inputs)):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
        run(leaves, backend=backend)["y"].square().sum().backward()
        gradient = leaves["log_decay"].grad
        assert gradient is not None
        gradients.append(gradient.cpu().double())
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    print(f"relative error {error:.1e} of {gradients[1].abs().max():.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
def test_documents(given: bool, dtype: torch.dtype) -> None:
    """Each document is computed as if it were alone; the decay at its first position plays no part."""
    inputs = random_inputs(2, 70, 2)
    if given:
        inputs["log_decay"] = -torch.rand(2, 70, 2, dtype=torch.float64)
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[0, [5, 6, 64]] = True
    starts[1, [0, 33, 69]] = True
    check(inputs, dtype, starts=starts.to(DEVICE), chunk_size=32)
    ours = placed(inputs, dtype)
    whole = run(ours, starts=starts.to(DEVICE), backend="triton")
    ours["initial_state"] = torch.zeros_like(ours["initial_state"])
    last = {
        n: t[:1, 64:] if n in (*SEQUENCES, "dt_BLH", "log_decay") else t[:1] if n == "initial_state" else t
        for n, t in ours.items()
    }
    alone = run(last, backend="triton")
    assert_agree({"y": whole["y"][:1, 64:].cpu()}, {"y": alone["y"].cpu()}, dtype)
    at_0 = {n: t[:, :1] if n in (*SEQUENCES, "dt_BLH", "log_decay") else t for n, t in inputs.items()}
    check(at_0, dtype, starts=starts[:, :1].to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("real", [0, 1, 30])
def test_padding_leaves_the_state_untouched(real: int, dtype: torch.dtype) -> None:
    inputs = placed(random_inputs(1, 70, 2), dtype)
    inputs["dt_BLH"][:, real:] = 0
    output = run(inputs, backend="triton")
    if real == 0:
        assert torch.equal(output["final_state"], inputs["initial_state"])
        return
    shorter = {n: t[:, :real] if n in (*SEQUENCES, "dt_BLH") else t for n, t in inputs.items()}
    alone = run(shorter, backend="triton")
    results = {"final": output["final_state"].cpu(), "y": output["y"][:, :real].cpu()}
    assert_agree(results, {"final": alone["final_state"].cpu(), "y": alone["y"].cpu()}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_equal_one_pass(dtype: torch.dtype) -> None:
    inputs = placed(random_inputs(2, 45, 2), dtype)
    whole = run(inputs, backend="triton", chunk_size=16)
    state, outputs = inputs["initial_state"], []
    for start, end in ((0, 16), (16, 17), (17, 45)):
        piece = {n: t[:, start:end] if n in (*SEQUENCES, "dt_BLH") else t for n, t in inputs.items()}
        done = run(piece, backend="triton", chunk_size=16, initial_state=state)
        state = done["final_state"]
        outputs.append(done["y"])
    results = {"y": torch.cat(outputs, dim=1).cpu(), "final_state": state.cpu()}
    assert_agree(results, {name: whole[name].cpu() for name in results}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    inputs = random_inputs(2, 40, 2)
    inputs["log_decay"] = -torch.rand(2, 40, 2, dtype=torch.float64)

    def ours(leaves: Mapping[str, Tensor]) -> Results:
        return run({name: strided(leaf) for name, leaf in leaves.items()}, backend="triton")

    def oracle(leaves: Mapping[str, Tensor]) -> Results:
        return run(leaves, backend="reference")

    for length in (1, 40):
        part = {
            n: t[:, :length] if n in (*SEQUENCES, "dt_BLH", "log_decay") else t for n, t in inputs.items()
        }
        expected = outputs_and_gradients(oracle, rounded(part, dtype))
        assert_agree(outputs_and_gradients(ours, placed(part, dtype)), expected, dtype)


def test_inputs_of_different_precision() -> None:
    """x in float16, B and C in float32: products are of float32 numbers, gradients have the dtype of their input."""
    inputs = {name: tensor.float() for name, tensor in random_inputs(1, 40, 2).items()}
    inputs["x_BLHP"] = inputs["x_BLHP"].half()
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    doubles = {name: tensor.cpu().double() for name, tensor in inputs.items()}
    expected = outputs_and_gradients(lambda leaves: run(leaves, backend="reference"), doubles)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    output = run(leaves, backend="triton")
    assert output["y"].dtype == torch.float16
    torch.testing.assert_close(output["y"].cpu().double(), expected["y"], rtol=1e-3, atol=1e-3)
    of_states = {name: output[name].detach() for name in ("final_state", "chunk_states", "squared_norms")}
    assert_agree(of_states, {name: expected[name] for name in of_states}, torch.float32)
    output["y"].float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "has_skip"), [(1, 1, True), (6, 3, True), (3, 1, False)])
def test_a_step(heads: int, groups: int, has_skip: bool, dtype: torch.dtype) -> None:
    inputs = random_inputs(2, 1, heads, groups, head_dim=70)
    if not has_skip:
        del inputs["D"]

    def step(leaves: Mapping[str, Tensor], backend: Any) -> Results:
        at_0 = [leaves[n] if n == "A_H" else leaves[n][:, 0] for n in list(leaves)[:5]]
        y, state = ssd_step(*at_0, leaves["initial_state"], D=leaves.get("D"), backend=backend)  # type: ignore[arg-type]
        return {"y": y, "state": state}

    expected = outputs_and_gradients(lambda leaves: step(leaves, "reference"), rounded(inputs, dtype))
    assert_agree(
        outputs_and_gradients(lambda leaves: step(leaves, "triton"), placed(inputs, dtype)), expected, dtype
    )


def test_a_step_does_not_change_the_state_it_is_given() -> None:
    inputs = placed(random_inputs(2, 1), torch.float32)
    before = inputs["initial_state"].clone()
    run(inputs, backend="triton")
    assert torch.equal(inputs["initial_state"], before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunks", "heads", "values"), [(1, 3, 5), (5, 2, 600), (70, 1, 3)])
def test_state_passing(chunks: int, heads: int, values: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.rand(2, chunks, heads, generator=generator, dtype=torch.float64)
    log_decay[0, chunks // 2, 0] = -1e5
    log_decay[1, chunks // 3, 0] = float("-inf")  # a slot that is wholly replaced
    inputs = {
        "update": torch.randn(2, chunks, heads, values, generator=generator, dtype=torch.float64),
        "log_decay": log_decay,
        "initial": torch.randn(2, heads, values, generator=generator, dtype=torch.float64),
    }
    ours = {n: t.to(DEVICE, dtype if n == "update" else torch.float32) for n, t in inputs.items()}

    def passing(leaves: Mapping[str, Tensor], backend: Any) -> Results:
        tensors = leaves.values()
        if backend == "triton" and chunks == 5:
            tensors = [strided(tensor) for tensor in tensors]
        entering, final = state_passing(*tensors, backend=backend)
        return {"entering": entering, "final": final}

    doubles = {name: tensor.cpu().double() for name, tensor in ours.items()}
    expected = outputs_and_gradients(lambda leaves: passing(leaves, "reference"), doubles)
    assert_agree(outputs_and_gradients(lambda leaves: passing(leaves, "triton"), ours), expected, dtype)


def test_an_initial_value_that_rows_share() -> None:
    """As the workspace's learned one: a view of stride 0."""
    update = torch.randn(2, 3, 2, 4, device=DEVICE)
    log_decay = -torch.rand(2, 3, 2, device=DEVICE)
    initial = torch.randn(2, 4, device=DEVICE)
    results = [
        state_passing(update, log_decay, initial.expand(2, -1, -1), backend=backend)
        for backend in ("triton", "reference")
    ]
    for name, actual, expected in zip(("entering", "final"), *results, strict=True):
        assert_agree({name: actual}, {name: expected.cpu()}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    for length in (1, 40):
        inputs = placed(random_inputs(2, length), dtype)
        assert_same_bits(lambda leaves: run(leaves, backend="triton", chunk_size=16), inputs)


def wide_space(size: int) -> Tensor:
    """So many float32 numbers in an address space of which only the pages that are touched exist."""
    without_reserve = 0x4000  # Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | without_reserve
    return torch.frombuffer(mmap.mmap(-1, 4 * size, flags=flags), dtype=torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it would need 12 GiB of memory that is really there")
def test_offsets_beyond_32_bits() -> None:
    """Rows 2^30 numbers apart."""
    apart = 1 << 30
    numbers = wide_space(3 * apart)
    inputs = placed(random_inputs(3, 18, 2), torch.float32)
    far = {}
    offset = 0
    for name in (*SEQUENCES, "dt_BLH", "initial_state"):
        tensor = inputs[name]
        view = numbers[offset:].as_strided(tensor.shape, (apart, *tensor.stride()[1:]))
        far[name] = view.copy_(tensor)
        offset += tensor[0].numel()
    for length in (1, 18):
        near, wide = (
            run(
                {n: t[:, :length] if n in (*SEQUENCES, "dt_BLH") else t for n, t in given.items()},
                backend="triton",
            )
            for given in (inputs, inputs | far)
        )
        assert all(torch.equal(near[name], wide[name]) for name in near)
    update = near["chunk_states"].flatten(3)
    log_decay = torch.zeros(update.shape[:3])
    far_update = numbers.as_strided(update.shape, (apart, *update.stride()[1:])).copy_(update)
    initial = inputs["initial_state"].flatten(2)
    for each, other in zip(
        state_passing(update, log_decay, initial, backend="triton"),
        state_passing(far_update, log_decay, initial, backend="triton"),
        strict=True,
    ):
        assert torch.equal(each, other)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it would need 10 GiB of memory that is really there")
def test_positions_far_apart_are_gathered() -> None:
    """Within a tile the kernels count in 32 bits: a view whose positions lie too far apart is copied first."""
    inputs = placed(random_inputs(1, 20, 2), torch.float32)
    apart = 1 << 27
    numbers = wide_space(20 * apart)
    x = inputs["x_BLHP"]
    far = numbers.as_strided(x.shape, (1, apart, *x.stride()[2:])).copy_(x)
    near, wide = (run(inputs | {"x_BLHP": each}, backend="triton") for each in (x, far))
    assert torch.equal(near["y"], wide["y"])


def test_float64_is_refused() -> None:
    inputs: dict[str, Any] = random_inputs(1, 5)
    with pytest.raises(ValueError, match="float64"):
        ssd(**inputs, backend="triton")
    single = {name: tensor.float() for name, tensor in inputs.items()} | {"dt_BLH": inputs["dt_BLH"]}
    mixed: dict[str, Any] = {name: tensor.to(DEVICE) for name, tensor in single.items()}
    with pytest.raises(ValueError, match="float64"):
        ssd(**mixed, backend="triton")
    update = torch.zeros(1, 2, 1, 3, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        state_passing(update, update[..., 0].double(), update[:, 0], backend="triton")


def test_second_derivatives_are_refused() -> None:
    for length in (1, 5):
        inputs = placed(random_inputs(1, length), torch.float32)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        (gradient,) = torch.autograd.grad(
            run(leaves, backend="triton")["y"].sin().sum(), leaves["x_BLHP"], create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
