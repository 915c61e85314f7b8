"""What the study asks of the model: its routing beside the tokens' classes, and its routing with random routers."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath
from hydra_lab.probing.experts import observe_routing
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
    seen = observe_routing(model, samples, batch_size=batch_size)
    inside = np.arange(samples.tokens.shape[1]) < samples.length[:, None]
    return Observation(seen.record, np.where(inside, classes[samples.tokens], -1), TOKEN_CLASSES, seen.margin)


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
