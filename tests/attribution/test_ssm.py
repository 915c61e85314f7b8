"""Effective attention rebuilds what the ssm path's recurrence puts out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hydra_lab
from hydra_lab.attribution import ssm_attention
from tests.helpers import lively_model, random_ids


def scan_outputs(model: Any, layer: int, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, H, L, P] what the path itself hands to its output norm."""
    path = model.model.layers[layer].ssm
    seen: list[Tensor] = []
    handle = path.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return seen[0].unflatten(-1, (path.num_heads, path.head_dim)).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", [0, 3])
def test_m_x_and_d_x_rebuild_the_output(groups: int, layer: int) -> None:
    model: Any = lively_model(seed=2, ssm_num_groups=groups)
    with torch.no_grad():
        model.model.layers[layer].ssm.D.uniform_(-1, 1)
        model.model.layers[layer].ssm.dt_bias.uniform_(-2, 1)  # decays that show within a few tokens
    ids = random_ids(model.config, 2, 29)
    found = ssm_attention(model, ids, layer)
    expected = scan_outputs(model, layer, ids).numpy()
    # 1e-5 of the largest output: the scan adds the same terms chunk by chunk
    np.testing.assert_allclose(found.output(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    without = found.matrix @ found.inputs
    assert np.abs(without - expected).max() > 0.1 * np.abs(expected).max(), "the skip should matter here"
    assert (np.triu(found.matrix, 1) == 0).all()


def test_m_x_and_d_x_rebuild_the_output_of_the_shipped_model_with_padding() -> None:
    model, tokenizer = hydra_lab.load("demo")
    texts = ["Q: country of Osaka? A: Japan\n" * 12, "def add(a, b):\n    return a + b\n"]
    tokens = [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_side="left")
    length = [len(each) for each in tokens]
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(length)[:, None]).long()
    for layer in (0, 3):
        found = ssm_attention(model, ids, layer, mask=mask)
        expected = scan_outputs(model, layer, ids, mask).numpy()
        for row, size in enumerate(length):
            ours, theirs = found.output()[row, :, :size], expected[row, :, :size]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
        assert (found.matrix[1, :, length[1] :] == 0).all() and (
            found.matrix[1, :, :, length[1] :] == 0
        ).all()


def test_views_and_chosen_heads() -> None:
    model = lively_model(seed=2)
    ids = random_ids(model.config, 2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    whole, some = (
        ssm_attention(model, ids, 1, mask=mask),
        ssm_attention(model, ids, 1, heads=(3, 0), mask=mask),
    )
    np.testing.assert_array_equal(some.matrix, whole.matrix[:, [3, 0]])
    np.testing.assert_array_equal(some.inputs, whole.inputs[:, [3, 0]])
    assert some.heads == (3, 0) and ssm_attention(model, ids, 1, heads=2).heads == (2,)
    np.testing.assert_allclose(whole.normalised()[0].sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(whole.normalised()[1, :, 9:], 0.0)
    by_hand = np.linalg.norm(whole.matrix[0, 2, 7, 4] * whole.inputs[0, 2, 4])
    assert whole.contribution()[0, 2, 7, 4] == pytest.approx(by_hand, rel=1e-5)


def test_a_decay_that_a_hook_writes_is_in_the_matrix() -> None:
    model: Any = lively_model(seed=2)
    ids = random_ids(model.config, 1, 12)
    tap = model.model.layers[1].ssm.state

    def forget(_module: Any, _args: Any, summary: Any) -> Any:
        decay = summary.decay.clone()
        decay[:, 6] = -80.0
        return summary._replace(decay=decay)

    handle = tap.register_forward_hook(forget)
    try:
        found = ssm_attention(model, ids, 1)
        expected = scan_outputs(model, 1, ids).numpy()
    finally:
        handle.remove()
    assert np.abs(found.matrix[:, :, 6:, :6]).max() < 1e-20
    np.testing.assert_allclose(found.output(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_what_is_not_there_is_refused() -> None:
    model = lively_model(seed=2)
    ids = random_ids(model.config, 1, 4)
    with pytest.raises(ValueError, match="layer 4 is not among the blocks 0 to 3"):
        ssm_attention(model, ids, 4)
    with pytest.raises(ValueError, match=r"heads \[4\] are not among the heads 0 to 3"):
        ssm_attention(model, ids, 0, heads=[1, 4])
    model.set_path_scale("ssm", 0.0)
    with pytest.raises(ValueError, match="the ssm path of block 1 is switched off"):
        ssm_attention(model, ids, 1)
