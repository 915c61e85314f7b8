"""Gradients of a metric with respect to the model's decisions: which router weight, which memory row, which slot
mattered, to first order.

Shape suffixes: B rows, L positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab.capture.record import check_inputs, select_taps
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM

DIFFERENTIABLE = ("moe.routing", "memory.lookup", "workspace.read", "workspace.write")
"""Taps whose numbers the model computes with; those of the others only choose, or only report."""


@dataclass(frozen=True, eq=False)
class DecisionGradients:
    """Derivatives of one number with respect to what the taps carried, each field on its own.

    Attributes:
        metric: the number.
        gradients: by "layers.<i>.<path>.<tap>.<field>": its derivative, in units of the metric per unit of the field,
            in the field's shape (`hydra_lab.taps`). Everything later that depends on the field is in it. That of
            `moe.routing.logits` goes through the token weights of the chosen experts; which experts are chosen has no
            derivative.
        values: every field of these decisions by the same names, integers (experts, addresses) included.
        length: [B] tokens of each row.
    """

    metric: float
    gradients: dict[str, NDArray[np.floating]]
    values: dict[str, NDArray[Any]]
    length: NDArray[np.int64]

    def effect(self, name: str) -> NDArray[np.floating]:
        """Gradient times value: what setting the field to 0 would take from the metric, to first order (its unit)."""
        return self.gradients[name] * self.values[name]


def decision_gradients(
    model: HydraForCausalLM,
    ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    taps: str | Sequence[str] = DIFFERENTIABLE,
    mask: Tensor | None = None,
) -> DecisionGradients:
    """Run the model forward and backward, and read the gradients at its taps. Weights get none.

    Args:
        ids: [B, L] token ids.
        metric: logits [B, L, V] in the columns of the input -> one number.
        taps: which, by their names' ends ("moe.routing", "layers.3.memory.lookup"); default: all of
            `DIFFERENTIABLE` that the model has.
        mask: [B, L] nonzero where a token is present; None: all.

    Raises:
        ValueError: a tap is unknown or its numbers have no gradient, the metric is not a scalar, or the ids do not
            fit the model.
    """
    ids, mask = check_inputs(model, ids, mask)
    if taps == DIFFERENTIABLE:
        taps = [name for name in DIFFERENTIABLE if model.config.layers_with(name.split(".")[0])]
    chosen = select_taps(model, taps)
    for path in chosen:
        if not path.endswith(DIFFERENTIABLE):
            raise ValueError(f"{path} has no gradient; these taps have: {', '.join(DIFFERENTIABLE)}")
    decisions: dict[str, Any] = {}

    def keeper(path: str) -> Any:
        def keep(_module: Any, _args: Any, decision: Any) -> None:
            decisions[path.removeprefix("model.")] = decision

        return keep

    with model_lock(model), torch.enable_grad():
        handles = [tap.register_forward_hook(keeper(path)) for path, tap in chosen.items()]
        try:
            # The graph begins at the embeddings, whatever the weights' own `requires_grad` says.
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
            number = metric(logits)
        finally:
            for handle in handles:
                handle.remove()
        if number.numel() != 1:
            raise ValueError(f"the metric must be one number, got shape {list(number.shape)}")
        fields = {
            f"{path}.{name}": value
            for path, decision in decisions.items()
            for name, value in decision._asdict().items()
        }
        smooth = {name: value for name, value in fields.items() if value.requires_grad}
        found = torch.autograd.grad(number.sum(), list(smooth.values()), allow_unused=True)
    length = (torch.ones_like(ids) if mask is None else mask != 0).sum(dim=1)
    return DecisionGradients(
        metric=float(number.detach()),
        gradients={
            name: _array(torch.zeros_like(value) if gradient is None else gradient)
            for (name, value), gradient in zip(smooth.items(), found, strict=True)
        },
        values={name: _array(value) for name, value in fields.items()},
        length=_array(length),
    )


def _array(x: Tensor) -> NDArray[Any]:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
