"""The kernels of sparse attention against the dense oracle in float64."""

import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops.sparse_attention import block_means, kernels, select_blocks, sparse_attention
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

WINDOW, BLOCK = 12, 8
OPTIONS: dict[str, Any] = {"window": WINDOW, "block_size": BLOCK}


def problem(
    length: int,
    *,
    heads: tuple[int, int] = (2, 1),
    rows: int = 1,
    head_size: int = 5,
    window: int = WINDOW,
    block_size: int = BLOCK,
    num_selected: int = 3,
    offsets: bool = False,
    spare: int = 3,
    tiled: bool = False,
) -> dict[str, Any]:
    """Random arguments of `sparse_attention`, in float64; NaN past the last query of each row.

    The blocks of each query are chosen at random, or are alike for all queries of a block if `tiled`: repeated ones,
    ones that overlap the window, current, future and missing ones among each other.
    """
    generator = torch.Generator().manual_seed(length)
    start = torch.tensor([37, 0, 90][:rows]) if offsets else None
    num_keys = length + spare + (90 if offsets else 0)
    q = torch.randn(rows, length, heads[0], head_size, generator=generator, dtype=torch.float64)
    k, v = (
        torch.randn(rows, num_keys, heads[1], head_size, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    num_choices = -(-length // block_size) if tiled else length
    blocks = torch.randint(
        -1, num_keys // block_size + 3, (rows, num_choices, heads[1], num_selected), generator=generator
    )
    if num_selected > 2:
        blocks[..., 2] = blocks[..., 0]
    if tiled:
        blocks = blocks.repeat_interleave(block_size, dim=1)[:, :length]
    for row in range(rows):
        end = length + (0 if start is None else int(start[row]))
        k[row, end:] = v[row, end:] = torch.nan
    return {"q": q, "k": k, "v": v, "blocks": blocks} | ({} if start is None else {"start": start})


def run(inputs: Mapping[str, Any], **options: Any) -> Results:
    return sparse_attention(**inputs, mass=True, **OPTIONS | options)._asdict()


def expected_results(inputs: Mapping[str, Tensor], dtype: torch.dtype, **options: Any) -> Results:
    """The oracle's outputs and gradients for the values that `dtype` can hold."""
    rounded = {
        name: tensor.to(dtype).double() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    return outputs_and_gradients(lambda given: run(given, backend="reference", **options), rounded)


def check(inputs: Mapping[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    expected = expected_results(inputs, dtype, **options)
    actual = outputs_and_gradients(
        lambda given: run(given, backend="triton", **options), placed(inputs, dtype)
    )
    assert actual["y"].dtype == dtype and actual["mass"].dtype == torch.float32
    torch.testing.assert_close(actual["mass"].sum(-1), torch.ones_like(actual["mass"][..., 0]))
    assert_agree(actual, expected, dtype)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tiles of float32, and in the interpreter, to which tf32 is float32, those of the tensor cores too."""
    if request.param and DEVICE == "cuda":
        pytest.skip("on a GPU bfloat16 has these tiles, and tf32 would not meet the tolerance of float32")
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("tiles")
def test_equals_the_reference(length: int, dtype: torch.dtype) -> None:
    if length == 500:
        inputs = problem(length, heads=(1, 1), num_selected=2, block_size=64, tiled=True)
        check(inputs, dtype, window=70, block_size=64)
    else:
        check(problem(length), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (40, {"heads": (3, 3), "head_size": 16}),
        (40, {"heads": (3, 1), "window": 1}),
        (40, {"heads": (4, 2), "rows": 2, "num_selected": 0}),
        (70, {"heads": (1, 1), "block_size": 4, "window": 3, "num_selected": 4, "tiled": True}),
        (130, {"heads": (1, 1), "block_size": 20, "window": 64, "head_size": 33}),
        (140, {"heads": (1, 1), "block_size": 64, "window": 8}),
        (150, {"heads": (1, 1), "block_size": 96, "window": 20, "num_selected": 1}),
        (80, {"window": 75}),
        (80, {"window": 500}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
@pytest.mark.usefixtures("tiles")
def test_sizes(length: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {name: options[name] for name in ("window", "block_size") if name in options}
    check(problem(length, **options), dtype, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 50])
@pytest.mark.usefixtures("tiles")
def test_rows_that_start_anywhere(length: int, dtype: torch.dtype) -> None:
    check(problem(length, rows=3, heads=(1, 1), offsets=True), dtype)


@pytest.mark.usefixtures("tiles")
def test_popular_blocks_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink's gradient comes from several programs, as it does where a block is listed by many tiles."""
    monkeypatch.setattr(kernels, "_PIECE", 1)
    check(problem(210, heads=(1, 1), num_selected=1), torch.float32)


def test_tiles_that_selected_alike() -> None:
    inputs = problem(140, heads=(2, 1), spare=0)
    means = block_means(inputs["k"], block_size=16)
    options: dict[str, Any] = {"window": 20, "block_size": 16}
    first = inputs["q"][:, ::16]
    blocks, _ = select_blocks(first, means, num_selected=2, serves=16, **options)
    inputs["blocks"] = blocks.repeat_interleave(16, dim=1)[:, :140]
    check(inputs, torch.float32, **options)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    inputs = problem(65, head_size=8)
    check(
        inputs | {"q": inputs["q"].sign() * 50, "k": inputs["k"].nan_to_num(nan=1e30).round()}, torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "options",
    [
        {"heads": (3, 1)},
        {"heads": (2, 2), "block_size": 4, "window": 70},
        {"block_size": 96, "window": 5, "num_selected": 1},
        {"num_selected": 0},
        {"window": 1000},
    ],
)
def test_a_step_equals_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    """One query per row without gradients, over a cache whose rest is garbage."""
    inputs = problem(1, rows=3, offsets=True, **options)
    sizes = {name: options[name] for name in ("window", "block_size") if name in options}
    with torch.no_grad():
        actual = run(placed(inputs, dtype), backend="triton", **sizes)
    expected = expected_results(inputs, dtype, **sizes)
    assert_agree(actual, {name: expected[name] for name in actual}, dtype)


@pytest.mark.parametrize("window", [200, 2**31 - 1, 2**40])
def test_a_window_wider_than_the_keys_sees_them_all(window: int) -> None:
    check(problem(70, rows=3, offsets=True), torch.float32, window=window)


def test_steps_equal_the_whole() -> None:
    inputs = placed(problem(60, heads=(4, 2)), torch.float32)
    whole = run(inputs, backend="triton")
    positions = torch.tensor([0, 3, WINDOW, 59], device=DEVICE)
    step = {
        "q": inputs["q"][0, positions, None],
        "k": inputs["k"].expand(4, -1, -1, -1),
        "v": inputs["v"].expand(4, -1, -1, -1),
        "blocks": inputs["blocks"][0, positions, None],
        "start": positions,
    }
    steps = run(step, backend="triton")
    assert_agree(
        steps, {name: part[0, positions, None].double().cpu() for name, part in whole.items()}, torch.float32
    )


def test_without_the_mass() -> None:
    inputs = placed(problem(20), torch.float32)
    asked = sparse_attention(**inputs, **OPTIONS, backend="triton", mass=True)
    silent = sparse_attention(**inputs, **OPTIONS, backend="triton")
    assert silent.mass is None and torch.equal(asked.y, silent.y)


def test_any_strides() -> None:
    inputs = placed(problem(30, heads=(2, 2)), torch.float32)
    step = {name: tensor[:, :1] if name in ("q", "blocks") else tensor for name, tensor in inputs.items()}
    for given in (inputs, step):
        results = [
            outputs_and_gradients(lambda x: run(x, backend="triton"), x)
            for x in (given, {name: strided(tensor) for name, tensor in given.items()})
        ]
        for name, tensor in results[0].items():
            assert torch.equal(tensor, results[1][name]), name
    expanded = inputs["q"][:, :, :1].expand(-1, -1, 2, -1)  # two heads in one place
    y = run(inputs | {"q": expanded}, backend="triton")["y"]
    assert torch.equal(y, run(inputs | {"q": expanded.contiguous()}, backend="triton")["y"])


def test_same_bits_twice() -> None:
    """Also where the gradient of a popular block is shared out, and in a step."""
    for inputs in (problem(40), problem(300, num_selected=1), problem(1, rows=3, offsets=True)):
        assert_same_bits(lambda given: run(given, backend="triton"), placed(inputs, torch.float32))


def test_mixed_precision() -> None:
    inputs = placed(problem(20), torch.float32)
    given = inputs | {"k": inputs["k"].half()}
    actual = outputs_and_gradients(lambda x: run(x, backend="triton"), given)
    expected = expected_results({name: tensor.cpu() for name, tensor in given.items()}, torch.float64)
    assert actual["y"].dtype == torch.float32 and actual["gradient of k"].dtype == torch.float16
    assert_agree({"y": actual["y"]}, {"y": expected["y"]}, torch.float32)
    assert_agree(actual, expected, torch.bfloat16)  # the gradient of k is rounded


@pytest.mark.parametrize("name", ["q", "v"])
def test_float64_is_refused(name: str) -> None:
    inputs = placed(problem(3), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        run(inputs | {name: inputs[name].double()}, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it would need 30 GiB of memory that is really there")
def test_offsets_beyond_32_bits() -> None:
    """Tokens 2^26 numbers apart, in an address space of which only the pages that are touched exist."""
    apart, inputs = 1 << 26, placed(problem(40, heads=(1, 1), spare=0), torch.float32)
    without_reserve = 0x4000  # Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | without_reserve
    numbers = torch.frombuffer(mmap.mmap(-1, 4 * 40 * apart, flags=flags), dtype=torch.float32)
    far = {
        name: numbers[10 * place :]
        .as_strided(inputs[name].shape, (40 * apart, apart, 5, 1))
        .copy_(inputs[name])
        for place, name in enumerate(("q", "k", "v"))
    }
    near, wide = (
        outputs_and_gradients(lambda x: run(x, backend="triton"), given) for given in (inputs, inputs | far)
    )
    assert all(torch.equal(near[name], wide[name]) for name in near)
    start = torch.tensor([39])
    steps = [
        run(
            given | {"q": given["q"][:, -1:], "blocks": given["blocks"][:, -1:], "start": start},
            backend="triton",
        )
        for given in (inputs, inputs | far)
    ]
    assert torch.equal(steps[0]["y"], steps[1]["y"])
