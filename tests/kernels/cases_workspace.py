"""What the read of the workspace launches; sizes of the preset 1.6b unless said otherwise."""

from collections.abc import Callable

import torch

from hydra_lab.ops.workspace.kernels import workspace_read
from tests.kernels.compiling import forward_and_backward


def _read(
    dtype: torch.dtype,
    *,
    num_slots: int = 64,
    slot_size: int = 1024,
    chunk_size: int = 64,
    offset: torch.Tensor | None = None,
    autocast: bool = False,
) -> None:
    address = torch.rand(1, 100, num_slots)
    gate = torch.rand(1, 100, 1)
    slots = torch.randn(1, 3 + 100 // chunk_size, num_slots, slot_size).to(dtype)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return workspace_read(*inputs, chunk_size=chunk_size, offset=offset)

    forward_and_backward(run, address, gate, slots)


CASES: dict[str, Callable[[], None]] = {
    "bf16": lambda: _read(torch.bfloat16),
    "bf16, continued": lambda: _read(torch.bfloat16, offset=torch.tensor([3])),
    "bf16 by autocast": lambda: _read(torch.float32, autocast=True),
    "fp16": lambda: _read(torch.float16),
    "bf16, odd": lambda: _read(torch.bfloat16, num_slots=70, slot_size=200, chunk_size=70),
}

WGMMA: frozenset[str] = frozenset({"_read_kernel", "_address_gradient_kernel", "_slots_gradient_kernel"})
