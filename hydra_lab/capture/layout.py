"""The arrays of a capture, and how a recorded batch becomes their rows.

Every array has `sample` as its first axis. The dims of the groups (sizes for windows of `sequence_length` tokens):

    tokens     token, mask, loss [sample, position]; length, domain, document, offset [sample]
    routing    experts [sample, layer, chunk, rank]; weights [sample, layer, position, rank];
               logits [sample, layer, chunk, expert]
    attention  blocks, scores [sample, layer, position, head, k]
    mass       mass [sample, layer, position, query_head, kind]: share of the attention that each of `KINDS` received;
               large, and so captured only where it is asked for by name
    workspace  write_address, read_address [sample, layer, position, slot]; write_gate [sample, layer, chunk, slot];
               read_gate [sample, layer, position]
    memory     addresses, weights [sample, layer, position, head, k]; gate [sample, layer, position]
    ssm        norms [sample, layer, chunk, head]; decay [sample, layer, position, head]
    paths      share, cosine [sample, layer, path]: means over the sample's tokens; NaN where a block lacks the path

`layer` runs over the blocks that have the path (coordinate `layer`), `chunk` over chunks of the group's attribute
`chunk_size`. Behind a sample's end, floats are NaN, unsigned integers the largest value of their type and signed ones
-1. `loss` is in nats, of the token at its own position given the window's earlier ones: NaN at position 0.
Floats are float16 but for `loss`, `norms` and `paths` (float32).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab.capture.record import PathUpdate, Recording
from hydra_lab.config import HydraConfig
from hydra_lab.taps import PATHS

SIGNALS = ("routing", "attention", "workspace", "memory", "ssm", "paths")
"""Groups that a capture holds besides `tokens` unless told otherwise."""

REQUESTED_SIGNALS = ("mass",)
"""Groups that a capture holds only where they are asked for by name."""

KINDS = ("window", "sink", "selected")
"""The places that attention goes to, in the order of the axis `kind`."""

SUMMARY = "summary"
"""Signal that asks for the running summary (`hydra_lab.summaries`) of all groups, whichever are kept in full."""

_TAPS = {
    "routing": ("moe.routing",),
    "attention": ("attention.selection",),
    "mass": ("attention.mass",),
    "workspace": ("workspace.write", "workspace.read"),
    "memory": ("memory.lookup",),
    "ssm": ("ssm.state",),
    "paths": (),
}
_PATH = {"routing": "moe", "mass": "attention"}


@dataclass(frozen=True)
class ArraySpec:
    """One array of a group.

    Attributes:
        dims: names of the axes after `sample`.
        shape: their sizes.
        dtype: numpy dtype.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def fill(self) -> Any:
        """Value behind a sample's end."""
        dtype = np.dtype(self.dtype)
        if dtype.kind == "f":
            return np.nan
        if dtype.kind == "b":
            return False
        return np.iinfo(dtype).max if dtype.kind == "u" else -1


Specs = dict[str, dict[str, ArraySpec]]
"""Arrays by group and name."""

Rows = dict[tuple[str, str], NDArray[Any]]
"""Rows [samples, ...] for each (group, array)."""


def unsigned(num_values: int) -> str:
    """The smallest unsigned dtype that holds 0 .. num_values - 1 and, as its largest value, the fill."""
    return next(name for name in ("uint8", "uint16", "uint32", "uint64") if num_values <= np.iinfo(name).max)


def signed(num_values: int) -> str:
    """The smallest signed dtype that holds 0 .. num_values - 1, and -1 for the fill."""
    return next(name for name in ("int8", "int16", "int32", "int64") if num_values - 1 <= np.iinfo(name).max)


def signals_of(config: HydraConfig, signals: Sequence[str] | None) -> tuple[str, ...]:
    """The groups to capture, in order: those of `SIGNALS` that the model has, or those asked for.

    Raises:
        ValueError: a signal is no group, or the model has no such path.
    """
    known = (*SIGNALS, *REQUESTED_SIGNALS)
    present = [name for name in known if name == "paths" or config.layers_with(_PATH.get(name, name))]
    if signals is None:
        return tuple(name for name in present if name in SIGNALS)
    for name in signals:
        if name not in known:
            raise ValueError(f"signal {name!r} is not one of {', '.join(known)}")
        if name not in present:
            raise ValueError(
                f"this model has no {_PATH.get(name, name)} path, so there is no signal {name!r}"
            )
    return tuple(name for name in known if name in signals)


def taps_of(signals: Sequence[str]) -> list[str]:
    """Taps to record for these groups."""
    return [tap for name in signals for tap in _TAPS[name]]


def layers_of(config: HydraConfig, group: str) -> list[int]:
    """Blocks that the `layer` axis of a group runs over."""
    if group == "paths":
        return list(range(config.num_hidden_layers))
    return sorted(config.layers_with(_PATH.get(group, group)))


def chunk_size_of(config: HydraConfig, group: str) -> int | None:
    """Tokens per chunk of a group; None where it has no chunks."""
    sizes = {
        "routing": config.moe_chunk_size,
        "workspace": config.workspace_chunk_size,
        "ssm": config.ssm_chunk_size,
    }
    return sizes.get(group)


def specs_of(config: HydraConfig, signals: Sequence[str], sequence_length: int, num_domains: int) -> Specs:
    """The arrays of a capture."""
    length = sequence_length
    specs: Specs = {
        "tokens": {
            "token": ArraySpec(("position",), (length,), unsigned(config.vocab_size)),
            "mask": ArraySpec(("position",), (length,), "bool"),
            "loss": ArraySpec(("position",), (length,), "float32"),
            "length": ArraySpec((), (), unsigned(length + 1)),
            "domain": ArraySpec((), (), unsigned(num_domains)),
            "document": ArraySpec((), (), "uint32"),
            "offset": ArraySpec((), (), "uint64"),
        }
    }
    for group in signals:
        num_layers = len(layers_of(config, group))
        chunk = chunk_size_of(config, group)
        chunks = 0 if chunk is None else -(-length // chunk)

        def per(
            axis: str, size: int, rest: dict[str, int], dtype: str, layers: int = num_layers
        ) -> ArraySpec:
            return ArraySpec(("layer", axis, *rest), (layers, size, *rest.values()), dtype)

        if group == "routing":
            rank, expert = {"rank": config.moe_top_k}, {"expert": config.moe_num_experts}
            specs[group] = {
                "experts": per("chunk", chunks, rank, unsigned(config.moe_num_experts)),
                "weights": per("position", length, rank, "float16"),
                "logits": per("chunk", chunks, expert, "float16"),
            }
        elif group == "attention":
            chosen = {"head": config.attention_num_kv_heads, "k": config.attention_num_selected}
            num_blocks = -(-length // config.attention_block_size)
            specs[group] = {
                "blocks": per("position", length, chosen, signed(num_blocks)),
                "scores": per("position", length, chosen, "float16"),
            }
        elif group == "mass":
            shares = {"query_head": config.attention_num_heads, "kind": len(KINDS)}
            specs[group] = {"mass": per("position", length, shares, "float16")}
        elif group == "workspace":
            slot = {"slot": config.workspace_num_slots}
            specs[group] = {
                "write_address": per("position", length, slot, "float16"),
                "write_gate": per("chunk", chunks, slot, "float16"),
                "read_address": per("position", length, slot, "float16"),
                "read_gate": per("position", length, {}, "float16"),
            }
        elif group == "memory":
            chosen = {"head": config.memory_num_heads, "k": config.memory_top_k}
            num_rows = config.memory_num_keys[0] * config.memory_num_keys[1]
            specs[group] = {
                "addresses": per("position", length, chosen, unsigned(num_rows)),
                "weights": per("position", length, chosen, "float16"),
                "gate": per("position", length, {}, "float16"),
            }
        elif group == "ssm":
            head = {"head": config.ssm_num_heads}
            specs[group] = {
                "norms": per("chunk", chunks, head, "float32"),
                "decay": per("position", length, head, "float16"),
            }
        else:
            share = ArraySpec(("layer", "path"), (num_layers, len(PATHS)), "float32")
            specs[group] = {"share": share, "cosine": share}
    return specs


def rows_of(recording: Recording, input_ids: Tensor, specs: Specs, config: HydraConfig) -> Rows:
    """Rows of every array but `domain`, `document` and `offset`, from a batch padded on the right.

    Args:
        recording: of `input_ids` [B, L], L at most the window's length, with the taps of the groups in `specs`.
    """
    length = recording.length
    rows: Rows = {}

    def put(group: str, name: str, value: Tensor, count: Tensor) -> None:
        """`value` [B, layer, X, ...] or [B, X, ...], of whose X axis the first `count[b]` entries are real."""
        spec = specs[group][name]
        axis = 2 if spec.dims[0] == "layer" else 1
        size = spec.shape[axis - 1]
        array = value.narrow(axis, 0, min(value.shape[axis], size)).cpu()
        array = array.float() if array.is_floating_point() else array
        full = np.full((array.shape[0], *spec.shape), spec.fill, dtype=spec.dtype)
        full[tuple(slice(have) for have in array.shape)] = array.numpy()
        real = np.arange(size) < count.cpu().numpy()[:, None]
        np.moveaxis(full, axis, 1)[~real] = spec.fill
        rows[group, name] = full

    def stack(tap: str, field: str) -> Tensor:
        by_layer = recording.by_layer(tap)
        return torch.stack([getattr(by_layer[layer], field) for layer in sorted(by_layer)], dim=1)

    def chunks(group: str) -> Tensor:
        size = chunk_size_of(config, group)
        assert size is not None
        return (length + size - 1) // size

    put("tokens", "token", input_ids, length)
    positions = torch.arange(input_ids.shape[1], device=length.device)
    put("tokens", "mask", positions < length[:, None], length)
    put("tokens", "loss", token_losses(recording.logits, input_ids, length), length)
    rows["tokens", "length"] = length.cpu().numpy().astype(specs["tokens"]["length"].dtype)
    if "routing" in specs:
        put("routing", "experts", stack("moe.routing", "experts"), chunks("routing"))
        put("routing", "weights", stack("moe.routing", "weights"), length)
        put("routing", "logits", stack("moe.routing", "logits"), chunks("routing"))
    if "attention" in specs:
        put("attention", "blocks", stack("attention.selection", "blocks"), length)
        put("attention", "scores", stack("attention.selection", "scores"), length)
    if "mass" in specs:
        put("mass", "mass", stack("attention.mass", "mass"), length)
    if "workspace" in specs:
        address = stack("workspace.write", "address").transpose(-1, -2).flatten(2, 3)  # [B, layer, C * T, S]
        put("workspace", "write_address", address, length)
        put("workspace", "write_gate", stack("workspace.write", "gate"), chunks("workspace"))
        put("workspace", "read_address", stack("workspace.read", "address"), length)
        put("workspace", "read_gate", stack("workspace.read", "gate").squeeze(-1), length)
    if "memory" in specs:
        put("memory", "addresses", stack("memory.lookup", "addresses"), length)
        put("memory", "weights", stack("memory.lookup", "weights"), length)
        put("memory", "gate", stack("memory.lookup", "gate").squeeze(-1), length)
    if "ssm" in specs:
        put("ssm", "norms", stack("ssm.state", "norms"), chunks("ssm"))
        put("ssm", "decay", stack("ssm.state", "decay"), length)
    if "paths" in specs:
        for name in ("share", "cosine"):
            rows["paths", name] = _path_means(recording.contributions, name, length, config.num_hidden_layers)
    return rows


def token_losses(logits: Tensor, input_ids: Tensor, length: Tensor) -> Tensor:
    """[B, L] negative log-likelihood in nats of each token given the earlier ones of its row; NaN at position 0 and
    behind the row's end. Rows are padded on the right."""
    losses = torch.full(input_ids.shape, torch.nan, device=logits.device)
    for row in range(input_ids.shape[0]):  # one row at a time: the softmax of a whole batch is large
        size = int(length[row])
        if size > 1:
            targets = input_ids[row, 1:size]
            losses[row, 1:size] = F.cross_entropy(logits[row, : size - 1].float(), targets, reduction="none")
    return losses


def _path_means(
    updates: dict[str, PathUpdate], name: str, length: Tensor, num_layers: int
) -> NDArray[np.float32]:
    """[B, layer, path] mean of a field of `PathUpdate` over each row's tokens."""
    means = np.full((length.shape[0], num_layers, len(PATHS)), np.nan, dtype=np.float32)
    for key, update in updates.items():
        _, layer, path = key.split(".")
        value_BL = getattr(update, name)
        real = torch.arange(value_BL.shape[1], device=length.device) < length[:, None]
        mean_B = value_BL.masked_fill(~real, torch.nan).double().nanmean(dim=1)
        means[:, int(layer), PATHS.index(path)] = mean_B.cpu().numpy()
    return means
