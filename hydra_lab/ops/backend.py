"""Which implementation runs an operation: named by the caller, by a `use_backend` block, or chosen by measurement.

| backend     | module of the operation | runs on                                                         |
|-------------|-------------------------|-----------------------------------------------------------------|
| `torch`     | `torch.py`              | any device                                                      |
| `triton`    | `kernels.py`            | a CUDA device, or a CPU with `TRITON_INTERPRET=1` (tests only)   |
| `mamba_ssm` | `mamba_ssm.py`          | a CUDA device with mamba-ssm and causal-conv1d installed         |
| `reference` | `reference.py`          | any device, slowly: the oracle, never chosen unless named        |

`auto` takes, among the backends that can do what is asked, the one that `measured.json` names as the fastest on this
device; `hydra-lab bench kernels --record` writes that file. A device that nobody has measured uses `torch`.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton", "mamba_ssm", "reference"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)

PACKAGES = {
    "ssd": "ssd",
    "state_passing": "ssd",
    "causal_conv": "causal_conv",
    "sparse_attention": "sparse_attention",
    "select_blocks": "sparse_attention",
    "chunk_moe": "chunk_moe",
    "product_key": "product_key",
    "workspace_read": "workspace",
}
"""Package of each operation that a backend can be chosen for."""

MAMBA_OPERATIONS = ("ssd", "causal_conv")
"""Operations that mamba-ssm (with causal-conv1d) has."""

MEASURED = Path(__file__).with_name("measured.json")

_MODULES = {"torch": "torch", "triton": "kernels", "mamba_ssm": "mamba_ssm", "reference": "reference"}

_asked: ContextVar[dict[str, Backend] | None] = ContextVar("hydra_lab_backend", default=None)


@contextmanager
def use_backend(backend: Backend | None = None, /, **operations: Backend) -> Generator[None]:
    """Within the block, run operations on this backend, unless a call names its own.

    Blocks nest, and the innermost counts. The choice holds for this thread only. A backward pass runs on the backend of
    its forward pass, wherever it is called; under gradient checkpointing, which runs the forward pass again, call
    `backward` inside the block too, or set `HydraConfig.ops_backend`.

    Args:
        backend: for all operations; `mamba_ssm` for the two that it has, the others stay as they were. None leaves all
            as they were.
        operations: backend of single operations, such as `ssd="mamba_ssm"`.

    Raises:
        ValueError: there is no such backend or operation, or the operation has no such backend.
    """
    token = _asked.set(_with_choices(_asked.get() or {}, backend, operations))
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def default_backend(backend: Backend) -> Generator[None]:
    """Like `use_backend`, for a choice that gives way to any `use_backend` block around it."""
    if _asked.get() is not None or backend == "auto":
        yield
        return
    with use_backend(backend):
        yield


def _with_choices(
    earlier: dict[str, Backend], backend: Backend | None, operations: dict[str, Backend]
) -> dict[str, Backend]:
    chosen = dict(earlier)
    if backend is not None:
        _check_name(backend)
        affected = MAMBA_OPERATIONS if backend == "mamba_ssm" else tuple(PACKAGES)
        chosen |= dict.fromkeys(affected, backend)
    for operation, choice in operations.items():
        if operation not in PACKAGES:
            raise ValueError(f"operation {operation!r} is not one of {', '.join(PACKAGES)}")
        _check_name(choice)
        if choice == "mamba_ssm" and operation not in MAMBA_OPERATIONS:
            raise ValueError(f"mamba_ssm has no {operation}, only {', '.join(MAMBA_OPERATIONS)}")
        chosen[operation] = choice
    return chosen


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def implementation(operation: str, backend: Backend | None, like: Tensor) -> ModuleType:
    """The module that runs `operation`.

    Args:
        operation: a key of `PACKAGES`.
        backend: what the caller named; None for what the innermost `use_backend` says, else `auto`.
        like: a tensor on the device and in the dtype of the computation.

    Raises:
        ValueError: the backend is unknown, or cannot run this operation on such a tensor.
    """
    if backend is None:
        backend = (_asked.get() or {}).get(operation, "auto")
    _check_name(backend)
    if backend == "auto":
        backend = fastest(operation, like)
    elif (reason := unavailable(operation, backend, like.device, like.dtype)) is not None:
        raise ValueError(f"backend {backend!r} cannot run {operation} here: {reason}")
    return importlib.import_module(f"hydra_lab.ops.{PACKAGES[operation]}.{_MODULES[backend]}")


def fastest(operation: str, like: Tensor) -> Backend:
    """What `auto` takes for `operation` on the device and in the dtype of `like`."""
    if like.device.type != "cuda":
        return "torch"  # the only one that runs there at speed
    milliseconds = measured_times(device_name(like.device)).get(operation, {})
    able = {
        backend: time
        for backend, time in milliseconds.items()
        if backend in BACKENDS and unavailable(operation, backend, like.device, like.dtype) is None
    }
    return cast(Backend, min(able, key=lambda backend: able[backend])) if able else "torch"


def current_backends(like: Tensor) -> dict[str, Backend]:
    """What each operation would run on now, for a tensor on the device and in the dtype of `like`."""
    asked = _asked.get() or {}
    chosen: dict[str, Backend] = {}
    for operation in PACKAGES:
        backend = asked.get(operation, "auto")
        chosen[operation] = fastest(operation, like) if backend == "auto" else backend
    return chosen


def device_name(device: torch.device) -> str:
    """What `measured.json` calls a device: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measured_times(device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward by operation and backend, measured side by side; empty if not measured."""
    return _measurements().get(device, {}).get("milliseconds", {})


@cache
def _measurements() -> dict[str, Any]:
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `operation` on a device and in a dtype; None where it can."""
    if backend in ("torch", "reference"):
        return None
    if backend == "mamba_ssm" and operation not in MAMBA_OPERATIONS:
        return f"mamba_ssm has only {', '.join(MAMBA_OPERATIONS)}"
    if dtype == torch.float64:
        return "it has no float64"
    if device.type != "cuda" and not (backend == "triton" and interpreting()):
        return f"it needs a CUDA device, and the tensors are on {device.type!r}"
    wanted = {"triton": "triton", "mamba_ssm": "causal_conv1d" if operation == "causal_conv" else "mamba_ssm"}
    if not _installed(wanted[backend]):
        return f"{wanted[backend]} is not installed"
    return None


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
