"""One block: `y = x + sum over paths p of g_p * path_p(RMSNorm(x))`."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.attention import AttentionPath
from hydra_lab.nn.layers import RMSNorm
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.nn.moe import AuxiliaryLosses, MoEPath
from hydra_lab.nn.ssm import SSMPath
from hydra_lab.nn.workspace import WorkspacePath
from hydra_lab.ops.backend import Backend, default_backend
from hydra_lab.taps import PATHS

PATH_MODULES: dict[str, type[nn.Module]] = {
    "ssm": SSMPath,
    "attention": AttentionPath,
    "moe": MoEPath,
    "workspace": WorkspacePath,
    "memory": MemoryPath,
}
"""A path is added here and as a method of `HydraBlock` that calls it."""

BlockState = dict[str, Any]
"""What each path of a block keeps of earlier tokens, by path name."""


@dataclass
class Pass:
    """What one forward pass hands from block to block besides the residual stream.

    Attributes:
        span: the piece of every row that this pass is given.
        states: what each block kept of earlier pieces, or None without a cache; replaced by the new ones.
        losses: auxiliary losses by block, filled by the blocks (a dict, so that recomputation under gradient
            checkpointing writes the same entry again instead of a second one).
    """

    span: Span
    states: list[BlockState] | None = None
    losses: dict[int, AuxiliaryLosses] = field(default_factory=dict[int, AuxiliaryLosses])


class Contribution(nn.Module):
    """Identity on a path's gated update [B, L, D]; the place to read what a path adds, to scale it or to cut it."""

    def forward(self, update: Tensor) -> Tensor:
        return update


class HydraBlock(GradientCheckpointingLayer):
    """One block of the model.

    Attributes:
        ssm, attention, moe, workspace, memory: the paths, where the block has them.
        gates: learned scalar g_p of every path.
        path_scale: multiplier of every path besides its gate; the training curriculum raises it from 0 (the path is
            not computed) to 1. It is not part of the weights: a loaded model has 1 everywhere.
    """

    ssm: SSMPath
    attention: AttentionPath
    moe: MoEPath
    workspace: WorkspacePath
    memory: MemoryPath

    def __init__(self, config: HydraConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.ops_backend: Backend = cast(Any, config.ops_backend)
        self.paths = tuple(path for path in PATHS if index in config.layers_with(path))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        for path in self.paths:
            self.add_module(path, PATH_MODULES[path](config))
        self.gates = nn.ParameterDict(
            {path: nn.Parameter(torch.tensor(config.gate_init)) for path in self.paths}
        )
        self.contributions = nn.ModuleDict({path: Contribution() for path in self.paths})
        self.path_scale = dict.fromkeys(self.paths, 1.0)

    def forward(self, residual_BLD: Tensor, step: Pass) -> Tensor:
        with default_backend(self.ops_backend):
            return self._add_paths(residual_BLD, step)

    def _add_paths(self, residual_BLD: Tensor, step: Pass) -> Tensor:
        hidden = self.norm(residual_BLD)
        states = None if step.states is None else step.states[self.index]
        out = residual_BLD
        for path in self.paths:
            scale = self.path_scale[path]
            if scale == 0.0:
                continue
            update = getattr(self, f"_{path}")(hidden, step, states)
            update = update * (self.gates[path] * scale).to(update.dtype)
            out = out + self.contributions[path](update)
        return out

    def _ssm(self, hidden: Tensor, step: Pass, states: BlockState | None) -> Tensor:
        update, state = self.ssm(hidden, step.span, _get(states, "ssm"))
        _put(states, "ssm", state)
        return update

    def _attention(self, hidden: Tensor, step: Pass, states: BlockState | None) -> Tensor:
        update, state = self.attention(hidden, step.span, _get(states, "attention"), states is not None)
        _put(states, "attention", state)
        return update

    def _moe(self, hidden: Tensor, step: Pass, states: BlockState | None) -> Tensor:
        update, state, losses = self.moe(hidden, step.span, _get(states, "moe"))
        _put(states, "moe", state)
        step.losses[self.index] = losses
        return update

    def _workspace(self, hidden: Tensor, step: Pass, states: BlockState | None) -> Tensor:
        update, state = self.workspace(hidden, step.span, _get(states, "workspace"))
        _put(states, "workspace", state)
        return update

    def _memory(self, hidden: Tensor, step: Pass, states: BlockState | None) -> Tensor:
        return self.memory(hidden)


def _get(states: BlockState | None, path: str) -> Any:
    return None if states is None else states.get(path)


def _put(states: BlockState | None, path: str, state: Any) -> None:
    if states is not None:
        states[path] = state
