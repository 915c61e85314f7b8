"""Choosing a backend: by argument, by block, by configuration, by measurement; and refusing what cannot run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_lab.ops import backend as backends
from hydra_lab.ops import use_backend
from hydra_lab.ops.backend import (
    PACKAGES,
    current_backends,
    default_backend,
    fastest,
    implementation,
    measured_times,
)
from hydra_lab.ops.causal_conv import causal_conv
from tests.helpers import lively_model, random_ids

CPU = torch.zeros(1)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's process is: the kernel tests set the interpreter's variable for theirs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A measurement in which triton is the fastest for one operation and not for another."""
    path = tmp_path / "measured.json"
    times = {
        "ssd": {"torch": 9.0, "triton": 1.0, "mamba_ssm": 2.0},
        "chunk_moe": {"torch": 1.0, "triton": 2.0},
    }
    path.write_text(json.dumps({H100: {"milliseconds": times}}))
    monkeypatch.setattr(backends, "MEASURED", path)
    monkeypatch.setattr(backends, "device_name", lambda _device: H100)
    backends._measurements.cache_clear()
    yield path
    backends._measurements.cache_clear()


def on_a_gpu(dtype: torch.dtype = torch.float32) -> Any:
    """As much of a CUDA tensor as the choice looks at."""

    class Like:
        device = torch.device("cuda")

    like: Any = Like()
    like.dtype = dtype
    return like


def test_blocks_nest_and_an_argument_goes_before_them() -> None:
    assert current_backends(CPU)["ssd"] == "torch"
    with use_backend("reference"):
        assert set(current_backends(CPU).values()) == {"reference"}
        with use_backend(ssd="torch"):
            inner = current_backends(CPU)
            assert inner["ssd"] == "torch"
        assert implementation("ssd", None, CPU).__name__ == "hydra_lab.ops.ssd.reference"
        assert implementation("ssd", "torch", CPU).__name__ == "hydra_lab.ops.ssd.torch"
    assert implementation("ssd", None, CPU).__name__ == "hydra_lab.ops.ssd.torch"


def test_a_single_operation_keeps_the_others_choice() -> None:
    with use_backend("reference"), use_backend(chunk_moe="torch"):
        chosen = current_backends(CPU)
    assert chosen.pop("chunk_moe") == "torch"
    assert set(chosen.values()) == {"reference"}


def test_a_default_gives_way_to_a_block() -> None:
    with default_backend("reference"):
        assert current_backends(CPU)["ssd"] == "reference"
    with use_backend("torch"), default_backend("reference"):
        assert current_backends(CPU)["ssd"] == "torch"


def test_mamba_ssm_is_chosen_for_what_it_has() -> None:
    with use_backend("mamba_ssm"):
        chosen = current_backends(CPU)
    assert {operation for operation, backend in chosen.items() if backend == "mamba_ssm"} == {
        "ssd",
        "causal_conv",
    }


@pytest.mark.parametrize(
    ("arguments", "operations", "message"),
    [
        (("fast",), {}, "backend must be one of auto, torch, triton, mamba_ssm, reference, got 'fast'"),
        ((), {"ssd": "fast"}, "backend must be one of"),
        ((), {"convolution": "torch"}, "operation 'convolution' is not one of ssd"),
        ((), {"chunk_moe": "mamba_ssm"}, "mamba_ssm has no chunk_moe, only ssd, causal_conv"),
    ],
)
def test_a_wrong_block_is_refused(arguments: Any, operations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), use_backend(*arguments, **operations):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("operation", sorted(PACKAGES))
def test_triton_needs_a_gpu_and_says_so(operation: str) -> None:
    with pytest.raises(
        ValueError, match=r"'triton' cannot run .* it needs a CUDA device, and the tensors are on 'cpu'"
    ):
        implementation(operation, "triton", CPU)


def test_what_is_asked_for_is_not_replaced() -> None:
    x, weight = torch.zeros(1, 5, 3), torch.zeros(3, 4)
    for backend in ("triton", "mamba_ssm"):
        with pytest.raises(ValueError, match="cannot run causal_conv here"), use_backend(backend):
            causal_conv(x, weight, None)


def test_float64_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="it has no float64"):
        implementation("ssd", "triton", CPU.double())


def test_auto_takes_the_fastest_measured_backend_that_is_there(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_installed", lambda module: module == "triton")
    assert fastest("ssd", on_a_gpu()) == "triton"
    assert fastest("chunk_moe", on_a_gpu()) == "torch"
    assert fastest("causal_conv", on_a_gpu()) == "torch"  # not measured there
    assert fastest("ssd", on_a_gpu(torch.float64)) == "torch"
    assert fastest("ssd", CPU) == "torch"
    monkeypatch.setattr(backends, "_installed", lambda module: False)
    assert fastest("ssd", on_a_gpu()) == "torch"


def test_the_shipped_measurements_name_operations_and_backends() -> None:
    times = measured_times("cpu")
    assert set(times) == set(PACKAGES)
    for of_operation in times.values():
        assert set(of_operation) == {"torch", "reference"}
        assert all(time > 0 for time in of_operation.values())


def test_the_configuration_chooses_for_the_model_and_a_block_for_everyone() -> None:
    """A model that asks for the oracle agrees with one that does not, and runs the oracle, as a broken one shows."""
    model = lively_model()
    oracle = lively_model(ops_backend="reference")
    ids = random_ids(model.config, 1, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert (oracle(input_ids=ids).logits - expected).abs().max() <= 1e-4
        with pytest.raises(ValueError, match="needs a CUDA device"), use_backend("triton"):
            oracle(input_ids=ids)
        with pytest.raises(ValueError, match="needs a CUDA device"):
            lively_model(ops_backend="triton")
