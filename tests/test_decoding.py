"""A step in place gives what a step of `model` gives; the captured graph of it is tested where there is a GPU."""

import pytest
import torch

from hydra_lab.decoding import DecodeGraph, StaticStep
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
