"""Every kernel compiles for an H100 without one, on tensor cores where it should, and keeps its registers."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.kernels.compiling import Compiled

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = sorted(path.stem.removeprefix("cases_") for path in Path(__file__).parent.glob("cases_*.py"))


def compiled_kernels(operation: str) -> list[Compiled]:
    """What the operation's cases launch, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", operation]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Compiled(**each) for each in json.loads(done.stdout)]


def test_every_operation_with_kernels_is_compiled() -> None:
    with_kernels = {path.parent.name for path in (ROOT / "hydra_lab" / "ops").glob("*/kernels.py")}
    assert set(OPERATIONS) == with_kernels


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_compile_for_an_h100(operation: str) -> None:
    kernels = compiled_kernels(operation)
    assert kernels
    spilled = [kernel for kernel in kernels if kernel.spilled > 0]
    assert not spilled, spilled
    expected: frozenset[str] = import_module(f"tests.kernels.cases_{operation}").WGMMA
    without = [kernel for kernel in kernels if kernel.kernel in expected and not kernel.wgmma]
    assert not without, without
    assert expected <= {kernel.kernel for kernel in kernels}, (
        "a kernel that was to be checked is not launched"
    )
