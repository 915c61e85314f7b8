"""The Hydra language model as transformers classes.

Importing this module registers `HydraConfig`, `HydraModel` and `HydraForCausalLM` with transformers' Auto classes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from hydra_lab.cache import HydraCache
from hydra_lab.chunks import Span, front_order
from hydra_lab.config import HydraConfig
from hydra_lab.nn.block import HydraBlock, Pass
from hydra_lab.nn.layers import GatedRMSNorm, OutputProjection, RMSNorm
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.nn.moe import MoEPath
from hydra_lab.nn.ssm import SSMPath
from hydra_lab.nn.workspace import WorkspacePath
from hydra_lab.taps import PATHS


@dataclass
class HydraModelOutput(ModelOutput):
    """Output of `HydraModel`.

    Attributes:
        last_hidden_state: [B, L, D] after the final norm.
        past_key_values: decode state, if it was asked for.
        hidden_states: residual stream before each block and after the last, [B, L, D] each, if asked for. In the
            rows' own coordinates: a row's tokens come first, padding last.
        load_balance_loss, router_z_loss: unweighted auxiliary losses, summed over the blocks with experts.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: HydraCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None


@dataclass
class HydraCausalLMOutput(ModelOutput):
    """Output of `HydraForCausalLM`.

    Attributes:
        loss: language loss plus the weighted auxiliary losses, if labels were given.
        logits: [B, L, vocabulary] next-token logits; at padded positions they mean nothing.
        past_key_values, hidden_states, load_balance_loss, router_z_loss: as in `HydraModelOutput`.
        language_loss: mean negative log-likelihood of the labels, nats per token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: HydraCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    language_loss: Tensor | None = None
    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None


class HydraPreTrainedModel(PreTrainedModel):
    """Weights, their initialisation and loading (safetensors only)."""

    config: HydraConfig
    config_class = HydraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HydraBlock"]  # noqa: RUF012 (transformers declares it so)
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but never from a pickle: `use_safetensors` is always on."""
        if kwargs.get("use_safetensors", True) is not True:
            raise ValueError("use_safetensors must be true: pickled weights are not loaded")
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, OutputProjection):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | GatedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SSMPath | WorkspacePath | MemoryPath | MoEPath):
            module.reset_parameters()


class HydraModel(HydraPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HydraBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> list[HydraBlock]:
        """The blocks, in order."""
        return cast(list[HydraBlock], list(self.layers))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HydraCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HydraModelOutput | tuple[Any, ...]:
        """Run a whole sequence, or the next piece of it.

        Args:
            input_ids: [B, L] token ids; or give `inputs_embeds` [B, L, D].
            attention_mask: [B, >= L] nonzero where a token is present; with a cache it may cover the earlier pieces
                too, and its last L columns count. Padding may be on the left or on the right.
            past_key_values: state after the earlier pieces. Continued, it is brought up to date in place.
            use_cache: whether to return the state; off while training.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, size = hidden.shape[:2]
        if size == 0:
            raise ValueError("input_ids holds no token; a sequence needs at least one")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache:
            cache = HydraCache(len(self.layers))

        order, length = None, None
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < size:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, at least {size})"
                )
            order, length = front_order(attention_mask[:, -size:].bool())
        if order is not None:
            hidden = hidden.gather(1, order[..., None].expand_as(hidden))
        start, seen_columns = (None, 0) if cache is None else (cache.lengths, cache.columns)
        span = Span(size, start, length, bound=seen_columns + size)
        step = Pass(span, None if cache is None else [dict(state) for state in cache.states])

        seen = [hidden] if output_hidden_states else None
        for layer in self.layers:
            hidden = layer(hidden, step)
            if seen is not None:
                seen.append(hidden)
        if cache is not None:
            assert step.states is not None
            cache.states = step.states
            counted = torch.full((batch,), size, device=hidden.device) if length is None else length
            cache.advance(counted, size)
        hidden = self.norm(hidden)
        if order is not None:
            hidden = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        losses = [step.losses[index] for index in sorted(step.losses)]
        zero = hidden.new_zeros((), dtype=torch.float32)
        output = HydraModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=None if seen is None else tuple(seen),
            load_balance_loss=sum((loss.load_balance for loss in losses), zero),
            router_z_loss=sum((loss.router_z for loss in losses), zero),
        )
        return output if return_dict is not False else output.to_tuple()


class HydraForCausalLM(HydraPreTrainedModel, GenerationMixin):
    """Hydra with a next-token head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = False

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.model = HydraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own HydraCache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: HydraCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> HydraCausalLMOutput | tuple[Any, ...]:
        """Next-token logits, and the training loss if `labels` [B, L] are given (-100 is ignored; they are shifted
        here, so labels are the input ids). Other arguments as in `HydraModel.forward`; `logits_to_keep` computes the
        last columns only."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = language_loss = None
        if labels is not None:
            language_loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
            loss = (
                language_loss
                + self.config.moe_load_balance_weight * out.load_balance_loss
                + self.config.moe_router_z_weight * out.router_z_loss
            )
        output = HydraCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            language_loss=language_loss,
            load_balance_loss=out.load_balance_loss,
            router_z_loss=out.router_z_loss,
        )
        return output if return_dict is not False else output.to_tuple()

    def set_path_scale(self, path: str, scale: float) -> None:
        """Multiply what `path` adds in every block by `scale`; at 0 the path is not computed at all.

        This is the training curriculum's control. It is not saved with the weights.

        Raises:
            ValueError: if there is no such path.
        """
        _check_path(path)
        for layer in self.model.blocks:
            if path in layer.paths:
                layer.path_scale[path] = scale

    @contextmanager
    def cut(self, path: str, layers: Iterable[int] | None = None) -> Iterator[None]:
        """Within the context, `path` adds nothing to the residual stream of `layers` (default: every block).

        Its decisions are still made and can be read. `hydra_lab.interventions` knows more changes.

        Raises:
            ValueError: if there is no such path, or one of `layers` does not have it.
        """
        _check_path(path)
        present = self.config.layers_with(path)
        chosen = present if layers is None else list(layers)
        missing = [index for index in chosen if index not in present]
        if missing:
            raise ValueError(f"blocks {missing} have no {path} path; blocks {present} have it")
        handles = [
            # before the identity, not after it, so that nnsight sees it too
            self.model.blocks[index].contributions[path].register_forward_pre_hook(_silence)
            for index in chosen
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _silence(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return torch.zeros_like(inputs[0])


def _check_path(path: str) -> None:
    if path not in PATHS:
        raise ValueError(f"path {path!r} is not one of {', '.join(PATHS)}")


AutoConfig.register("hydra", HydraConfig, exist_ok=True)
AutoModel.register(HydraConfig, HydraModel, exist_ok=True)
AutoModelForCausalLM.register(HydraConfig, HydraForCausalLM, exist_ok=True)
