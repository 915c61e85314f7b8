"""Plain torch hooks, written out: what attribution is compared with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def output_of(model: Any, module: nn.Module, ids: Tensor) -> Any:
    """What `module` puts out while `model` reads `ids`."""
    seen: list[Any] = []
    with replaced(module, seen.append), torch.no_grad():
        model(ids, use_cache=False)
    return seen[0]


@contextmanager
def replaced(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, `module` puts out `change` of its output (or the output itself, where that is None)."""
    handle = module.register_forward_hook(lambda _module, _args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def contribution(model: Any, name: str) -> nn.Module:
    """The module that carries what the path called "layers.<i>.<path>" adds to the residual stream."""
    _, layer, path = name.split(".")
    return model.model.layers[int(layer)].contributions[path]


def num_hooks(model: nn.Module) -> int:
    """Hooks that are on the model's modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
