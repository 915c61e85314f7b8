"""A step in place gives what a step of `model` gives; the captured graph of it is tested where there is a GPU."""

import pytest
import torch

from hydra_lab.decoding import DecodeGraph, StaticStep, prefill
from tests.helpers import lively_model, random_ids


@pytest.mark.parametrize("inference", [False, True])
def test_a_step_in_place_equals_a_step(inference: bool) -> None:
    """Rows of different lengths, over the ends of chunks and blocks; the cache that it began from is left alone."""
    model = lively_model()
    ids = random_ids(model.config, 2, 50)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    with torch.inference_mode(inference), torch.no_grad():
        cache = model(input_ids=ids[:, :20], attention_mask=mask, use_cache=True).past_key_values
        step = StaticStep(model, cache, room=30)
        places = (step.logits.data_ptr(), step._cache.states[1]["attention"].keys.data_ptr())
        for t in range(20, 50):
            step.input_ids.copy_(ids[:, t : t + 1])
            step.run()
            expected = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
            assert (step.logits - expected).abs().max() <= 1e-5
        assert places == (step.logits.data_ptr(), step._cache.states[1]["attention"].keys.data_ptr())


def test_a_graph_needs_a_gpu() -> None:
    model = lively_model()
    with torch.no_grad():
        cache = model(input_ids=random_ids(model.config, 1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is on 'cpu'"):
        DecodeGraph(model, cache, room=5)


def test_a_prompt_in_pieces_is_the_prompt_at_once() -> None:
    """With a row that is padding throughout the first piece, and pieces that end anywhere in chunks and blocks."""
    model = lively_model()
    ids = random_ids(model.config, 2, 50)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, :19] = 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=True)
        after = model(input_ids=ids[:, :1], past_key_values=whole.past_key_values)
    pieces = prefill(model, ids, mask, piece=17)
    torch.testing.assert_close(pieces.logits, whole.logits[:, -1:], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        next_step = model(input_ids=ids[:, :1], past_key_values=pieces.past_key_values)
    torch.testing.assert_close(next_step.logits, after.logits, rtol=1e-4, atol=1e-4)


def test_a_prompt_without_a_token_cannot_be_read() -> None:
    model = lively_model()
    with pytest.raises(ValueError, match=r"needs a token .* got \[1, 0\]"):
        prefill(model, torch.zeros(1, 0, dtype=torch.long))
