"""Read a text once and go on from there in several ways: other tokens, other interventions, another path's memory."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab.cache import HydraCache
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.ssm import SSMState

MEMORIES: tuple[str, ...] = ("ssm", "attention", "moe", "workspace")
"""Paths that keep something of earlier tokens: a state, keys and values, the average that routes, slots."""


def read_on(
    model: HydraForCausalLM,
    input_ids: Tensor,
    after: HydraCache | None = None,
    *,
    attention_mask: Tensor | None = None,
    last_only: bool = False,
) -> tuple[Tensor, HydraCache]:
    """Read [B, L] further tokens, without gradients.

    Args:
        after: what the model kept of the tokens before; it stays as it was, so it can be gone on from again.
        attention_mask: [B, L] nonzero where a token is present; None: all.
        last_only: whether the logits of the last column are enough.

    Returns:
        (next-token logits [B, L or 1, vocabulary], what the model keeps now).
    """
    cache = None if after is None else after.copy()
    with model_lock(model), torch.no_grad():
        out: Any = model(
            input_ids=input_ids.to(model.device),
            attention_mask=None if attention_mask is None else attention_mask.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
    return out.logits, out.past_key_values


def with_memory_of(
    cache: HydraCache, donor: HydraCache, path: str, *, layer: int | None = None, head: int | None = None
) -> HydraCache:
    """A copy of `cache` in which `path` remembers what it remembers in `donor`, and everything else is as it was.

    Both have read equally many tokens. For the ssm this is a write patch of its state (`ssm[i].patch`), and
    of the last inputs of its convolution unless one `head` is chosen.

    Args:
        path: one of `MEMORIES`.
        layer: in this block alone; None: in every block that has the path.
        head: this ssm head's state alone.
    """
    mixed = cache.copy()
    for index, (block, given) in enumerate(zip(mixed.states, donor.states, strict=True)):
        if path not in block or (layer is not None and index != layer):
            continue
        if head is None:
            block[path] = given[path]
        else:
            own: SSMState = block[path]
            state = own.state.clone()
            state[:, head] = given[path].state[:, head]
            block[path] = own._replace(state=state)
    return mixed


def with_memory_of_rows(cache: HydraCache, rows: Tensor, path: str) -> HydraCache:
    """A copy of `cache` in which row b of `path` remembers what row `rows[b]` remembers, in every block."""
    donor = HydraCache(len(cache.states))
    donor.states = [{path: block[path]} if path in block else {} for block in cache.states]
    donor.reorder_cache(rows)
    return with_memory_of(cache, donor, path)


def divergence(logits: Tensor, other: Tensor) -> NDArray[np.float64]:
    """[...] Kullback-Leibler divergence of softmax(other) from softmax(logits) over the last axis, nats.

    From the differences of the logits less their mean, so that those of two runs that hardly differ do not
    drown in the rounding of two normalisations.
    """
    probability = logits.float().softmax(dim=-1)
    centred = logits.float() - other.float()
    centred -= (probability * centred).sum(dim=-1, keepdim=True)
    excess = (probability * centred.neg_().expm1_()).sum(dim=-1, dtype=torch.float64)
    return excess.clamp(min=0).log1p().cpu().numpy()
