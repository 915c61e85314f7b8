"""Small models whose every path matters, and the checks that several tests share."""

from typing import Any

import torch
from torch import Tensor, nn

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM

EMBEDDING_STD = 0.5
"""Large enough for logits of the size of a trained model's, so that absolute tolerances mean something."""

ZERO_AT_START = ("o_proj.weight", "out_proj.weight", "down_proj", "token_router.weight", "memory.gate.weight")
"""Weights of optional paths that a fresh model holds at zero."""


def lively_model(seed: int = 0, **fields: Any) -> HydraForCausalLM:
    """A `nano` model in which no path is silent, in evaluation mode.

    A fresh model's optional paths add exactly nothing, so a test of the whole model would not see what they do
    wrong: their weights are drawn at random, and each path's contribution is asserted to be of the size of the others.
    """
    torch.manual_seed(seed)
    config = HydraConfig.from_preset("nano", **fields)
    model = HydraForCausalLM(config).eval()
    enliven(model)
    sizes = contribution_sizes(model, random_ids(config, 2, 24, seed=seed))
    for (layer, path), size in sizes.items():
        assert size > 0.01, f"the {path} path of block {layer} adds only {size:.1e} of the residual stream"
    return model


def enliven(model: HydraForCausalLM) -> None:
    """Draw the weights that a fresh model holds at zero, and spread the routers' and memory's decisions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ZERO_AT_START):
                parameter.normal_(std=0.3)
            elif name.endswith(("router.weight", "q_proj.weight", "k_proj.weight")):
                parameter.normal_(std=0.5)
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_(std=EMBEDDING_STD)
            elif name.endswith("read_query.weight"):
                parameter.normal_(std=0.3)


def contribution_sizes(model: HydraForCausalLM, ids: Tensor) -> dict[tuple[int, str], float]:
    """Root mean square of each path's contribution over that of its block's input, by (block, path)."""
    sizes: dict[tuple[int, str], float] = {}
    inputs: dict[int, float] = {}

    def see_input(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            inputs[index] = rms(args[0])

        return hook

    def see_contribution(index: int, path: str) -> Any:
        def hook(_module: Any, _args: Any, update: Tensor) -> None:
            sizes[index, path] = rms(update) / inputs[index]

        return hook

    handles: list[Any] = []
    for index, block in enumerate(model.model.blocks):
        handles.append(block.norm.register_forward_pre_hook(see_input(index)))
        for path, module in block.contributions.items():
            handles.append(module.register_forward_hook(see_contribution(index, path)))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    assert len(sizes) == sum(len(layer.paths) for layer in model.model.blocks)
    return sizes


def rms(x: Tensor) -> float:
    """Root mean square of all entries."""
    return float(x.detach().square().mean().sqrt())


def listen(module: nn.Module) -> list[Any]:
    """A list to which every later run of `module` appends its output."""
    seen: list[Any] = []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output)

    module.register_forward_hook(hook)
    return seen


def random_ids(config: HydraConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length] token ids, none of them the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, config.vocab_size, (batch, length), generator=generator)
