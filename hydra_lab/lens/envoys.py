"""nnsight envoys that give every field of every decision a short name.

`lens.layers[1].moe.routing.experts` is the field `experts` of the tap `moe.routing`; the common ones are also mounted
on the path itself, `lens.layers[1].moe.experts`. Each can be read, edited in place and assigned.

What a name hands out is a clone, and what goes back to the model is a clone of that, so a saved value never changes
after it was read. A decision that was only read goes back as the very tensors that the model made: a path may ask by
identity whether it was written.
"""

from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from hydra_lab.taps import REQUESTED_TAPS, TAPS

SHORT_NAMES: dict[str, dict[str, str]] = {
    "moe": {name: f"moe.routing.{name}" for name in ("logits", "experts", "weights")},
    "attention": {name: f"attention.selection.{name}" for name in ("blocks", "scores")},
    "memory": {
        "addresses": "memory.lookup.addresses",
        "weights": "memory.lookup.weights",
        "beta": "memory.lookup.gate",
    },
    "ssm": {name: f"ssm.state.{name}" for name in ("norms", "decay")},
    "workspace": {},
}
"""Names on a path's envoy for fields of its taps. The workspace has two taps with equal field names, so there the tap
is always spelled out: `workspace.write.gate`, `workspace.read.gate`."""


ALL_TAPS = TAPS | REQUESTED_TAPS


def unchanged(view: Tensor, original: Tensor) -> bool:
    """Whether `view`, made as a clone of `original`, still is what it was."""
    if not view.is_inference() and view._version:
        return False
    return torch.equal(view, original)


def _returned(view: Tensor, original: Tensor, by_identity: bool) -> Tensor:
    """What goes back to the model for `view`: `original` itself where nothing was written and no gradient is wanted."""
    if unchanged(view, original) and (by_identity or not view.requires_grad):
        return original
    return view.clone()


def fitted(value: Any, current: Tensor, name: str) -> Tensor:
    """`value` as a tensor that can stand in for `current`.

    Raises:
        TypeError: it is neither a tensor nor a number, or a fraction where whole numbers are needed.
        ValueError: it cannot be broadcast to the shape of `current`.
    """
    if isinstance(value, bool | int | float):
        value = torch.as_tensor(value, device=current.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} takes a tensor or a number, got {type(value).__name__}")
    if value.is_floating_point() and not current.is_floating_point():
        raise TypeError(f"{name} holds {current.dtype}, got {value.dtype}")
    try:
        value = value.broadcast_to(current.shape)
    except RuntimeError:
        raise ValueError(f"{name} has shape {list(current.shape)}, got {list(value.shape)}") from None
    return value.to(device=current.device, dtype=current.dtype).clone(memory_format=torch.contiguous_format)


def _check_decision(decision: Any, tap: str) -> None:
    """Raise where nnsight would hand out wrong rows without a word."""
    if not hasattr(decision, "_fields"):
        raise TypeError(
            f"the tap {tap} carries a {type(decision).__name__}; only a NamedTuple is cut into invokes"
        )
    mediator = Mediator.current(tap)
    batcher, group = mediator.interleaver.batcher, mediator.batch_group
    if group is None or not batcher.batching:
        return
    for name, value in decision._asdict().items():
        if value.shape[0] != group[1]:
            raise ValueError(
                f"{tap}.{name} has {value.shape[0]} rows where this invoke has {group[1]}: the first axis of a tap "
                "must be the batch (several invokes cannot be combined with beams or num_return_sequences)"
            )


def tap_field(tap: str, name: str, field: str, key: str) -> eproperty:
    """A readable and writable name for `field` of the decision at `tap`; `key` leads there from the envoy."""
    described = f"{tap}.{field}"
    by_identity = tap == "ssm.state"  # SSMPath runs a second scan where its summary was replaced
    prop = eproperty(key=key, description=described)

    def view(self: Envoy, decision: Any) -> Any:
        _check_decision(decision, tap)
        return getattr(decision, field).clone()

    def assign(self: Envoy, value: Any) -> Any:
        decision = Mediator.value(f"{self.path}.{key}")
        _check_decision(decision, tap)
        return decision._replace(**{field: fitted(value, getattr(decision, field), described)})

    def write_back(self: Envoy, edited: Tensor, decision: Any) -> Any:
        original = getattr(decision, field)
        returned = _returned(edited, original, by_identity)
        return decision if returned is original else decision._replace(**{field: returned})

    view.__name__ = name
    prop(view)
    prop.postprocess(assign)
    prop.transform(write_back)
    return prop


def _decision(tap: str) -> eproperty:
    """The whole decision of a tap, as a NamedTuple of clones; readable, editable field by field, assignable."""
    by_identity = tap == "ssm.state"
    prop = eproperty(key="output")

    def output(self: Envoy, decision: Any) -> Any:
        _check_decision(decision, tap)
        return type(decision)(*(value.clone() for value in decision))

    def assign(self: Envoy, value: Any) -> Any:
        decision = Mediator.value(f"{self.path}.output")
        _check_decision(decision, tap)
        if not isinstance(value, type(decision)):
            raise TypeError(f"{tap} carries a {type(decision).__name__}, got {type(value).__name__}")
        fields = zip(decision._fields, value, decision, strict=True)
        return type(decision)(*(fitted(new, old, f"{tap}.{name}") for name, new, old in fields))

    def write_back(self: Envoy, edited: Any, decision: Any) -> Any:
        pairs = zip(edited, decision, strict=True)
        return type(decision)(*(_returned(new, old, by_identity) for new, old in pairs))

    prop(output)
    prop.postprocess(assign)
    prop.transform(write_back)
    return prop


class _Contribution(eproperty):
    """What the path adds to the residual stream, [B, L, D]; the module that carries it lies beside the path's."""

    def _location(self, obj: Any) -> str:
        block, path = obj.path.rsplit(".", 1)
        return f"{block}.contributions.{path}.output"


def _contribution() -> eproperty:
    prop = _Contribution(key="contribution", description="what the path adds to the residual stream")

    def contribution(self: Envoy, update_BLD: Tensor) -> Any:
        return update_BLD.clone()

    def assign(self: Envoy, value: Any) -> Any:
        return fitted(value, Mediator.value(prop._location(self)), "contribution")

    def write_back(self: Envoy, edited: Tensor, update_BLD: Tensor) -> Tensor:
        return _returned(edited, update_BLD, by_identity=False)

    prop(contribution)
    prop.postprocess(assign)
    prop.transform(write_back)
    return prop


def logits_name() -> eproperty:
    """[B, L, vocabulary] next-token logits, in the columns of the (padded) input."""
    prop = eproperty(key="output", description="next-token logits")

    def logits(self: Envoy, output: Any) -> Any:
        return output.logits.clone()

    def assign(self: Envoy, value: Any) -> Any:
        output = Mediator.value(f"{self.path}.output")
        return type(output)(**{**output, "logits": fitted(value, output.logits, "logits")})

    def write_back(self: Envoy, edited: Tensor, output: Any) -> Any:
        return (
            output
            if unchanged(edited, output.logits)
            else type(output)(**{**output, "logits": edited.clone()})
        )

    prop(logits)
    prop.postprocess(assign)
    prop.transform(write_back)
    return prop


class TapEnvoy(Envoy):
    """A tap: `output` is its decision, and each field of the decision has its own name."""


class PathEnvoy(Envoy):
    """A path of a block: `contribution` is what it adds, and the fields of its taps have short names."""

    contribution: Any = _contribution()


def _tap_envoy(tap: str) -> type[Envoy]:
    decision = ALL_TAPS[tap]
    fields = {name: tap_field(tap, name, name, "output") for name in decision._fields}
    return type(f"{decision.__name__}Envoy", (TapEnvoy,), {"output": _decision(tap), **fields})


def _path_envoy(path: str) -> type[Envoy]:
    fields = {}
    for name, target in SHORT_NAMES[path].items():
        tap, field = target.rsplit(".", 1)
        fields[name] = tap_field(tap, name, field, f"{tap.split('.')[1]}.output")
    return type(f"{path.capitalize()}Envoy", (PathEnvoy,), fields)


ENVOYS: dict[str, type[Envoy]] = {f"layers.*.{tap}": _tap_envoy(tap) for tap in ALL_TAPS} | {
    f"layers.*.{path}": _path_envoy(path) for path in SHORT_NAMES
}
"""Envoy class by the end of a module's path."""
