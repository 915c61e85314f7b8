"""Reading a long prompt in pieces, and decoding at one launch per token: a step of the model as a captured CUDA graph
over a state that stays in place."""

from typing import Any

import torch
from torch import Tensor

from hydra_lab.cache import HydraCache
from hydra_lab.modeling import HydraCausalLMOutput, HydraForCausalLM
from hydra_lab.nn.attention import AttentionState

PIECE = 4096
"""Tokens that a CPU reads at a time: the buffers of a longer piece outgrow its caches and go back to the system."""


@torch.no_grad()
def prefill(
    model: HydraForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None, *, piece: int = PIECE
) -> HydraCausalLMOutput:
    """Read a prompt piece by piece: what one forward pass over all of it gives, in the memory of a piece.

    Args:
        input_ids: [B, L] token ids.
        attention_mask: [B, L] nonzero where a token is present; None: all.
        piece: tokens at a time.

    Returns:
        Output of the last piece: `logits` [B, 1, vocabulary] of the last column, and `past_key_values`.

    Raises:
        ValueError: there is no token, or `piece` is below 1.
    """
    if input_ids.shape[1] < 1 or piece < 1:
        raise ValueError(
            f"prefill needs a token and a piece of at least 1, got {list(input_ids.shape)}, piece {piece}"
        )
    out, cache = None, None
    for start in range(0, input_ids.shape[1], piece):
        end = start + piece
        out = model(
            input_ids=input_ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
    assert out is not None
    return out


class StaticStep:
    """A decode step whose input, state and output keep their places in memory.

    The step waits for nothing that the device computes, as long as the model's operations do not (the Triton backend's
    do not, the torch backend's do).

    Attributes:
        input_ids: [B, 1] next token of each row; write it, then `run`.
        logits: [B, 1, vocabulary] what `run` left.
        room: tokens that can still be decoded.
    """

    def __init__(self, model: HydraForCausalLM, cache: HydraCache, room: int) -> None:
        self.model = model
        self.room = room
        with torch.inference_mode(False), torch.no_grad():
            self._cache = _own(cache, room)
            assert self._cache.lengths is not None
            batch, device = self._cache.lengths.shape[0], self._cache.lengths.device
            self.input_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.logits = torch.zeros(batch, 1, model.config.vocab_size, dtype=model.dtype, device=device)

    def run(self) -> None:
        """Decode `input_ids`, and bring the state and `logits` up to date in place."""
        with torch.inference_mode(False), torch.no_grad():
            after = self._cache.copy()
            out: Any = self.model(input_ids=self.input_ids, past_key_values=after, use_cache=True)
            self.logits.copy_(out.logits)
            assert self._cache.lengths is not None and after.lengths is not None
            self._cache.lengths.copy_(after.lengths)
            for block, new_block in zip(self._cache.states, after.states, strict=True):
                for path, state in block.items():
                    block[path] = _updated(state, new_block[path])


class DecodeGraph:
    """A model's decode step, captured once and replayed for every token.

        cache = model(input_ids=prompt, use_cache=True).past_key_values
        graph = DecodeGraph(model, cache, room=200)
        logits = graph.step(next_ids)       # [B, 1, vocabulary]

    Replaying runs no Python of the model: hooks and taps do not fire, so read and edit decisions without it.

    Args:
        model: on a CUDA device, in evaluation mode, with operations on the Triton backend.
        cache: state after the prompt; it is copied.
        room: tokens that can be decoded.

    Raises:
        ValueError: the model is not on a CUDA device, the cache is empty, or there is no room.
    """

    def __init__(self, model: HydraForCausalLM, cache: HydraCache, room: int) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"a decode graph needs a CUDA device, and the model is on {model.device.type!r}")
        if cache.lengths is None:
            raise ValueError("the cache is empty: run the prompt first")
        if room < 1:
            raise ValueError(f"room must be at least 1, got {room}")
        warming = StaticStep(model, cache, room=1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warming.run()  # compiles kernels and sets up libraries, which capturing must not see
        torch.cuda.current_stream().wait_stream(stream)
        self._step = StaticStep(model, cache, room)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step.run()

    @property
    def room(self) -> int:
        """Tokens that can still be decoded."""
        return self._step.room

    def step(self, input_ids: Tensor) -> Tensor:
        """Decode one token of each row.

        Args:
            input_ids: [B, 1] token ids.

        Returns:
            [B, 1, vocabulary] logits, valid until the next step.

        Raises:
            ValueError: the shape is another, or there is no room left.
        """
        if input_ids.shape != self._step.input_ids.shape:
            raise ValueError(
                f"input_ids must have shape {list(self._step.input_ids.shape)}, got {list(input_ids.shape)}"
            )
        if self._step.room < 1:
            raise ValueError("no room is left in this graph: capture another one from a longer cache")
        self._step.input_ids.copy_(input_ids)
        self._graph.replay()
        self._step.room -= 1
        return self._step.logits


def _own(cache: HydraCache, room: int) -> HydraCache:
    """The same state in memory of its own, with room behind the tokens."""
    own = cache.copy()
    assert own.lengths is not None
    own.lengths = own.lengths.clone()
    capacity = own.columns + room
    for block in own.states:
        for path, state in block.items():
            if isinstance(state, AttentionState):
                state = state.with_capacity(capacity)
            tensors = {
                name: field.clone() for name, field in state._asdict().items() if isinstance(field, Tensor)
            }
            block[path] = state._replace(**tensors)
    return own


def _updated(state: Any, new: Any) -> Any:
    """Copy the tensors of `new` into those of `state`; what is not a tensor is taken over."""
    taken: dict[str, Any] = {}
    for name, field in state._asdict().items():
        value = getattr(new, name)
        if not isinstance(field, Tensor):
            taken[name] = value
        elif value.data_ptr() != field.data_ptr():
            field.copy_(value)
    return state._replace(**taken)
