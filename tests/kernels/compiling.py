"""Compile every kernel that an operation launches for an H100 (sm_90), on a machine without a GPU.

Triton's driver is replaced by one that only says which GPU it would be, and a launch by a compilation: what is compiled
is exactly what the library would launch, with its types, block sizes and number of warps. Results are garbage, which no
wrapper may look at. Run as a program (the kernels must be imported without the interpreter):

    python -m tests.kernels.compiling ssd

prints a JSON list of `Compiled`.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partialmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

CAPABILITY = 90


@dataclass(frozen=True)
class Compiled:
    """What came of one kernel.

    Attributes:
        kernel: name of the function.
        case: label of the call that launched it.
        wgmma: whether it uses Hopper's warpgroup matrix instructions.
        registers: per thread.
        spilled: bytes of local memory per thread, which is where registers go that do not fit.
        shared: bytes of shared memory.
        warps: per program.
    """

    kernel: str
    case: str
    wgmma: bool
    registers: int
    spilled: int
    shared: int
    warps: int


class _NoGPU:
    """The least that a launch asks of a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Within the block every launch compiles only; yields the list of compiled kernels, which grows."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del grid, warmup
        kernel = run(self, *args, grid=None, warmup=True, **kwargs)
        if all(kernel is not earlier for earlier in compiled):
            compiled.append(kernel)
        return kernel

    driver.set_active(_NoGPU())  # pyright: ignore[reportArgumentType]
    JITFunction.run = partialmethod(compile_only)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None  # pyright: ignore[reportPrivateUsage]


def describe(kernel: Any, case: str) -> Compiled:
    """Registers and spills of a compiled kernel, read off its machine code."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Compiled(
        kernel=kernel.metadata.name,
        case=case,
        wgmma="wgmma" in kernel.asm["ptx"],
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
    )


def forward_and_backward(run: Callable[..., Any], *leaves: torch.Tensor) -> None:
    """Call `run` on fresh leaves and send a gradient back through all its float results."""
    leaves = tuple(leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves)
    outputs = run(*leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    loss = sum(out.double().sum() for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad)
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def compile_operation(operation: str) -> list[Compiled]:
    """Compile what `operation` launches in every case of `tests.kernels.cases_<operation>`."""
    cases: dict[str, Callable[[], None]] = import_module(f"tests.kernels.cases_{operation}").CASES
    found: list[Compiled] = []
    for case, call in cases.items():
        with compiling() as kernels:
            call()
        found += [describe(kernel, case) for kernel in kernels]
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print(json.dumps([asdict(compiled) for compiled in compile_operation(sys.argv[1])], indent=1))
