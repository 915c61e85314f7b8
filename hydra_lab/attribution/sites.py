"""The places of a model that attribution reads and writes, by name.

| name                   | what is there                                                     |
|------------------------|-------------------------------------------------------------------|
| `embedding`            | residual stream [B, L, D] before block 0                          |
| `layers.2`             | residual stream after block 2                                     |
| `layers.2.moe`         | what the path adds to it (its gated contribution)                 |
| `layers.2.moe.routing` | a decision, as the tap of that name carries it (`hydra_lab.taps`) |
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Tap

_NAME = re.compile(r"layers\.(\d+)(?:\.(\w+)(?:\.(\w+))?)?")


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a model.

    Attributes:
        name: as in the table above.
        kind: of what is there.
        depth: index of the block that it belongs to; -1 for the embedding.
        module: the module whose input (`embedding`) or output is the value.
    """

    name: str
    kind: Literal["embedding", "residual", "contribution", "decision"]
    depth: int
    module: nn.Module

    @classmethod
    def find(cls, model: HydraForCausalLM, name: str) -> "Site":
        """The site of this name.

        Raises:
            ValueError: the model has no such site; the message says which it has.
        """
        blocks = model.model.blocks
        if name == "embedding":
            return cls(name, "embedding", -1, blocks[0])
        found = _NAME.fullmatch(name)
        if found is None or int(found[1]) >= len(blocks):
            raise ValueError(
                f"no site {name!r}: give embedding, layers.<block>, layers.<block>.<path> or "
                f"layers.<block>.<path>.<tap>, with a block of 0 to {len(blocks) - 1}"
            )
        depth, path, tap = int(found[1]), found[2], found[3]
        block = blocks[depth]
        if path is None:
            return cls(name, "residual", depth, block)
        if path not in block.paths:
            raise ValueError(f"no site {name!r}: block {depth} has the paths {', '.join(block.paths)}")
        if tap is None:
            return cls(name, "contribution", depth, block.contributions[path])
        taps = {
            each: module for each, module in getattr(block, path).named_children() if isinstance(module, Tap)
        }
        if tap not in taps:
            raise ValueError(f"no site {name!r}: the taps of {path} are {', '.join(taps)}")
        return cls(name, "decision", depth, taps[tap])

    def hook(self, see: Callable[[Any], Any]) -> RemovableHandle:
        """Call `see` with the value whenever the model makes it; what `see` returns takes its place, unless None."""
        if self.kind == "embedding":

            def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                new = see(args[0])
                return None if new is None else (new, *args[1:])

            return self.module.register_forward_pre_hook(before)
        return self.module.register_forward_hook(lambda _module, _args, value: see(value))


def block_paths(model: HydraForCausalLM) -> list[str]:
    """Names of all contributions, "layers.0.ssm" first."""
    return [f"layers.{block.index}.{path}" for block in model.model.blocks for path in block.paths]
