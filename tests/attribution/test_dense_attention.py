"""Dense attention beside the sparse one: against torch's own attention, and against the model where all is in view."""

from typing import Any

import numpy as np
import pytest
import torch

from hydra_lab.attribution import dense_attention, mean_coverage
from hydra_lab.interventions import ForbidBlocks, SelectBlocks, intervened
from tests.helpers import lively_model, random_ids


def model_and_layer(**fields: Any) -> tuple[Any, int]:
    model: Any = lively_model(seed=3, **fields)
    return model, model.config.layers_with("attention")[0]


def test_what_is_wanted_is_the_softmax_of_all_earlier_keys() -> None:
    model, layer = model_and_layer()
    ids = random_ids(model.config, 2, 45)
    path = model.model.layers[layer].attention
    inputs: list[torch.Tensor] = []
    handle = path.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        query = path.q_proj(inputs[0]).unflatten(-1, (path.num_heads, path.head_dim)).transpose(1, 2)
        key = path.k_proj(inputs[0]).unflatten(-1, (path.num_kv_heads, path.head_dim)).transpose(1, 2)
        # Values that are one-hot in the block of their key turn torch's attention into sums by block.
        num_blocks = -(-45 // path.block_size)
        one_hot = torch.eye(num_blocks)[torch.arange(45) // path.block_size].expand(2, path.num_heads, 45, -1)
        key = key.repeat_interleave(path.num_heads // path.num_kv_heads, dim=1)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, one_hot, is_causal=True)
    found = dense_attention(model, ids, layer)
    np.testing.assert_allclose(found.wanted, expected.mean(dim=1).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.wanted.sum(axis=-1), 1.0, rtol=1e-5)
    assert (found.shown <= found.wanted + 1e-6).all()


def test_everything_is_shown_within_the_window_and_less_beyond() -> None:
    model, layer = model_and_layer()
    path = model.model.layers[layer].attention
    ids = random_ids(model.config, 1, 4 * path.window)
    with intervened(
        model, ForbidBlocks(block=layer, blocks=list(range(1, 4 * path.window // path.block_size)))
    ):
        without = dense_attention(model, ids, layer)
    np.testing.assert_allclose(without.coverage[0, : path.window], 1.0, rtol=1e-5)
    assert mean_coverage(without, beyond=2 * path.window) < 0.95
    block = 1
    with intervened(model, SelectBlocks(block=layer, blocks=[block])):
        chosen = dense_attention(model, ids, layer)
    far = slice(2 * path.window, None)
    np.testing.assert_allclose(chosen.shown[0, far, block], chosen.wanted[0, far, block], rtol=1e-5)
    assert (without.shown[0, far, block] < without.wanted[0, far, block]).all()


def test_padding_and_missing_paths() -> None:
    model, layer = model_and_layer()
    ids = random_ids(model.config, 2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    padded, alone = dense_attention(model, ids, layer, mask=mask), dense_attention(model, ids[1:, :12], layer)
    num_blocks = alone.wanted.shape[-1]
    np.testing.assert_allclose(padded.wanted[1, :12, :num_blocks], alone.wanted[0], rtol=1e-4, atol=1e-6)
    assert (padded.wanted[1, 12:] == 0).all()
    with pytest.raises(ValueError, match="no attention path"):
        dense_attention(model, ids, 0 if layer else 1)
