"""What the studies of experts ask of a model: which experts it chose, and its loss without some of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab import metrics
from hydra_lab.capture import record
from hydra_lab.capture.path_use import batches, sample_losses
from hydra_lab.data.samples import Samples
from hydra_lab.interventions import AblateExpert, intervened
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Routing


@dataclass(frozen=True, eq=False)
class ObservedRouting:
    """A model's routing on some samples.

    Attributes:
        record: the choices and weights of all blocks with experts.
        logits: [Y, N, C, E] router logits of each chunk; 0 past a sample's end.
    """

    record: metrics.RoutingRecord
    logits: NDArray[np.float64]

    @property
    def margin(self) -> NDArray[np.float64]:
        """[Y, N, C] how far a chunk was from another set of experts: the logit of the last expert that was chosen
        less that of the first that was not; NaN past a sample's end, and where every expert is chosen."""
        num_chosen = self.record.experts.shape[-1]
        falling = -np.sort(-self.logits, axis=-1)
        if num_chosen == falling.shape[-1]:
            return np.full(falling.shape[:-1], np.nan)
        margin = falling[..., num_chosen - 1] - falling[..., num_chosen]
        return np.where(self.record.chunk_mask, margin, np.nan)


def observe_routing(model: HydraForCausalLM, samples: Samples, *, batch_size: int) -> ObservedRouting:
    """Run `model` on `samples` and keep what its routers decided."""
    config = model.config
    layers = tuple(config.layers_with("moe"))
    num_samples, num_tokens = samples.tokens.shape
    num_chunks = -(-num_tokens // config.moe_chunk_size)
    experts = np.zeros((len(layers), num_samples, num_chunks, config.moe_top_k), dtype=np.int64)
    logits = np.zeros((len(layers), num_samples, num_chunks, config.moe_num_experts))
    weights = np.zeros((len(layers), num_samples, num_tokens, config.moe_top_k))
    for rows, input_ids, attention_mask in batches(samples, batch_size):
        recording = record(model, input_ids, attention_mask, taps="moe.routing")
        for y, decision in enumerate(recording.by_layer("moe.routing").values()):
            experts[y, rows, : decision.experts.shape[1]] = decision.experts.cpu().numpy()
            logits[y, rows, : decision.logits.shape[1]] = decision.logits.float().cpu().numpy()
            weights[y, rows, : decision.weights.shape[1]] = decision.weights.float().cpu().numpy()
    routing = metrics.RoutingRecord(
        layers=layers,
        experts=experts,
        num_experts=config.moe_num_experts,
        chunk_size=config.moe_chunk_size,
        length=samples.length,
        domains=samples.domains,
        weights=weights,
    )
    return ObservedRouting(routing, logits)


def costs_of_removal(
    model: HydraForCausalLM,
    samples: Samples,
    removals: Sequence[tuple[int, tuple[int, ...]]],
    affected_RN: NDArray[np.bool_],
    *,
    batch_size: int,
    progress: Callable[[str], None],
) -> NDArray[np.float64]:
    """[R, N] loss of each sample without the experts of each removal minus its loss with all, nats per token.

    An expert that is removed adds nothing, while the other experts of the chunk keep their weights.

    Args:
        removals: (block, experts) of each of the R removals.
        affected_RN: which samples to run; the others count as 0. A sample that never chooses an expert cannot change:
            a block's routing depends on earlier blocks and tokens only.
    """
    intact_N = sample_losses(model, samples, batch_size=batch_size)
    cost_RN = np.zeros((len(removals), len(samples)))
    for r, (layer, experts) in enumerate(removals):
        rows = np.flatnonzero(affected_RN[r])
        named = " and ".join(map(str, experts))
        progress(f"block {layer} without expert {named}: {len(rows)} of {len(samples)} samples use it")
        if len(rows) == 0:
            continue
        changes = [AblateExpert(block=layer, expert=expert, renormalize=False) for expert in experts]
        with intervened(model, *changes):
            losses = sample_losses(model, samples.take(rows), batch_size=batch_size)
        cost_RN[r, rows] = losses - intact_N[rows]
    return cost_RN


def cost_of_each_expert(
    model: HydraForCausalLM,
    samples: Samples,
    routing: metrics.RoutingRecord,
    *,
    batch_size: int,
    progress: Callable[[str], None],
) -> NDArray[np.float64]:
    """[Y, E, N] loss of each sample without each expert minus its loss with it, nats per token.

    Args:
        routing: the model's on the same samples.
    """
    removals = [(layer, (expert,)) for layer in routing.layers for expert in range(routing.num_experts)]
    used_YNE = np.asarray(routing.chosen.any(axis=2))
    affected_RN = np.moveaxis(used_YNE, 2, 1).reshape(len(removals), len(samples))
    costs_RN = costs_of_removal(
        model, samples, removals, affected_RN, batch_size=batch_size, progress=progress
    )
    return costs_RN.reshape(len(routing.layers), routing.num_experts, len(samples))


def cost_of_random_removals(
    model: HydraForCausalLM,
    samples: Samples,
    routing: metrics.RoutingRecord,
    *,
    num_draws: int,
    seed: int,
    batch_size: int,
    progress: Callable[[str], None],
) -> NDArray[np.float64]:
    """[Y, R, N] cost of removing choices at random, each with chance 1/E: as many as a mean expert has.

    Args:
        routing: the model's on the same samples.
        num_draws: R.
        seed: of the choices.
    """
    rng = np.random.default_rng(seed)
    intact_N = sample_losses(model, samples, batch_size=batch_size)
    cost_YRN = np.zeros((len(routing.layers), num_draws, len(samples)))
    for y, layer in enumerate(routing.layers):
        for draw in range(num_draws):
            progress(f"block {layer} without choices at random, {draw + 1} of {num_draws}")
            removed_NCK = rng.random(routing.experts.shape[1:]) < 1 / routing.num_experts
            for start in range(0, len(samples), batch_size):
                rows = np.arange(start, min(start + batch_size, len(samples)))
                removed_BCK = torch.from_numpy(removed_NCK[rows])
                with model_lock(model), _without_choices(model, layer, removed_BCK):
                    losses = sample_losses(model, samples.take(rows), batch_size=batch_size)
                cost_YRN[y, draw, rows] = losses - intact_N[rows]
    return cost_YRN


@contextmanager
def _without_choices(model: HydraForCausalLM, layer: int, removed_BCK: Tensor) -> Iterator[None]:
    """Within the context, the marked choices of each chunk of a batch add nothing."""

    def remove(_module: object, _inputs: object, decision: Routing) -> Routing:
        chunk, num_tokens = model.config.moe_chunk_size, decision.weights.shape[1]
        removed_BLK = removed_BCK.to(decision.weights.device).repeat_interleave(chunk, dim=1)[:, :num_tokens]
        return decision._replace(weights=decision.weights.masked_fill(removed_BLK, 0.0))

    handle = model.get_submodule(f"model.layers.{layer}.moe.routing").register_forward_hook(remove)
    try:
        yield
    finally:
        handle.remove()
