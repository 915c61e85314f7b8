"""Changes to a mixture of experts, at the tap `moe.routing`.

Shape suffixes: B rows, L positions of the piece, C its chunks, K experts of a chunk, R rows of a table.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_lab.config import HydraConfig
from hydra_lab.interventions.arguments import Flag, Index, Indices, Table, number
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.hooks import Passage, edited, noted, removed
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath
from hydra_lab.taps import Routing


@dataclass(frozen=True, kw_only=True)
class AblateExpert(Intervention):
    """The expert adds nothing. Chunks that did not choose it do not change.

    Attributes:
        expert: the expert.
        renormalize: whether its weight goes to the other experts of the chunk, in proportion (a chunk that chose it
            alone gets nothing either way), or is lost, as if the expert's output were zero.
    """

    action: ClassVar[str] = "ablate"
    path: str = field(default="moe", init=False)
    expert: Index
    renormalize: Flag = True

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("expert", self.expert, config.moe_num_experts)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        path = model.model.blocks[block].moe

        def without(decision: Routing) -> Routing:
            experts_BLK = passage.grid(path.chunk_size).to_tokens(decision.experts)
            weights_BLK = removed(decision.weights, experts_BLK == self.expert, self.renormalize)
            return decision._replace(weights=weights_BLK)

        with noted(path) as passage, edited(path.routing, without):
            yield


@dataclass(frozen=True, kw_only=True)
class ForceExperts(Intervention):
    """Every chunk uses these experts and no others.

    A token's weights are those that the model's own rule gives to these experts: the softmax over them of the chunk's
    router logits plus the token's.

    Attributes:
        expert: one expert, which then has the whole weight; or
        experts: several, at most as many as a chunk uses (`moe_top_k`).
    """

    action: ClassVar[str] = "force"
    path: str = field(default="moe", init=False)
    expert: Index | None = None
    experts: Indices | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.expert is None) == (self.experts is None) or self.experts == ():
            raise self.wrong("give either expert or experts, and at least one of them")

    @property
    def chosen(self) -> Sequence[int]:
        """The experts, one or several."""
        return (self.experts or ()) if self.expert is None else (self.expert,)

    def check_arguments(self, config: HydraConfig) -> None:
        _check_experts(self, self.chosen, config)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        path = model.model.blocks[block].moe

        def only(decision: Routing) -> Routing:
            rows_BC = torch.zeros(
                decision.experts.shape[:2], dtype=torch.long, device=decision.experts.device
            )
            return _rerouted(decision, (self.chosen,), rows_BC, path, passage)

        with noted(path) as passage, edited(path.routing, only):
            yield


@dataclass(frozen=True, kw_only=True)
class RouteChunks(Intervention):
    """Each chunk uses the experts that a table gives it; weights as in `ForceExperts`.

    Attributes:
        experts: entry c lists the experts of chunk c (at most `moe_top_k`), counted from a row's first token. An empty
            entry, and a chunk past the table, leaves the choice to the model.
    """

    action: ClassVar[str] = "route"
    path: str = field(default="moe", init=False)
    experts: Table

    def check_arguments(self, config: HydraConfig) -> None:
        for chosen in self.experts:
            _check_experts(self, chosen, config)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        path = model.model.blocks[block].moe
        rows = (*self.experts, ())  # the last one stands for every later chunk

        def by_table(decision: Routing) -> Routing:
            chunk_BC = passage.chunk_indices(passage.grid(path.chunk_size))
            return _rerouted(decision, rows, chunk_BC.clamp(max=len(self.experts)), path, passage)

        with noted(path) as passage, edited(path.routing, by_table):
            yield


@dataclass(frozen=True, kw_only=True)
class TemperRouting(Intervention):
    """The weights of a token's experts become the softmax of their logits over a temperature; which experts are chosen
    does not depend on it, and a token's weights keep their sum.

    Attributes:
        value: 1e-6 or more; 1 changes nothing, a large one weighs the chosen experts alike.
    """

    action: ClassVar[str] = "temperature"
    path: str = field(default="moe", init=False)
    value: Annotated[float, number(1e-6)]

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def tempered(decision: Routing) -> Routing:
            weights_BLK, total_BL1 = decision.weights, decision.weights.sum(dim=-1, keepdim=True)
            is_ablated_BLK = (weights_BLK == 0) & (total_BL1 > 0)
            scores_BLK = torch.where(weights_BLK > 0, weights_BLK, 1.0).log() / self.value
            softened_BLK = scores_BLK.masked_fill(is_ablated_BLK, -torch.inf).softmax(dim=-1)
            return decision._replace(weights=total_BL1 * softened_BLK)

        with edited(model.model.blocks[block].moe.routing, tempered):
            yield


def _check_experts(change: Intervention, experts: Sequence[int], config: HydraConfig) -> None:
    change.check_below("expert", experts, config.moe_num_experts)
    if len(experts) > config.moe_top_k:
        raise change.wrong(
            f"a chunk of this model uses at most {config.moe_top_k} experts, got {list(experts)}"
        )


def _rerouted(
    decision: Routing, rows: Sequence[Sequence[int]], row_BC: Tensor, path: MoEPath, passage: Passage
) -> Routing:
    """The decision with the experts of row `row_BC` of a table in each chunk; an empty row leaves the chunk alone."""
    size, device = decision.experts.shape[-1], decision.experts.device
    # A chunk always names as many experts; those that the row leaves open repeat its first, with weight 0.
    experts_RK = torch.tensor(
        [(list(row) + [row[0] if row else 0] * size)[:size] for row in rows], device=device
    )
    used_RK = torch.tensor([[entry < len(row) for entry in range(size)] for row in rows], device=device)
    is_given_BC = used_RK.any(dim=-1)[row_BC]
    experts_BCK = torch.where(is_given_BC[..., None], experts_RK[row_BC], decision.experts)

    grid = passage.grid(path.chunk_size)
    with torch.autocast(device.type, enabled=False):  # as the router itself
        token_logits_BLE = F.linear(passage.hidden.float(), path.token_router.weight.float())
    logits_BLE = grid.to_tokens(decision.logits) + token_logits_BLE
    scores_BLK = logits_BLE.gather(-1, grid.to_tokens(experts_BCK))
    is_given_BL1 = grid.to_tokens(is_given_BC)[..., None]
    used_BLK = grid.to_tokens(used_RK[row_BC]) | ~is_given_BL1
    weights_BLK = scores_BLK.masked_fill(~used_BLK, -torch.inf).softmax(dim=-1)
    return decision._replace(
        experts=experts_BCK, weights=torch.where(is_given_BL1, weights_BLK, decision.weights)
    )
