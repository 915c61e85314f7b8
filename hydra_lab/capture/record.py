"""Record what a model decides on one batch, with plain forward hooks.

Shape suffixes: B rows, L positions, D hidden size. Everything recorded is in the rows' own coordinates: a row's tokens
start at index 0, whatever the padding, and `length` of them are real. Only `logits` keep the columns of the input.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import RequestedTap, Tap, requested

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


class PathUpdate(NamedTuple):
    """How much of a block's update one path makes, per token.

    Attributes:
        norm: [B, L] fp32 Euclidean norm of the path's gated contribution.
        share: [B, L] fp32 that norm over the sum of the norms of all paths of the block, 0..1; NaN where that is zero.
        cosine: [B, L] fp32 cosine between the contribution and the sum of all contributions, -1..1; NaN where either
            is zero.
    """

    norm: Tensor
    share: Tensor
    cosine: Tensor


@dataclass(frozen=True, eq=False)
class Recording(Mapping[str, Any]):
    """What `record` returns: a mapping from a tap's path ("model.layers.1.moe.routing") to its decision.

    A path may be shortened from the left ("layers.1.moe.routing").

    Attributes:
        decisions: the decision (a NamedTuple of detached clones, batch first) of each recorded tap, in model order.
        logits: [B, L, vocabulary] next-token logits, in the columns of the input.
        length: [B] int64 real tokens of each row.
        contributions: `PathUpdate` by "layers.<i>.<path>"; empty unless asked for.
        hidden: [B, L, D] residual stream after each block, by index of the block; empty unless asked for.
    """

    decisions: dict[str, Any]
    logits: Tensor
    length: Tensor
    contributions: dict[str, PathUpdate] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Any:
        if path in self.decisions:
            return self.decisions[path]
        found = [name for name in self.decisions if name.endswith("." + path)]
        if len(found) == 1:
            return self.decisions[found[0]]
        reason = (
            f"it could be {', '.join(found)}"
            if found
            else f"recorded: {', '.join(self.decisions) or 'nothing'}"
        )
        raise KeyError(f"no single recorded tap is called {path!r}; {reason}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def by_layer(self, tap: str) -> dict[int, Any]:
        """Decisions of one kind of tap ("moe.routing") by index of the block."""
        found = {}
        for path, decision in self.decisions.items():
            layer = _LAYER.search(path)
            if layer is not None and layer[2] == tap:
                found[int(layer[1])] = decision
        return found


def record(
    model: HydraForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    taps: str | Sequence[str] | None = None,
    contributions: bool = False,
    hidden: bool = False,
) -> Recording:
    """Run `model` on one batch and return what its taps carried.

    Runs without gradients, leaves the model as it was, releases its hooks whatever happens, and holds the model's
    lock (`hydra_lab.locks`) meanwhile. Hooks that were on the model before run first, so what is recorded is what
    they made of a decision: what the model went on to use.

    Args:
        model: a `HydraForCausalLM`.
        input_ids: [B, L] token ids, on any device.
        attention_mask: [B, L] nonzero where a token is present (padding on the left or on the right); None: all.
        taps: which taps: None for all but the requested ones (`hydra_lab.taps.REQUESTED_TAPS`); or one or more of a
            full path, the end of one ("moe.routing", "layers.2.memory.lookup", "ssm.states"), or a pattern with *
            ("layers.2.*").
        contributions: also measure what each path adds to the residual stream (`PathUpdate`).
        hidden: also keep the residual stream after each block.

    Raises:
        ValueError: a tap is unknown or belongs to a path that is switched off, or the ids are not [B, L] integers
            of the vocabulary.
    """
    input_ids, attention_mask = check_inputs(model, input_ids, attention_mask)
    chosen = select_taps(model, taps)
    decisions: dict[str, Any] = {}
    updates: dict[str, PathUpdate] = {}
    residuals: dict[int, Tensor] = {}
    with ExitStack() as hooks, model_lock(model), torch.no_grad(), requested(chosen.values()):
        for path, tap in chosen.items():
            handle = tap.register_forward_hook(_keep_decision(decisions, path))
            hooks.callback(handle.remove)
        for index, block in _blocks(model):
            if contributions:
                _measure_contributions(hooks, index, block, updates)
            if hidden:
                handle = block.register_forward_hook(_keep_hidden(residuals, index))
                hooks.callback(handle.remove)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    silent = [path for path in chosen if path not in decisions]
    if silent and taps is not None:
        raise ValueError(f"{', '.join(silent)} carried nothing: the path is switched off (set_path_scale)")
    if attention_mask is None:
        length = torch.full((input_ids.shape[0],), input_ids.shape[1], device=input_ids.device)
    else:
        length = (attention_mask != 0).sum(dim=1)
    ordered = {path: decisions[path] for path in chosen if path in decisions}
    return Recording(ordered, logits, length, updates, residuals)


def select_taps(model: nn.Module, taps: str | Sequence[str] | None = None) -> dict[str, Tap]:
    """Taps of `model` by path, in model order; `taps` as in `record`.

    Raises:
        ValueError: if one of `taps` names no tap of this model; the message lists what there is.
    """
    present = {path: module for path, module in model.named_modules() if isinstance(module, Tap)}
    if taps is None:
        return {path: tap for path, tap in present.items() if not isinstance(tap, RequestedTap)}
    wanted = [taps] if isinstance(taps, str) else list(taps)
    chosen: set[str] = set()
    for name in wanted:
        matches = {path for path in present if _matches(path, name)}
        if not matches:
            raise ValueError(f"this model has no tap {name!r}; it has {', '.join(present) or 'none'}")
        chosen |= matches
    return {path: tap for path, tap in present.items() if path in chosen}


def _matches(path: str, name: str) -> bool:
    return (
        path == name or path.endswith("." + name) or fnmatchcase(path, name) or fnmatchcase(path, "*." + name)
    )


def check_inputs(
    model: HydraForCausalLM, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The ids and the mask, [B, L] each, on the model's device.

    Raises:
        ValueError: the ids are not [B, L] integers of the vocabulary, or the mask has another shape.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids must be a [B, L] integer tensor with at least one token, got {input_ids.dtype} "
            f"{list(input_ids.shape)}"
        )
    num_tokens = model.config.vocab_size
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < num_tokens:
        found = f"{int(input_ids.min())} .. {int(input_ids.max())}"
        raise ValueError(f"input_ids lie in {found}, the vocabulary in 0 .. {num_tokens - 1}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids have {list(input_ids.shape)}"
        )
    device = next(model.parameters()).device
    return input_ids.to(device), None if attention_mask is None else attention_mask.to(device)


def _blocks(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for path, module in model.named_modules():
        found = re.search(r"(?:^|\.)layers\.(\d+)$", path)
        if found is not None:
            yield int(found[1]), module


def _keep_decision(decisions: dict[str, Any], path: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, decision: Any) -> None:
        decisions[path] = type(decision)(*(value.detach().clone() for value in decision))

    return hook


def _keep_hidden(residuals: dict[int, Tensor], index: int) -> Any:
    def hook(_module: nn.Module, _inputs: Any, residual: Tensor) -> None:
        residuals[index] = residual.detach().clone()

    return hook


def _measure_contributions(hooks: ExitStack, index: int, block: Any, updates: dict[str, PathUpdate]) -> None:
    """Measure a block's contributions when it is done; only one block's are held at a time."""
    added: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, update_BLD: Tensor) -> None:
            added[path] = update_BLD.detach().float().clone()

        return hook

    def measure(_module: nn.Module, _inputs: Any, _residual: Any) -> None:
        total_BLD = sum(added.values())
        norms = {path: torch.linalg.vector_norm(update, dim=-1) for path, update in added.items()}
        total_norm_BL = torch.linalg.vector_norm(total_BLD, dim=-1)
        sum_BL = sum(norms.values())
        for path, update_BLD in added.items():
            cosine_BL = (update_BLD * total_BLD).sum(dim=-1) / (norms[path] * total_norm_BL)
            updates[f"layers.{index}.{path}"] = PathUpdate(norms[path], norms[path] / sum_BL, cosine_BL)
        added.clear()

    for path, module in block.contributions.items():
        handle = module.register_forward_hook(keep(path))
        hooks.callback(handle.remove)
    handle = block.register_forward_hook(measure)
    hooks.callback(handle.remove)
