"""How a fresh model starts."""

import pytest
import torch

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM

OUTPUTS = {
    "attention": "o_proj.weight",
    "moe": "down_proj",
    "workspace": "out_proj.weight",
    "memory": "out_proj.weight",
}
"""Last weight of each optional path."""


@pytest.mark.parametrize("preset", ["nano", "demo"])
def test_optional_paths_of_a_fresh_model_are_silent(preset: str) -> None:
    """They join without noise: at the start each adds exactly nothing, and its output layer gets a gradient."""
    torch.manual_seed(0)
    model = HydraForCausalLM(HydraConfig.from_preset(preset))
    ids = torch.randint(0, 97, (2, 40))
    out = model(ids, labels=ids)
    for path in ("attention", "moe", "workspace", "memory"):
        with model.cut(path):
            assert torch.equal(model(ids).logits, out.logits), path
    out.loss.backward()
    for layer in model.model.blocks:
        outputs = {
            "attention": "o_proj.weight",
            "moe": "down_proj",
            "workspace": "out_proj.weight",
            "memory": "out_proj.weight",
        }
        for path in set(layer.paths) - {"ssm"}:
            gradient = layer.get_submodule(path).get_parameter(outputs[path]).grad
            assert gradient is not None and gradient.abs().max() > 0, (layer.index, path)
