"""`HydraLens`: nnsight around a Hydra model, with short names, batching by left padding and one lock per model."""

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from nnsight import NNsight
from nnsight.intervention.batching import Batcher
from nnsight.intervention.cache import Cache, CacheView
from nnsight.intervention.envoy import Envoy, traceable
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.tracing.tracer import save
from nnsight.util import apply
from torch import Tensor, nn

from hydra_lab.lens.envoys import ENVOYS, logits_name
from hydra_lab.locks import model_lock


class LensBatcher(Batcher):
    """Cuts a batch into invokes: a scalar belongs to all of them, and rows that nobody wrote go back as the tensor that
    they were cut from."""

    def _narrow_tensor(self, tensor: Tensor, group: list[int]) -> Tensor:
        return tensor if tensor.ndim == 0 else super()._narrow_tensor(tensor, group)

    def _widen_tensor(self, full: Tensor, group: list[int], edited: Tensor) -> Tensor:
        start, size = group
        if edited is full or full.ndim == 0:
            return edited
        if full.shape[0] == self.total:
            rows = full.narrow(0, start, size)
            if edited._is_view() and edited.data_ptr() == rows.data_ptr() and edited.shape == rows.shape:
                return full
        return super()._widen_tensor(full, group, edited)


class CloningCache(Cache):
    """A cache whose entries do not change when the model later writes into the same tensors."""

    def _transform(self, value: Any) -> Any:
        return super()._transform(apply(value, lambda tensor: tensor.clone(), Tensor))


class LensTracer(InterleavingTracer):
    """A trace that holds the model's lock while it runs."""

    def execute(self, code: CodeType) -> None:
        assert isinstance(self.envoy, HydraLens)
        with self.envoy.lock:
            super().execute(code)

    def cache(self, modules: Sequence[Envoy | str] | None = None, **options: Any) -> CacheView:
        """As in nnsight, with two differences: entries are clones, and an entry of `modules` that names no module
        raises ValueError instead of caching nothing ("model.model.layers.0.moe.experts" is a field; cache its tap,
        "model.model.layers.0.moe.routing"). Other options: device, dtype, detach, include_output, include_inputs."""
        mediator = Mediator.current("tracer.cache()")
        if mediator.pending is not None:
            raise ValueError("tracer.cache() must be declared before reading or modifying a model value")
        assert self.envoy is not None
        present = {path for path, _ in self.envoy.named_modules()}
        for module in modules or ():
            if not isinstance(module, str | Envoy):
                raise TypeError(f"modules takes envoys and paths, got {type(module).__name__}")
            path = module if isinstance(module, str) else module.path
            if path not in present:
                raise ValueError(
                    f"there is no module {path!r} to cache; a field is cached with the tap that carries it"
                )
        cache = CloningCache(self.envoy, modules=None if modules is None else list(modules), **options)
        mediator.caches.append(cache)
        return save(CacheView(cache, None))


class HydraLens(NNsight):
    """Trace a Hydra model: read, overwrite and differentiate its decisions while it runs.

        lens = HydraLens(model, tokenizer)
        with lens.trace("The capital of France is"):
            experts = lens.layers[0].moe.experts.save()     # [B, C, K]
            lens.layers[2].moe.experts[:] = 3               # force an expert (the weights stay as they were)
            lens.layers[3].memory.contribution *= 0         # cut a path
            logits = lens.logits.save()

    Names under `lens.layers[i]`, each readable, editable in place and assignable (fields as in `hydra_lab.taps`):

        moe.{logits, experts, weights}          attention.{blocks, scores}      ssm.{norms, decay}
        memory.{addresses, weights, beta}       workspace.write.{address, gate} workspace.read.{address, gate}
        <path>.contribution                     output (the residual stream after the block)
        <path>.<tap>.output (a whole decision), <path>.<tap>.<field>

    Within a block a trace must ask in the order ssm, attention, moe, workspace, memory, each tap before its path's
    contribution; nnsight raises OutOfOrderError otherwise. A view may be edited until the trace next asks for a
    value; later edits do not reach the model.

    Decisions are in a row's own coordinates, so index 0 is a row's first token however the batch was padded; `logits`
    have the columns of the padded input, so count those from the right. Several `tracer.invoke(...)` in one trace are
    padded on the left and run as one batch, each seeing its own rows. `lens.generate(prompt, ...)` traces generation;
    `for step in tracer.iter[:n]` reads every step (step 0 is the prompt), `tracer.result` is what `generate` returned.

    nnsight is not thread-safe. Traces take the model's lock (`hydra_lab.locks.model_lock`), as `capture.record` does;
    a thread that calls the model itself while others trace it must take the lock too. Torch forward hooks on a tap
    run after the lens has seen it; interventions (`hydra_lab.interventions`) come before, so a trace shows what they
    made of a decision, and what it writes is the last word.

    Attributes:
        tokenizer: turns text into ids; not needed where ids are given.
        lock: the model's re-entrant lock.
    """

    logits: Any = logits_name()
    _batcher_class = LensBatcher

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        with model_lock(model):
            super().__init__(model, envoys=dict(ENVOYS))
        self.tokenizer = tokenizer

    @property
    def lock(self) -> Any:
        return model_lock(self._module)

    @property
    def layers(self) -> Any:
        """The blocks: `lens.layers[i]`."""
        return self.model.layers

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Open a trace over text, lists of text, token ids ([L], [B, L] or nested lists) or a tokenizer's encoding;
        keyword arguments go to the model. Without an input, give one to each `tracer.invoke(...)`."""
        kwargs.setdefault("tracer_cls", LensTracer)
        return super().trace(*args, **kwargs)

    def edit(self, **kwargs: Any) -> Any:
        """As in nnsight: `with lens.edit() as (tracer, edited):` stores the block, and `edited` is a lens that replays
        it in every trace."""
        return super().edit(**kwargs)

    @traceable
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, traced in a `with` block (see the class) or called directly on text."""
        generate: Any = self._module.generate
        return generate(*args, **kwargs)

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return super().interleave(fn, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return super().__call__(*args, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return len(self._rows(inputs, kwargs))

    def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[tuple[()], dict[str, Any]]:
        """One left-padded call for all invokes."""
        rows: list[list[int]] = []
        options: dict[str, Any] = {}
        for inputs, kwargs in invokes:
            rows += self._rows(inputs, kwargs)
            for name, value in kwargs.items():
                if name in ("input_ids", "attention_mask"):
                    continue
                if len(invokes) > 1 and (name == "labels" or options.get(name, value) is not value):
                    raise ValueError(f"{name} cannot be given for one of several invokes; give it to trace()")
                options[name] = value
        if not rows:
            return (), options
        (inputs, kwargs), alone = invokes[0], len(invokes) == 1
        ids = inputs[0] if inputs else kwargs.get("input_ids")
        if alone and isinstance(ids, Tensor) and ids.ndim == 2:  # as it is, its padding included
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
        else:
            size = max(len(row) for row in rows)
            padding = getattr(self.tokenizer, "pad_token_id", None) or 0
            ids = torch.tensor([[padding] * (size - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows])
        if fn == "__call__":
            options.setdefault("use_cache", False)
        return (), {"input_ids": ids, "attention_mask": mask, **options}

    def _rows(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of each row of one invoke, without padding; no rows where the invoke has no input.

        Raises:
            TypeError: the input is none of the kinds that `trace` takes.
            ValueError: a row is empty.
        """
        if len(inputs) > 1:
            raise TypeError(f"one invoke takes one input, got {len(inputs)}; give several rows as a list")
        data = inputs[0] if inputs else kwargs.get("input_ids")
        if data is None:
            return []
        mask = kwargs.get("attention_mask")
        if isinstance(data, Mapping):
            data, mask = data["input_ids"], data.get("attention_mask", mask)
        rows = self._token_ids(data)
        if mask is not None:
            kept = mask.tolist() if isinstance(mask, Tensor) else mask
            kept = kept if rows and isinstance(kept[0], list) else [kept]
            rows = [
                [token for token, keep in zip(row, keeps, strict=True) if keep]
                for row, keeps in zip(rows, kept, strict=True)
            ]
        if any(not row for row in rows):
            raise ValueError("the input holds a row without tokens")
        return rows

    def _token_ids(self, data: Any) -> list[list[int]]:
        if isinstance(data, Tensor):
            if data.is_floating_point() or data.ndim not in (1, 2):
                raise TypeError(
                    f"token ids must be [L] or [B, L] integers, got {data.dtype} {list(data.shape)}"
                )
            return data.tolist() if data.ndim == 2 else [data.tolist()]
        if isinstance(data, str):
            return [self._encode(data)]
        if isinstance(data, list | tuple) and data:
            if all(isinstance(row, int) for row in data):
                return [list(data)]
            return [row for item in data for row in self._token_ids(item)]
        raise TypeError(f"a trace takes text or token ids, got {type(data).__name__}")

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise TypeError("this lens has no tokenizer, so it takes token ids, not text")
        return list(self.tokenizer(text)["input_ids"])
