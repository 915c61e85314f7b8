"""What the logits are made of: the logit lens after each block, and each path's direct share in a logit.

Shape suffixes: B rows, L positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_lab.attribution.rows import FloatArray, IntArray, Rows, floats, front_rows, ints, next_tokens
from hydra_lab.attribution.sites import Site, block_paths
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the model would predict if it stopped after a block: its final norm and head on the residual stream.

    Axes: Y depths, B rows, L positions (a row's own tokens from 0), V guesses. Positions past a row's end are NaN, and
    -1 where integers.

    Attributes:
        depths: [Y] "embedding", then "block 0", ...; the last is what the model itself predicts.
        ids: [B, L] the tokens.
        length: [B] tokens of each row.
        tokens: [Y, B, L, V] the likeliest next tokens, best first.
        probability: [Y, B, L, V] their probabilities, 0..1.
        actual_probability: [Y, B, L] probability of the token that does follow; NaN after the last.
        actual_rank: [Y, B, L] its rank, 1 for the likeliest; -1 after the last.
        kl: [Y, B, L] KL divergence of the final distribution from this one, nats.
    """

    depths: tuple[str, ...]
    ids: IntArray
    length: IntArray
    tokens: IntArray
    probability: FloatArray
    actual_probability: FloatArray
    actual_rank: IntArray
    kl: FloatArray


@dataclass(frozen=True, eq=False)
class DirectLogitAttribution:
    """A logit, or the difference of two, as the sum of what the embedding and every path of every block add to it.

    The final norm divides by the root mean square of the whole residual stream; that divisor is held at this run's
    value, and then the logit is linear in the parts (Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits"). What a part changes by changing the divisor, or by what later blocks read, is not in it.

    Axes: Z parts, B rows, L positions. NaN past a row's end, and where there is no token to explain.

    Attributes:
        parts: [Z] "embedding", then "layers.0.ssm", ... in the model's order.
        effect: [Z, B, L] logits that each part adds; their sum over Z is `logit`.
        logit: [B, L] the model's logit of `tokens` (minus that of `contrast`).
        ids: [B, L] the tokens of the rows.
        tokens: [B, L] token whose logit is explained; -1 where there is none.
        contrast: [B, L] token whose logit is subtracted; None without one.
        length: [B] tokens of each row.
    """

    parts: tuple[str, ...]
    effect: FloatArray
    logit: FloatArray
    ids: IntArray
    tokens: IntArray
    contrast: IntArray | None
    length: IntArray


def logit_lens(
    model: HydraForCausalLM, ids: Tensor, mask: Tensor | None = None, *, num_tokens: int = 5
) -> LogitLens:
    """Predictions of every depth of `model` (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Args:
        ids: [B, L] token ids.
        mask: [B, L] nonzero where a token is present; None: all.
        num_tokens: V.

    Raises:
        ValueError: the ids do not fit the model, or `num_tokens` is not in 1..vocabulary.
    """
    if not 1 <= num_tokens <= model.config.vocab_size:
        raise ValueError(f"num_tokens must lie in 1..{model.config.vocab_size}, got {num_tokens}")
    rows = front_rows(model, ids, mask)
    following_BL = next_tokens(rows)
    with model_lock(model), torch.no_grad():
        out: Any = model(
            input_ids=rows.ids, attention_mask=rows.mask, use_cache=False, output_hidden_states=True
        )
        final_BLV = F.log_softmax(out.logits.float(), dim=-1)
        depths = [_read(model, hidden, final_BLV, following_BL, num_tokens) for hidden in out.hidden_states]
    absent = ~rows.present
    ended = following_BL < 0
    hidden_where = (absent[..., None], absent[..., None], ended, ended, absent)
    tokens, probability, actual, rank, kl = (
        torch.stack(each).masked_fill(hide, torch.nan if each[0].is_floating_point() else -1)
        for each, hide in zip(zip(*depths, strict=True), hidden_where, strict=True)
    )
    return LogitLens(
        depths=("embedding", *(f"block {index}" for index in range(len(model.model.blocks)))),
        ids=ints(rows.ids),
        length=ints(rows.length),
        tokens=ints(tokens),
        probability=floats(probability),
        actual_probability=floats(actual),
        actual_rank=ints(rank),
        kl=floats(kl),
    )


def _read(
    model: HydraForCausalLM, hidden_BLD: Tensor, final_BLV: Tensor, following_BL: Tensor, num_tokens: int
) -> tuple[Tensor, ...]:
    """Tokens, probabilities, probability and rank of the token that follows, and KL, of one depth."""
    log_BLV = F.log_softmax(model.lm_head(model.model.norm(hidden_BLD)).float(), dim=-1)
    best = log_BLV.topk(num_tokens, dim=-1)
    actual_BL1 = log_BLV.gather(-1, following_BL.clamp(min=0)[..., None])
    rank_BL = (log_BLV > actual_BL1).sum(dim=-1) + 1
    kl_BL = (final_BLV.exp() * (final_BLV - log_BLV)).sum(dim=-1)
    return best.indices, best.values.exp(), actual_BL1[..., 0].exp(), rank_BL, kl_BL


def direct_logit_attribution(
    model: HydraForCausalLM,
    ids: Tensor,
    tokens: int | Tensor | None = None,
    *,
    contrast: int | Tensor | None = None,
    mask: Tensor | None = None,
) -> DirectLogitAttribution:
    """Split a logit into what the embedding and each path of each block add to it.

    Args:
        ids: [B, L] token ids.
        tokens: the token whose logit is split: one id for all positions, ids [B, L] by position in the row (whatever
            the padding), or None for the token that follows in the row.
        contrast: token whose logit is subtracted, likewise; None for no subtraction.
        mask: [B, L] nonzero where a token is present; None: all.

    Raises:
        ValueError: the ids do not fit the model, or `tokens` or `contrast` are not tokens of the vocabulary.
    """
    rows = front_rows(model, ids, mask)
    explained_BL = next_tokens(rows) if tokens is None else _targets(model, "tokens", tokens, rows)
    subtracted_BL = None if contrast is None else _targets(model, "contrast", contrast, rows)
    weight_VD = cast(Tensor, model.lm_head.weight).detach().float()
    direction_BLD = weight_VD[explained_BL.clamp(min=0)]
    if subtracted_BL is not None:
        direction_BLD = direction_BLD - weight_VD[subtracted_BL]
    final_norm = model.model.norm
    direction_BLD = direction_BLD * final_norm.weight.float()

    products: dict[str, Tensor] = {}
    divisors: list[Tensor] = []

    def keep_product(name: str) -> Any:
        def see(part_BLD: Tensor) -> None:
            products[name] = (part_BLD.float() * direction_BLD).sum(dim=-1)

        return see

    def keep_divisor(_module: Any, args: tuple[Tensor]) -> None:
        divisors.append((args[0].float().square().mean(dim=-1) + final_norm.eps).sqrt())

    parts = ("embedding", *block_paths(model))
    with model_lock(model), torch.no_grad():
        handles = [Site.find(model, name).hook(keep_product(name)) for name in parts]
        handles.append(final_norm.register_forward_pre_hook(keep_divisor))
        try:
            logits_BLV = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()
    (divisor_BL,) = divisors
    silent_BL = torch.zeros_like(divisor_BL)  # a path that the curriculum has not switched on
    effect = torch.stack([products.get(name, silent_BL) / divisor_BL for name in parts])
    logit_BL = _at(logits_BLV, explained_BL)
    if subtracted_BL is not None:
        logit_BL = logit_BL - _at(logits_BLV, subtracted_BL)
    unknown_BL = (explained_BL < 0) | ~rows.present
    return DirectLogitAttribution(
        parts=parts,
        effect=floats(effect.masked_fill(unknown_BL, torch.nan)),
        logit=floats(logit_BL.masked_fill(unknown_BL, torch.nan)),
        ids=ints(rows.ids),
        tokens=np.where(unknown_BL.cpu().numpy(), -1, ints(explained_BL)),
        contrast=None if subtracted_BL is None else ints(subtracted_BL),
        length=ints(rows.length),
    )


def _targets(model: HydraForCausalLM, name: str, tokens: int | Tensor, rows: Rows) -> Tensor:
    """[B, L] ids, checked."""
    found = torch.as_tensor(tokens, device=rows.ids.device)
    if found.is_floating_point() or found.shape not in ((), rows.ids.shape):
        raise ValueError(
            f"{name} must be one token id or ids {list(rows.ids.shape)}, got {found.dtype} {list(found.shape)}"
        )
    size = model.config.vocab_size
    if not 0 <= int(found.min()) <= int(found.max()) < size:
        raise ValueError(
            f"{name} lie in {int(found.min())} .. {int(found.max())}, the vocabulary in 0 .. {size - 1}"
        )
    return found.long().expand(rows.ids.shape)


def _at(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    return logits_BLV.gather(-1, tokens_BL.clamp(min=0)[..., None])[..., 0]
