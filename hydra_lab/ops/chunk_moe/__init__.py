"""Mixture of SwiGLU experts in which all tokens of a chunk use the same experts."""

from torch import Tensor, int64

from hydra_lab.ops.backend import Backend, implementation
from hydra_lab.ops.checks import assert_on_device, check_shape

__all__ = ["chunk_moe"]


def chunk_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    chunk_size: int,
    offset: Tensor | None = None,
    length: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Weighted sum of the outputs of the experts that each token's chunk chose.

    `y_t = sum_k weights[t, k] * w_down[e] (silu(g) * u)` with `[g; u] = w_gate_up[e] x_t`,
    `e = experts[chunk(t), k]` and `chunk(t) = (offset + t) // chunk_size`. With `chunk_size=1` this is the
    mixture of Mixtral (arXiv 2401.04088, section 2.1). An expert is computed only for the tokens of the chunks
    that chose it; an expert that nobody chose costs nothing and gets a zero gradient.

    Args:
        x: [B, L, D] input; a row's tokens start at index 0.
        experts: [B, C, K] int64 experts of each chunk, in 0 .. E-1. An expert listed twice counts twice.
        weights: [B, L, K] weight of each of them for each token.
        w_gate_up: [E, 2F, D] gate and up projections of each expert, gate first.
        w_down: [E, D, F] down projections.
        chunk_size: tokens per chunk.
        offset: [B] position of each row's first token inside its first chunk (0 .. chunk_size-1); None for 0.
        length: [B] number of tokens of each row, at most L; the output is 0 beyond them. None for L.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        [B, L, D], in the dtype of `x`.

    Raises:
        ValueError: a shape, an expert or an option does not fit, or `experts` ends before the last token's chunk. On
            a CUDA device the values of `experts`, `offset` and `length` are checked there, without waiting for it: a
            wrong one stops the device with an assertion, and the next call that waits for it raises RuntimeError.
    """
    check_shape("x", x, (None, None, None), "[B, L, D]")
    num_rows, num_positions, hidden_size = x.shape
    check_shape("experts", experts, (num_rows, None, None), "[B, C, K]")
    check_shape("weights", weights, (num_rows, num_positions, experts.shape[2]), "[B, L, K]")
    check_shape("w_gate_up", w_gate_up, (None, None, hidden_size), "[E, 2F, D]")
    num_experts, expert_size = w_gate_up.shape[0], w_gate_up.shape[1] // 2
    check_shape("w_down", w_down, (num_experts, hidden_size, expert_size), "[E, D, F]")
    if x.numel() == 0 or experts.numel() == 0:
        raise ValueError(f"x and experts must not be empty, got {list(x.shape)} and {list(experts.shape)}")
    if w_gate_up.shape[1] % 2:
        raise ValueError(f"w_gate_up must hold as many gate as up rows, got {w_gate_up.shape[1]} together")
    if experts.dtype != int64:
        raise ValueError(f"experts must be int64, got {experts.dtype}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if offset is None:
        offset = experts.new_zeros(num_rows)
    check_shape("offset", offset, (num_rows,), "[B]")
    if length is None:
        length = experts.new_full((num_rows,), num_positions)
    check_shape("length", length, (num_rows,), "[B]")
    _check_values(experts, offset, length, num_experts=num_experts, chunk_size=chunk_size)
    run = implementation("chunk_moe", backend, x).chunk_moe
    return run(x, experts, weights, w_gate_up, w_down, chunk_size=chunk_size, offset=offset, length=length)


def _check_values(
    experts: Tensor, offset: Tensor, length: Tensor, *, num_experts: int, chunk_size: int
) -> None:
    """Raise, or on a CUDA device assert there, unless every expert exists and every token's chunk has experts."""
    num_chunks = experts.shape[1]
    end = (offset + length).max()
    lowest, highest = experts.aminmax()
    if experts.is_cuda:
        assert_on_device(end <= num_chunks * chunk_size, "experts ends before the last token's chunk")
        assert_on_device(
            (lowest >= 0) & (highest < num_experts), f"experts must lie in 0 .. {num_experts - 1}"
        )
        return
    if int(end) > num_chunks * chunk_size:
        last_chunk = (int(end) - 1) // chunk_size
        raise ValueError(f"experts holds {num_chunks} chunks, but the tokens reach chunk {last_chunk}")
    if int(lowest) < 0 or int(highest) >= num_experts:
        raise ValueError(f"experts must lie in 0 .. {num_experts - 1}, got {int(lowest)} .. {int(highest)}")
