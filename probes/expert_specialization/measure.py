"""What the study asks of the model: its routing, its loss without each expert, and its routing with random
routers."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hydra_lab import metrics
from hydra_lab.capture import record
from hydra_lab.capture.path_use import batches, sample_losses
from hydra_lab.data.samples import Samples
from hydra_lab.interventions import AblateExpert, intervened
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath
from probes.expert_specialization.analysis import Observation

TOKEN_CLASSES = ("word", "word piece", "digit", "punctuation", "white space", "special")
"""A word starts with a space and has letters; a word piece has letters alone."""


def token_classes(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """[vocabulary] class of each token id, an index of `TOKEN_CLASSES`."""
    special = set(tokenizer.all_special_ids)
    classes = np.zeros(len(tokenizer), dtype=np.int64)
    for token in range(len(tokenizer)):
        name = "special" if token in special else _class_of(str(tokenizer.decode([token])))
        classes[token] = TOKEN_CLASSES.index(name)
    return classes


def _class_of(text: str) -> str:
    if any(character.isdigit() for character in text):
        return "digit"
    if any(character.isalpha() for character in text):
        return "word" if text[0].isspace() else "word piece"
    return "white space" if text.isspace() else "punctuation"


def observe(
    model: HydraForCausalLM, samples: Samples, classes: NDArray[np.int64], *, batch_size: int
) -> Observation:
    """The model's routing on `samples`.

    Args:
        classes: [vocabulary] class of each token id.
    """
    config = model.config
    layers = tuple(config.layers_with("moe"))
    num_samples, num_tokens = samples.tokens.shape
    num_chunks = -(-num_tokens // config.moe_chunk_size)
    experts = np.zeros((len(layers), num_samples, num_chunks, config.moe_top_k), dtype=np.int64)
    weights = np.zeros((len(layers), num_samples, num_tokens, config.moe_top_k))
    for rows, input_ids, attention_mask in batches(samples, batch_size):
        recording = record(model, input_ids, attention_mask, taps="moe.routing")
        for y, decision in enumerate(recording.by_layer("moe.routing").values()):
            experts[y, rows, : decision.experts.shape[1]] = decision.experts.cpu().numpy()
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
    inside = np.arange(num_tokens) < samples.length[:, None]
    return Observation(routing, np.where(inside, classes[samples.tokens], -1), TOKEN_CLASSES)


def ablate(
    model: HydraForCausalLM,
    samples: Samples,
    observation: Observation,
    *,
    batch_size: int,
    progress: Callable[[str], None],
) -> NDArray[np.float64]:
    """[Y, E, N] loss of each sample without each expert minus its loss with it, nats per token.

    An expert that is missing adds nothing, while the other experts of the chunk keep their weights.

    A sample that never chooses the expert cannot change (routing depends on earlier blocks and tokens only),
    so it is not run.

    Args:
        observation: the model's routing on the same samples.
    """
    layers, num_experts = observation.routing.layers, observation.routing.num_experts
    chosen_YNE = np.asarray(observation.routing.chosen.any(axis=2))
    intact_N = sample_losses(model, samples, batch_size=batch_size)
    increase = np.zeros((len(layers), num_experts, len(samples)))
    for y, layer in enumerate(layers):
        for expert in range(num_experts):
            rows = np.flatnonzero(chosen_YNE[y, :, expert])
            progress(f"block {layer} without expert {expert}: {len(rows)} of {len(samples)} samples use it")
            if len(rows) == 0:
                continue
            with intervened(model, AblateExpert(block=layer, expert=expert, renormalize=False)):
                losses = sample_losses(model, samples.take(rows), batch_size=batch_size)
            increase[y, expert, rows] = losses - intact_N[rows]
    return increase


def with_random_routers(model: HydraForCausalLM, seed: int) -> HydraForCausalLM:
    """A copy of `model` whose routers are new: their weights redrawn at random with the trained weights'
    spread, the tokens' own say in the weights at zero as before training."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, MoEPath):
            weight = module.router.weight.data
            drawn = torch.randn(weight.shape, generator=generator) * weight.float().std().cpu()
            weight.copy_(drawn)
            module.token_router.weight.data.zero_()
    return copied
