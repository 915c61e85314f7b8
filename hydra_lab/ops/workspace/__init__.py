"""The read of the workspace: every token takes a weighted sum of the slots as they were when its chunk began.

Shape suffixes: B rows, L positions, C chunks, S slots, V size of a slot.
"""

from torch import Tensor

from hydra_lab.ops.backend import Backend, implementation
from hydra_lab.ops.checks import check_shape

__all__ = ["workspace_read"]


def workspace_read(
    address_BLS: Tensor,
    gate_BL1: Tensor,
    slots_BCSV: Tensor,
    *,
    chunk_size: int,
    offset: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`y_t = gate_t * sum over s of address[t, s] slots[chunk(t), s]`, `chunk(t) = (offset + t) // chunk_size`.

    Args:
        address_BLS: [B, L, S] weight of each slot for each token.
        gate_BL1: [B, L, 1] factor of each token.
        slots_BCSV: [B, C, S, V] slots that enter each chunk; at least as many chunks as the tokens touch.
        chunk_size: tokens per chunk.
        offset: [B] position of each row's first token inside its first chunk (0 .. chunk_size-1); None for 0.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        [B, L, V] in the dtype of `slots_BCSV`, or of autocast where that is on.

    Raises:
        ValueError: a shape or an option does not fit, or the backend cannot run this.
    """
    check_shape("slots_BCSV", slots_BCSV, (None, None, None, None), "[B, C, S, V]")
    num_rows, num_chunks, num_slots, _ = slots_BCSV.shape
    check_shape("address_BLS", address_BLS, (num_rows, None, num_slots), "[B, L, S]")
    length = address_BLS.shape[1]
    check_shape("gate_BL1", gate_BL1, (num_rows, length, 1), "[B, L, 1]")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if offset is not None:
        check_shape("offset", offset, (num_rows,), "[B]")
    if (
        num_chunks * chunk_size < length
    ):  # what the offsets add is not looked at: the device would have to be waited for
        raise ValueError(
            f"slots_BCSV holds {num_chunks} chunks of {chunk_size} tokens, too few for {length} tokens"
        )
    run = implementation("workspace_read", backend, slots_BCSV).workspace_read
    return run(address_BLS, gate_BL1, slots_BCSV, chunk_size=chunk_size, offset=offset)
