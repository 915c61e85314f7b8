"""What is looked at: residual stream, router logits, ssm states and workspace slots at the observed positions."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_lab.capture import record
from hydra_lab.capture.path_use import batches
from hydra_lab.modeling import HydraForCausalLM
from probes.linear_probe.tasks import Task

KINDS = ("residual", "router", "state", "slots")
KIND_NAMES = {
    "residual": "residual stream",
    "router": "router logits",
    "state": "ssm state",
    "slots": "workspace slots",
}


@dataclass(frozen=True)
class Site:
    """A place of the model.

    Attributes:
        kind: one of `KINDS`. "residual": after the block; "router": logits of the token's chunk; "state": of all heads,
            after the token; "slots": as the token reads them, that is after the chunk before its own.
        layer: index of the block.
    """

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{KIND_NAMES[self.kind]}, block {self.layer}"


def sites_of(model: HydraForCausalLM) -> tuple[Site, ...]:
    """Every site of the model, by kind."""
    config = model.config
    layers = {
        "residual": range(config.num_hidden_layers),
        "router": config.layers_with("moe"),
        "state": range(config.num_hidden_layers),
        "slots": config.layers_with("workspace"),
    }
    return tuple(Site(kind, layer) for kind in KINDS for layer in layers[kind])


PROJECTED = ("state", "slots")
"""Kinds of many thousand numbers, of which a random projection is looked at."""

Features = dict[Site, NDArray[np.float32]]
"""Observations [O, F] of a task at every site."""


def collect(
    model: HydraForCausalLM, task: Task, *, most_features: int, seed: int, batch_size: int
) -> Features:
    """Run the model on a task's samples and keep what stands at its positions.

    States and slots wider than `most_features` are projected at random to that width (Johnson and Lindenstrauss 1984),
    with the same matrix for every observation, drawn without a look at the data.

    Raises:
        ValueError: an observation lies inside a chunk of the ssm, whose state is known at chunk ends alone.
    """
    chunk = model.config.ssm_chunk_size
    inside = ((task.position + 1) % chunk != 0) & (task.position != _last(task))
    if inside.any():
        raise ValueError(
            f"the state is known at the end of every {chunk} tokens; set `every` to a multiple of that"
        )
    projection: dict[Site, NDArray[np.float32]] = {}
    parts: dict[Site, list[NDArray[np.float32]]] = {site: [] for site in sites_of(model)}
    for rows, input_ids, attention_mask in batches(_cut(task), batch_size):
        here = np.isin(task.row, rows)
        row = torch.from_numpy(task.row[here] - rows[0])
        position = torch.from_numpy(task.position[here])
        for site, seen in _look(model, input_ids, attention_mask, row, position).items():
            flat = seen.flatten(1).float().cpu().numpy()
            if site.kind in PROJECTED and flat.shape[1] > most_features:
                if site not in projection:
                    rng = np.random.default_rng([seed, KINDS.index(site.kind), site.layer])
                    drawn = rng.standard_normal((flat.shape[1], most_features), dtype=np.float32)
                    projection[site] = drawn / np.float32(np.sqrt(most_features))
                flat = flat @ projection[site]
            parts[site].append(flat)
    return {site: np.concatenate(values) for site, values in parts.items()}


def _last(task: Task) -> NDArray[np.int64]:
    """[O] last position that the model reads of each observation's row."""
    return _cut(task).length[task.row] - 1


def _cut(task: Task) -> Any:
    """The samples up to their last observation: what comes later (an answer) must not be seen."""
    end = np.zeros(len(task.samples), dtype=np.int64)
    np.maximum.at(end, task.row, task.position + 1)
    samples = task.samples
    length = np.where(end > 0, end, samples.length)
    return type(samples)(samples.tokens, samples.scored, length, samples.domains)


def _look(
    model: HydraForCausalLM, input_ids: Tensor, attention_mask: Tensor, row: Tensor, position: Tensor
) -> dict[Site, Tensor]:
    """What stands at the given positions of a batch, by site."""
    config = model.config
    slots: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            slots[layer] = inputs[0].detach().clone()  # [B, C, S, V], as they enter each chunk

        return hook

    taps = ["ssm.states"] + (["moe.routing"] if config.layers_with("moe") else [])
    with ExitStack() as hooks:
        for layer in config.layers_with("workspace"):
            norm = model.get_submodule(f"model.layers.{layer}.workspace.slot_norm")
            hooks.callback(norm.register_forward_pre_hook(keep(layer)).remove)
        recording = record(model, input_ids, attention_mask, taps=taps, hidden=True)
    seen: dict[Site, Tensor] = {}
    for site in sites_of(model):
        if site.kind == "residual":
            seen[site] = recording.hidden[site.layer][row, position]
        elif site.kind == "router":
            decision = recording[f"layers.{site.layer}.moe.routing"]
            seen[site] = decision.logits[row, position // config.moe_chunk_size]
        elif site.kind == "state":
            states = recording[f"layers.{site.layer}.ssm.states"].states
            seen[site] = states[row, position // config.ssm_chunk_size]
        else:
            seen[site] = slots[site.layer][row, position // config.workspace_chunk_size]
    return seen
