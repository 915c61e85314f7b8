"""What the device reaches at most: the rate of a large matrix product, and the bandwidth of a copy."""

import torch

from hydra_lab.bench.timing import take_turns

ROUNDS = 7


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product (8192 on a GPU, 1024 on a CPU), the best of a few rounds."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = take_turns({"matmul": lambda: left @ right}, device=device, rounds=ROUNDS, least_seconds=0.05)
    return 2 * size**3 / min(timing["matmul"].seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s read and written by a copy of 256 MiB, the best of a few rounds."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    timing = take_turns(
        {"copy": lambda: target.copy_(source)}, device=device, rounds=ROUNDS, least_seconds=0.05
    )
    return 2 * source.numel() * source.element_size() / min(timing["copy"].seconds)
