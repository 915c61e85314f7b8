"""What a measurement was made with: hardware, versions, commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "hydra-lab", "torch", "triton", "transformers", "nnsight", "mamba-ssm", "causal-conv1d", "flash-linear-attention",
)  # fmt: skip


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, as a result file carries them.

    Returns:
        `device` (a GPU's name, or "cpu"), `hardware`, `versions` (null where not installed), `commit` (null outside a
        checkout) and `uncommitted` (whether the checkout had changes).
    """
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_bytes"] = properties.total_memory
        hardware["multiprocessors"] = properties.multi_processor_count
    commit = _git("rev-parse", "HEAD")
    return {
        "device": hardware.get("gpu", device.type),
        "hardware": hardware,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": commit,
        "uncommitted": None
        if commit is None
        else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the library's checkout; None where it is none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
