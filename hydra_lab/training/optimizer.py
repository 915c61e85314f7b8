"""Parameter groups, their optimizer and its schedule."""

import re
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hydra_lab.training.muon import MuonAdamW
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import CurriculumConfig, OptimizerConfig

GATE = re.compile(r"\.gates\.(\w+)$")
COMPONENT = re.compile(r"\.(workspace|memory)\.")
VALUES = re.compile(r"\.memory\.values$")
KEYS = re.compile(r"\.memory\.keys[12]$")
EMBEDDING = re.compile(r"(embed_tokens|lm_head)\.weight$")
EXPERTS = re.compile(r"\.moe\.(gate_up|down)_proj$")


def component_of(name: str) -> str:
    """The component (`backbone`, `workspace` or `memory`) of the parameter called `name`."""
    gate = GATE.search(name)
    if gate:
        return gate.group(1) if gate.group(1) in ("workspace", "memory") else "backbone"
    found = COMPONENT.search(name)
    return found.group(1) if found else "backbone"


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """How a parameter is trained: as a path's `gate`, as the memory's `values`, as the `embedding`, as a `matrix` (by
    Muon), `decayed` or `undecayed`.

    A matrix is what maps one vector to another. One with a single row is a vector (the gate beta of the memory is
    one), the slots of the workspace are rows of a table, and the memory's keys are points to be near to, whose length
    sets how sharply a query chooses.
    """
    if GATE.search(name):
        return "gate"
    if VALUES.search(name):
        return "values"
    if EMBEDDING.search(name):
        return "embedding"
    if parameter.ndim < 2 or parameter.shape[0] == 1 or KEYS.search(name):
        return "undecayed"
    if EXPERTS.search(name) or (parameter.ndim == 2 and name.endswith(".weight")):
        return "matrix"
    return "decayed"


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW`: one per component and kind present.

    Each has `name` (`component.kind`), `component`, `params`, `param_names`, `lr`, `weight_decay` and `muon`.
    """
    members: dict[tuple[str, str], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (component_of(name), kind_of(name, parameter))
            members.setdefault(key, []).append((name, parameter))
    kinds = {
        "gate": config.gates,
        "values": config.memory_values,
        "embedding": config.embedding,
        "matrix": config.matrices,
    }
    groups: list[dict[str, Any]] = []
    for (component, kind), named in sorted(members.items()):
        factor = kinds.get(kind, 1.0) * (config.workspace if component == "workspace" else 1.0)
        groups.append(
            {
                "name": f"{component}.{kind}",
                "component": component,
                "params": [parameter for _, parameter in named],
                "param_names": [name for name, _ in named],
                "lr": config.learning_rate * factor,
                "weight_decay": config.weight_decay if kind in ("decayed", "embedding", "matrix") else 0.0,
                "muon": kind == "matrix",
            }
        )
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> MuonAdamW:
    """`MuonAdamW` over `parameter_groups`."""
    return MuonAdamW(
        parameter_groups(model, config), lr=config.learning_rate, betas=config.betas, eps=config.eps
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, plan: TrainingPlan, curriculum: CurriculumConfig
) -> LambdaLR:
    """The plan's schedule times the stage's factor for the group's component; a pure function of the step."""

    def factor(component: str, step: int) -> float:
        stage = plan.stage_at(step, curriculum.stages)
        return plan.learning_rate_factor(step) * stage.learning_rates.get(component, 1.0)

    components = [group["component"] for group in optimizer.param_groups]
    return LambdaLR(optimizer, [lambda step, c=component: factor(c, step) for component in components])


def move_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Put a schedule, and the learning rates that it governs, at `step`."""
    rates = [base * rule(step) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch = step
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
