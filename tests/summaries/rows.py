"""Rows of a capture, drawn at random: shapes, types and fills as `hydra_lab.capture.layout` has them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 6,
    "vocab_size": 11,
    "moe_layers": [0, 2],
    "moe_num_experts": 4,
    "moe_chunk_size": 4,
    "attention_every": 3,
    "attention_window": 6,
    "attention_block_size": 4,
    "attention_selection": "token",
    "workspace_layers": [1, 4],
    "workspace_chunk_size": 4,
    "memory_layers": [3],
    "memory_num_keys": [3, 4],
    "ssm_chunk_size": 8,
}
DOMAINS = ("facts", "code", "prose")


def draw_rows(
    rng: np.random.Generator, num_samples: int, length: int = 19, shortest: int = 1
) -> dict[tuple[str, str], NDArray[Any]]:
    """Rows of `num_samples` samples of `shortest` to `length` tokens."""
    lengths = rng.integers(shortest, length + 1, size=num_samples)
    chunks, states = -(-length // 4), -(-length // 8)

    def real(count: int) -> NDArray[np.bool_]:
        size = {length: 1, chunks: 4, states: 8}[count]
        return np.arange(count) < -(-lengths // size)[:, None]

    def fill(array: NDArray[Any], axis: int) -> NDArray[Any]:
        value = {"f": np.nan, "u": -1, "i": -1}[array.dtype.kind]
        filled = np.moveaxis(array, axis, 1)
        filled[~real(array.shape[axis])] = value if array.dtype.kind != "u" else np.iinfo(array.dtype).max
        return array

    def share(*shape: int) -> NDArray[np.float16]:
        return rng.random((num_samples, *shape)).astype(np.float16)

    def spread(*shape: int) -> NDArray[np.float16]:
        return rng.dirichlet(np.ones(shape[-1]), size=(num_samples, *shape[:-1])).astype(np.float16)

    logits = rng.normal(size=(num_samples, 2, chunks, 4)).astype(np.float16)
    experts = np.argsort(-logits.astype(np.float32), axis=-1, kind="stable")[..., :2].astype(np.uint8)
    loss = rng.gamma(2.0, 1.0, size=(num_samples, length)).astype(np.float32)
    loss[:, 0] = np.nan
    return {
        ("tokens", "token"): fill(rng.integers(11, size=(num_samples, length)).astype(np.uint8), 1),
        ("tokens", "loss"): fill(loss, 1),
        ("tokens", "length"): lengths.astype(np.uint8),
        ("tokens", "domain"): rng.integers(3, size=num_samples).astype(np.uint8),
        ("routing", "experts"): fill(experts, 2),
        ("routing", "weights"): fill(spread(2, length, 2), 2),
        ("routing", "logits"): fill(logits, 2),
        ("attention", "blocks"): fill(
            rng.integers(-1, 3, size=(num_samples, 2, length, 2, 2)).astype(np.int16), 2
        ),
        ("mass", "mass"): fill(spread(2, length, 4, 3), 2),
        ("workspace", "write_address"): fill(share(2, length, 3), 2),
        ("workspace", "write_gate"): fill(share(2, chunks, 3), 2),
        ("workspace", "read_address"): fill(spread(2, length, 3), 2),
        ("workspace", "read_gate"): fill(share(2, length), 2),
        ("memory", "addresses"): fill(
            rng.integers(12, size=(num_samples, 1, length, 2, 3)).astype(np.uint8), 2
        ),
        ("memory", "weights"): fill(spread(1, length, 2, 3), 2),
        ("memory", "gate"): fill(share(1, length), 2),
        ("ssm", "norms"): fill(rng.random((num_samples, 6, states, 2)).astype(np.float32), 2),
        ("ssm", "decay"): fill(-share(6, length, 2), 2),
        ("paths", "share"): rng.random((num_samples, 6, 5)).astype(np.float32),
        ("paths", "cosine"): np.where(np.arange(5) == 3, np.nan, rng.random((num_samples, 6, 5))).astype(
            np.float32
        ),
    }


def take(rows: dict[tuple[str, str], NDArray[Any]], samples: slice) -> dict[tuple[str, str], NDArray[Any]]:
    """Some of the rows."""
    return {key: array[samples] for key, array in rows.items()}
