"""The decode cache: copies are independent although they share memory, and a step does not copy what it keeps."""

import pytest
import torch
from torch import Tensor

from hydra_lab.cache import HydraCache
from hydra_lab.modeling import HydraForCausalLM
from tests.helpers import lively_model, random_ids

ATTENTION = 1  # a block of `nano` with the attention path


def continued(model: HydraForCausalLM, cache: HydraCache, ids: Tensor) -> Tensor:
    """Logits of `ids` as the next tokens, one step at a time; the cache moves on."""
    return torch.cat(
        [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1
    )


@pytest.mark.parametrize("inference", [False, True])
def test_copies_that_continue_differently_do_not_disturb_each_other(inference: bool) -> None:
    model = lively_model()
    prompt = random_ids(model.config, 2, 61)
    endings = [random_ids(model.config, 2, 12, seed=seed) for seed in (1, 2, 3)]
    with torch.inference_mode(inference), torch.no_grad():
        expected = [model(input_ids=torch.cat([prompt, ending], 1)).logits[:, 61:] for ending in endings]
        cache = model(input_ids=prompt[:, :60], use_cache=True).past_key_values
        continued(
            model, cache, prompt[:, 60:]
        )  # from here on there is room behind the tokens, which all share
        caches = [cache, cache.copy(), cache.copy()]
        found: list[list[Tensor]] = [[], [], []]
        for step in range(12):
            for each, ending, logits in zip(caches, endings, found, strict=True):
                logits.append(continued(model, each, ending[:, step : step + 1]))
    for logits, want in zip(found, expected, strict=True):
        assert (torch.cat(logits, 1) - want).abs().max() <= 1e-4


def test_a_step_writes_behind_the_tokens_it_keeps() -> None:
    """Decoding in place is what makes a step cost the same at any context; with gradients nothing is overwritten."""
    model = lively_model()
    ids = random_ids(model.config, 1, 40)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        model(input_ids=ids[:, 20:21], past_key_values=cache)
        before = cache.states[ATTENTION]["attention"].keys
        model(input_ids=ids[:, 21:22], past_key_values=cache)
        assert cache.states[ATTENTION]["attention"].keys.data_ptr() == before.data_ptr()
    model(input_ids=ids[:, 22:23], past_key_values=cache, use_cache=True)
    assert cache.states[ATTENTION]["attention"].keys.data_ptr() != before.data_ptr()


def test_a_reordered_cache_continues_its_rows() -> None:
    model = lively_model()
    ids = random_ids(model.config, 2, 30)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 1]))
        logits = continued(model, cache, ids[1:, 20:].expand(2, -1))
        expected = model(input_ids=ids[1:]).logits[:, 20:].expand(2, -1, -1)
    assert (logits - expected).abs().max() <= 1e-4
