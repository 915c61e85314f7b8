"""Summary of the product-key memory: which rows are read, by whom and how strongly, and the gate.

The functions below take the arrays of one block, so that `hydra_lab.metrics` counts a few recorded samples by the same
code.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries.arrays import (
    SHARE_STEPS,
    Batch,
    Samples,
    count,
    no_contexts,
    share_steps,
    sum_by_domain,
    valid_mask,
    weigh,
)
from hydra_lab.summaries.fields import Arrays, Field, Fields, contexts_fields

MOST_ROW_CELLS = 2**22
"""Arrays by domain or head are kept where they have no more entries per block than this."""

NUM_ROW_CONTEXTS = 3
"""Contexts kept of each row."""

_TOKENS_AT_ONCE = 2**16
_MOST = f"kept up to {MOST_ROW_CELLS:,} entries per block"

FIELDS: Fields = {
    "weight": Field(("layer", "row"), "sum of the read weights that fell on the row; a token spreads 1 per head"),
    "reads": Field(("layer", "row"), "reads (token, head, k) of the row"),
    "weight_by_domain": Field(("layer", "domain", "row"), f"`weight` by the token's domain; {_MOST}"),
    "reads_by_domain": Field(("layer", "domain", "row"), f"`reads` by the token's domain; {_MOST}"),
    "weight_by_head": Field(("layer", "head", "row"), f"`weight` by the head that reads; {_MOST}"),
    "reads_by_head": Field(("layer", "head", "row"), f"`reads` by the head that reads; {_MOST}"),
    "gate_sum": Field(("layer", "domain"), "sum over samples of the sample's mean gate beta"),
    "gate_square": Field(("layer", "domain"), "sum over samples of the square of that mean"),
    "gate_histogram": Field(("layer", "domain", "share"), "tokens by their gate beta, in thousandths (0 .. 1000)"),
    **contexts_fields("context", ("layer", "row"), "the read weight that one head put on the row"),
}  # fmt: skip


def summarize(batch: Batch) -> Arrays:
    """The arrays of `FIELDS`."""
    addresses = batch["memory", "addresses"]
    num_rows = int(np.prod(batch.config["memory_num_keys"]))
    weights, gate = batch["memory", "weights"], batch["memory", "gate"]
    blocks = [
        count_reads(addresses[:, y], weights[:, y], batch.samples, num_rows)
        | count_gates(gate[:, y], batch.samples)
        | _contexts(addresses[:, y], weights[:, y], batch.samples, num_rows)
        for y in range(addresses.shape[1])
    ]
    return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


def count_reads(
    addresses_NLHK: NDArray[Any], weights_NLHK: NDArray[Any], samples: Samples, num_rows: int
) -> Arrays:
    """`weight` and `reads` of one block: whole, by domain and by head (without the axis `layer`)."""
    num_positions, num_heads = addresses_NLHK.shape[1:3]
    groups = {"": 1, "_by_domain": samples.num_domains, "_by_head": num_heads}
    shapes = {by: (size, num_rows) for by, size in groups.items()}
    kept = {by: shape for by, shape in shapes.items() if by == "" or shape[0] * num_rows <= MOST_ROW_CELLS}
    weight = {by: np.zeros(shape) for by, shape in kept.items()}
    reads = {by: np.zeros(shape, dtype=np.int64) for by, shape in kept.items()}
    mask_NL = valid_mask(samples.length, num_positions)
    for rows in _slices(len(samples.length), num_positions):  # counting widens its input: not all at once
        mask = mask_NL[rows]
        address_MHK = addresses_NLHK[rows][mask].astype(np.int64)
        weight_MHK = weights_NLHK[rows][mask].astype(np.float64)
        domain_M = np.broadcast_to(samples.domain[rows][:, None], mask.shape)[mask]
        part = {
            "": np.zeros((1, 1, 1), dtype=np.int64),
            "_by_domain": domain_M[:, None, None],
            "_by_head": np.arange(num_heads)[:, None],
        }
        for by, shape in kept.items():
            cell_MHK = part[by] * num_rows + address_MHK
            weight[by] += weigh(cell_MHK, weight_MHK, shape[0] * num_rows).reshape(shape)
            reads[by] += count(cell_MHK, shape[0] * num_rows).reshape(shape)
    arrays = {f"weight{by}": array for by, array in weight.items()}
    arrays |= {f"reads{by}": array for by, array in reads.items()}
    return arrays | {"weight": weight[""][0], "reads": reads[""][0]}


def count_gates(gate_NL: NDArray[Any], samples: Samples) -> Arrays:
    """`gate_sum`, `gate_square` and `gate_histogram` of one block (without the axis `layer`)."""
    mask_NL = valid_mask(samples.length, gate_NL.shape[1])
    gate_NL = np.where(mask_NL, gate_NL, 0.0).astype(np.float64)
    mean_N = gate_NL.sum(axis=1) / np.maximum(samples.length, 1)
    domain_M = np.broadcast_to(samples.domain[:, None], mask_NL.shape)[mask_NL]
    steps = SHARE_STEPS + 1
    histogram = count(domain_M * steps + share_steps(gate_NL[mask_NL]), samples.num_domains * steps)
    return {
        "gate_sum": sum_by_domain(mean_N, samples),
        "gate_square": sum_by_domain(mean_N**2, samples),
        "gate_histogram": histogram.reshape(samples.num_domains, steps),
    }


def _contexts(
    addresses_NLHK: NDArray[Any], weights_NLHK: NDArray[Any], samples: Samples, num_rows: int
) -> Arrays:
    """The best contexts of each row of one block, found by sorting reads packed into 64 bits each."""
    num_samples, num_positions, num_heads, num_choices = addresses_NLHK.shape
    mask_NL = valid_mask(samples.length, num_positions)
    sample_M, position_M = np.nonzero(mask_NL)
    per_token = num_heads * num_choices
    address = addresses_NLHK[mask_NL].ravel().astype(np.uint64)
    # the bits of a non-negative float16 sort like the number; complemented, the largest comes first
    falling = np.uint64(0xFFFF) - weights_NLHK[mask_NL].ravel().astype(np.float16).view(np.uint16)
    sample = np.repeat(sample_M, per_token).astype(np.uint64)
    position = np.repeat(position_M, per_token).astype(np.uint64)
    sample_bits, position_bits = (max(1, int(size - 1).bit_length()) for size in (num_samples, num_positions))
    assert num_rows.bit_length() + 16 + sample_bits + position_bits <= 64

    key = _pack((address, 0), (sample, sample_bits), (falling, 16), (position, position_bits))
    key.sort()
    own, falling, position = _unpack(key, sample_bits, 16, position_bits)
    first = np.append(True, own[1:] != own[:-1])[: len(own)]  # the best read of each row by each sample
    own, falling, position = own[first], falling[first], position[first]
    address, sample = _unpack(own, 0, sample_bits)
    key = _pack((address, 0), (falling, 16), (sample, sample_bits), (position, position_bits))
    key.sort()
    address, falling, sample, position = _unpack(key, 0, 16, sample_bits, position_bits)

    begins = np.flatnonzero(np.append(True, address[1:] != address[:-1])[: len(address)])
    rank = np.arange(len(address)) - np.repeat(begins, np.diff(np.append(begins, len(address))))
    kept = rank < NUM_ROW_CONTEXTS
    place = (address[kept].astype(np.int64), rank[kept])
    score_RM, sample_RM, position_RM = no_contexts(num_rows, NUM_ROW_CONTEXTS)
    score_RM[place] = (np.uint64(0xFFFF) - falling[kept]).astype(np.uint16).view(np.float16)
    sample_RM[place] = samples.first + sample[kept].astype(np.int64)
    position_RM[place] = position[kept]
    return {"context_score": score_RM, "context_sample": sample_RM, "context_position": position_RM}


def _pack(*parts: tuple[NDArray[np.uint64], int]) -> NDArray[np.uint64]:
    """The parts side by side, the first in the highest bits; each with its number of bits (the first's is free)."""
    packed = parts[0][0].copy()
    for part, bits in parts[1:]:
        packed = (packed << np.uint64(bits)) | part
    return packed


def _unpack(packed: NDArray[np.uint64], *bits: int) -> list[NDArray[np.uint64]]:
    """The parts of `_pack`; `bits` of each, the first's ignored: it has what the others leave."""
    parts: list[NDArray[np.uint64]] = []
    for size in reversed(bits[1:]):
        parts.append(packed & np.uint64((1 << size) - 1))
        packed = packed >> np.uint64(size)
    return [packed, *reversed(parts)]


def _slices(num_samples: int, num_positions: int) -> list[slice]:
    step = max(1, _TOKENS_AT_ONCE // num_positions)
    return [slice(start, start + step) for start in range(0, num_samples, step)]
