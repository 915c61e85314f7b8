"""What the study asks of the model: its routing beside the tokens' classes, and its routing with random routers."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hydra_lab import metrics
from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath
from hydra_lab.probing.experts import observe_routing
from probes.expert_specialization.analysis import Observation


def token_classes(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """[vocabulary] class of each token id, an index of `metrics.TOKEN_CLASSES`."""
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    return metrics.token_classes(texts, tokenizer.all_special_ids)


def observe(
    model: HydraForCausalLM, samples: Samples, classes: NDArray[np.int64], *, batch_size: int
) -> Observation:
    """The model's routing on `samples`.

    Args:
        classes: [vocabulary] class of each token id.
    """
    seen = observe_routing(model, samples, batch_size=batch_size)
    inside = np.arange(samples.tokens.shape[1]) < samples.length[:, None]
    return Observation(
        seen.record, np.where(inside, classes[samples.tokens], -1), metrics.TOKEN_CLASSES, seen.margin
    )


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
