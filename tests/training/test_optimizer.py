"""Parameter groups, schedule, and an optimizer's way through the disk."""

from pathlib import Path

import pytest
import torch

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.training.checkpoint import load_optimizer, save_optimizer
from hydra_lab.training.optimizer import (
    build_optimizer,
    build_scheduler,
    component_of,
    move_scheduler,
    parameter_groups,
)
from hydra_lab.training.plan import TrainingPlan
from hydra_lab.training.presets import CurriculumConfig, OptimizerConfig, TrainConfig, staged

CONFIG = OptimizerConfig(
    learning_rate=1.0, matrices=2.0, embedding=1.5, workspace=0.5, memory_values=3.0, gates=0.1
)


def nano() -> HydraForCausalLM:
    torch.manual_seed(0)
    return HydraForCausalLM(HydraConfig.from_preset("nano"))


def test_every_parameter_is_in_one_group() -> None:
    model = nano()
    groups = parameter_groups(model, CONFIG)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}


def test_groups_have_the_stated_rates_and_decay() -> None:
    groups = {group["name"]: group for group in parameter_groups(nano(), CONFIG)}
    expected = {
        "backbone.decayed": (1.0, 0.1),
        "backbone.embedding": (1.5, 0.1),
        "backbone.matrix": (2.0, 0.1),
        "backbone.undecayed": (1.0, 0.0),
        "backbone.gate": (0.1, 0.0),
        "workspace.decayed": (0.5, 0.1),
        "workspace.matrix": (1.0, 0.1),
        "workspace.undecayed": (0.5, 0.0),
        "workspace.gate": (0.05, 0.0),
        "memory.matrix": (2.0, 0.1),
        "memory.undecayed": (1.0, 0.0),
        "memory.gate": (0.1, 0.0),
        "memory.values": (3.0, 0.0),
    }
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair), name
    assert groups["memory.values"]["param_names"] == ["model.layers.2.memory.values"]
    assert {name for name, group in groups.items() if group["muon"]} == {
        "backbone.matrix",
        "workspace.matrix",
        "memory.matrix",
    }
    assert groups["backbone.embedding"]["param_names"] == ["model.embed_tokens.weight"]
    for name in ("ssm.in_proj.weight", "moe.gate_up_proj", "moe.down_proj", "moe.router.weight"):
        assert f"model.layers.0.{name}" in groups["backbone.matrix"]["param_names"]
    assert "model.layers.0.ssm.conv1d.weight" in groups["backbone.decayed"]["param_names"]
    assert "model.layers.1.workspace.initial_slots" in groups["workspace.decayed"]["param_names"]
    for name in ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias"):
        assert f"model.layers.0.ssm.{name}" in groups["backbone.undecayed"]["param_names"]
    assert "model.layers.2.memory.gate.weight" in groups["memory.undecayed"]["param_names"]
    assert "model.layers.1.gates.workspace" in groups["workspace.gate"]["param_names"]


def test_component_of() -> None:
    assert component_of("model.layers.2.memory.keys1") == "memory"
    assert component_of("model.layers.2.gates.memory") == "memory"
    assert component_of("model.layers.2.gates.ssm") == "backbone"
    assert component_of("model.embed_tokens.weight") == "backbone"


def test_stage_changes_a_components_rate() -> None:
    curriculum = CurriculumConfig(stages=staged(0.2, 0.4, 0.6, 0.8))
    config = TrainConfig(
        model="nano",
        sequence_length=8,
        rows_per_step=1,
        max_steps=100,
        curriculum=curriculum,
        optimizer=CONFIG,
    )
    plan = TrainingPlan.of(config, preset="nano", seed=0, max_steps=100)
    optimizer = build_optimizer(nano(), CONFIG)
    scheduler = build_scheduler(optimizer, plan, curriculum)

    def rates(step: int) -> dict[str, float]:
        move_scheduler(scheduler, step)
        return {
            group["name"]: group["lr"] / plan.learning_rate_factor(step) for group in optimizer.param_groups
        }

    assert rates(79)["memory.matrix"] == pytest.approx(2.0)
    assert rates(80)["memory.matrix"] == pytest.approx(4.0)
    assert rates(80)["memory.values"] == pytest.approx(6.0)
    assert rates(80)["backbone.decayed"] == pytest.approx(1.0)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_moved_schedule_goes_on_as_if_it_had_been_stepped() -> None:
    curriculum = CurriculumConfig(stages=staged(0.2, 0.4, 0.6, 0.8))
    config = TrainConfig(
        model="nano", sequence_length=8, rows_per_step=1, max_steps=20, curriculum=curriculum
    )
    plan = TrainingPlan.of(config, preset="nano", seed=0, max_steps=20)
    stepped, moved = build_optimizer(nano(), CONFIG), build_optimizer(nano(), CONFIG)
    first, second = build_scheduler(stepped, plan, curriculum), build_scheduler(moved, plan, curriculum)
    for _ in range(9):
        stepped.step()
        first.step()
    move_scheduler(second, 9)
    for _ in range(5):
        assert [group["lr"] for group in moved.param_groups] == [
            group["lr"] for group in stepped.param_groups
        ]
        for optimizer, scheduler in ((stepped, first), (moved, second)):
            optimizer.step()
            scheduler.step()


def train_step(model: HydraForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(seed))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_survives_the_disk_also_with_paths_not_yet_trained(tmp_path: Path) -> None:
    model = nano()
    model.set_path_scale("memory", 0.0)
    optimizer = build_optimizer(model, CONFIG)
    train_step(model, optimizer, 0)
    untrained = model.get_parameter("model.layers.2.memory.values")
    assert untrained not in optimizer.state or not optimizer.state[untrained]
    save_optimizer(optimizer, tmp_path)

    copy = nano()
    copy.load_state_dict(model.state_dict())
    restored = build_optimizer(copy, CONFIG)
    load_optimizer(restored, tmp_path)
    for other in (model, copy):
        other.set_path_scale("memory", 1.0)
    for seed in (1, 2):
        train_step(model, optimizer, seed)
        train_step(copy, restored, seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, copy.get_parameter(name)), name


def test_state_of_unknown_parameters_is_refused(tmp_path: Path) -> None:
    model = nano()
    optimizer = build_optimizer(model, CONFIG)
    train_step(model, optimizer, 0)
    optimizer.param_groups[0]["param_names"][0] = "model.other"
    save_optimizer(optimizer, tmp_path)
    with pytest.raises(ValueError, match=r"unknown parameters: \['model.other'\]"):
        load_optimizer(build_optimizer(nano(), CONFIG), tmp_path)
