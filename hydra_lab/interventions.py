"""Change which experts a model uses, by hooks on the tap that carries the choice; the model itself stays as it was.

These are plain torch hooks, so whatever runs inside the context sees them: a forward pass, `model.generate`,
`capture.record`, `capture.path_use`. To cut a whole path there is `HydraForCausalLM.cut`. As with any hook, a thread
that shares the model with others holds its lock (`hydra_lab.locks.model_lock`) for as long as the context is open.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hydra_lab.chunks import ChunkGrid, Span
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath
from hydra_lab.taps import Routing


@contextmanager
def ablate_expert(model: HydraForCausalLM, layer: int, expert: int) -> Iterator[None]:
    """Within the context, `expert` of block `layer` adds nothing: its weight goes to the other experts of the chunk.

    Chunks that did not choose the expert are not changed. A chunk that chose it alone (top-1) gets nothing from the
    path.

    Raises:
        ValueError: block `layer` has no experts, or no such one.
    """

    def without(decision: Routing, experts_BLK: Tensor) -> Routing:
        kept_BLK = decision.weights.masked_fill(experts_BLK == expert, 0.0)
        total_BL1 = kept_BLK.sum(dim=-1, keepdim=True)
        weights = torch.where(total_BL1 > 0, kept_BLK / total_BL1.clamp(min=1e-30), 0.0)
        chose_BL1 = (experts_BLK == expert).any(dim=-1, keepdim=True)
        return decision._replace(weights=torch.where(chose_BL1, weights, decision.weights))

    with _routing_replaced(model, layer, expert, without):
        yield


@contextmanager
def force_expert(model: HydraForCausalLM, layer: int, expert: int) -> Iterator[None]:
    """Within the context, every chunk of block `layer` uses `expert` and no other.

    Raises:
        ValueError: block `layer` has no experts, or no such one.
    """

    def only(decision: Routing, _experts_BLK: Tensor) -> Routing:
        # The weights of a token sum to 1, and all of them now fall on one expert.
        return decision._replace(experts=torch.full_like(decision.experts, expert))

    with _routing_replaced(model, layer, expert, only):
        yield


@contextmanager
def _routing_replaced(
    model: HydraForCausalLM, layer: int, expert: int, replace: Callable[[Routing, Tensor], Routing]
) -> Iterator[None]:
    """`replace` receives the decision and the experts [B, L, K] of each token."""
    layers = model.config.layers_with("moe")
    if layer not in layers:
        raise ValueError(f"block {layer} has no experts; blocks {', '.join(map(str, layers)) or 'none'} have")
    if not 0 <= expert < model.config.moe_num_experts:
        raise ValueError(
            f"expert {expert} is not among the experts 0 to {model.config.moe_num_experts - 1} of block {layer}"
        )
    path = model.model.layers[layer].moe
    assert isinstance(path, MoEPath)
    spans: list[Span] = []  # of the pass that is under way; tells which chunk each token lies in

    def note_span(_module: nn.Module, inputs: tuple[Tensor, Span, object]) -> None:
        spans[:] = [inputs[1]]

    def edit(_module: nn.Module, _inputs: object, decision: Routing) -> Routing:
        grid = ChunkGrid(spans[0], path.chunk_size, decision.experts.shape[0], decision.experts.device)
        return replace(decision, grid.to_tokens(decision.experts))

    handles = [path.register_forward_pre_hook(note_span), path.routing.register_forward_hook(edit)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
