"""Every kernel compiles for an H100 without one, on tensor cores where it should, and keeps its registers."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from tests.kernels.compiling import Compiled

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = sorted(path.stem.removeprefix("cases_") for path in Path(__file__).parent.glob("cases_*.py"))


@cache
def compiled_kernels(operation: str) -> list[Compiled]:
    """What the operation's cases launch, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", operation]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Compiled(**each) for each in json.loads(done.stdout)]


def launched_kernels() -> set[str]:
    """Names of the kernels that the operations launch, `name[grid](...)`, as their source says."""
    paths = sorted((ROOT / "hydra_lab" / "ops").rglob("*kernels.py"))
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    jitted = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }
    launched = [
        ast.unparse(node.func.value).rsplit(".")[-1]
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    return jitted & set(launched)


def test_every_kernel_that_is_launched_is_compiled() -> None:
    compiled = {kernel.kernel for operation in OPERATIONS for kernel in compiled_kernels(operation)}
    missing = launched_kernels() - compiled
    assert not missing, f"no case of tests/kernels/cases_*.py launches {', '.join(sorted(missing))}"


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
