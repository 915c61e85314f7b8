"""Logit lens and direct logit attribution, against the model's own logits and against sums written out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hydra_lab
from hydra_lab.attribution import block_paths, direct_logit_attribution, logit_lens
from tests.attribution.hooks import contribution, output_of
from tests.helpers import lively_model, random_ids


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model(seed=1)


@pytest.fixture(scope="module")
def ids(model: Any) -> Tensor:
    return random_ids(model.config, 2, 21)


LEFT = torch.ones(2, 21, dtype=torch.long)
LEFT[0, :6] = 0


@torch.no_grad()
def test_the_last_depth_is_what_the_model_predicts(model: Any, ids: Tensor) -> None:
    lens = logit_lens(model, ids, num_tokens=4)
    log = model(ids, use_cache=False).logits.log_softmax(dim=-1)
    best = log.topk(4, dim=-1)
    assert lens.depths[-1] == "block 3"
    np.testing.assert_array_equal(lens.tokens[-1], best.indices.numpy())
    np.testing.assert_allclose(lens.probability[-1], best.values.exp().numpy(), rtol=1e-5)
    following = log[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].exp().numpy()
    np.testing.assert_allclose(lens.actual_probability[-1, :, :-1], following, rtol=1e-5)
    np.testing.assert_allclose(lens.kl[-1], 0.0, atol=1e-5)
    assert (lens.kl[0] > 0.1).all(), "the embedding alone should not predict like the model"
    assert np.isnan(lens.actual_probability[:, :, -1]).all() and (lens.actual_rank[:, :, -1] == -1).all()


@torch.no_grad()
def test_a_depth_is_the_final_norm_and_head_on_that_blocks_output(model: Any, ids: Tensor) -> None:
    lens = logit_lens(model, ids)
    residual = output_of(model, model.model.layers[1], ids)
    scale = (residual.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    logits = (residual / scale * model.model.norm.weight) @ model.lm_head.weight.T
    final = model(ids, use_cache=False).logits
    for row, position in ((0, 0), (1, 13)):
        at = logits[row, position]
        order = at.argsort(descending=True)
        assert lens.tokens[2, row, position].tolist() == order[:5].tolist()
        rank = order.tolist().index(int(ids[row, position + 1])) + 1
        assert lens.actual_rank[2, row, position] == rank
        p, q = final[row, position].softmax(-1), at.softmax(-1)
        assert lens.kl[2, row, position] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_padding_changes_nothing(model: Any, ids: Tensor) -> None:
    padded, alone = logit_lens(model, ids, LEFT), logit_lens(model, ids[:1, 6:])
    assert padded.length.tolist() == [15, 21]
    np.testing.assert_array_equal(padded.ids[0, :15], alone.ids[0])
    np.testing.assert_array_equal(padded.tokens[:, 0, :15], alone.tokens[:, 0])
    np.testing.assert_array_equal(padded.actual_rank[:, 0, :15], alone.actual_rank[:, 0])
    np.testing.assert_allclose(padded.kl[:, 0, :15], alone.kl[:, 0], rtol=1e-4, atol=1e-5)
    assert np.isnan(padded.kl[:, 0, 15:]).all() and (padded.tokens[:, 0, 15:] == -1).all()
    parts = direct_logit_attribution(model, ids, mask=LEFT)
    np.testing.assert_allclose(
        parts.effect[:, 0, :14],
        direct_logit_attribution(model, ids[:1, 6:]).effect[:, 0, :14],
        rtol=1e-3,
        atol=1e-5,
    )
    assert np.isnan(parts.effect[:, 0, 14:]).all()


@torch.no_grad()
def test_the_parts_sum_to_the_logits(model: Any, ids: Tensor) -> None:
    logits = model(ids, use_cache=False).logits
    fixed = direct_logit_attribution(model, ids, 5)
    # 1e-4 of logits near 10: some 15 parts of mixed sign are added up in fp32
    np.testing.assert_allclose(fixed.effect.sum(0), logits[..., 5].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(fixed.logit, logits[..., 5].numpy())
    following = direct_logit_attribution(model, ids)
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].numpy()
    np.testing.assert_allclose(following.effect[..., :-1].sum(0), expected, rtol=1e-4, atol=1e-4)
    assert (following.tokens[:, -1] == -1).all() and np.isnan(following.logit[:, -1]).all()
    contrast = random_ids(model.config, 2, 21, seed=9)
    difference = direct_logit_attribution(model, ids, 5, contrast=contrast)
    expected = (logits[..., 5] - logits.gather(-1, contrast[..., None])[..., 0]).numpy()
    np.testing.assert_allclose(difference.effect.sum(0), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_part_is_the_paths_contribution_through_the_norm(model: Any, ids: Tensor) -> None:
    added = output_of(model, contribution(model, "layers.2.memory"), ids)
    stream = output_of(model, model.model.layers[-1], ids)
    parts = direct_logit_attribution(model, ids, 5)
    assert parts.parts == ("embedding", *block_paths(model))
    scale = (stream.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    by_hand = (added / scale * model.model.norm.weight) @ model.lm_head.weight[5]
    found = parts.effect[parts.parts.index("layers.2.memory")]
    np.testing.assert_allclose(found, by_hand.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(found).max() > 0.01
    with model.cut("memory"):
        cut = direct_logit_attribution(model, ids, 5)
    assert (cut.effect[parts.parts.index("layers.2.memory")] == 0).all()


def test_the_parts_sum_to_the_logits_of_the_shipped_model() -> None:
    demo, tokenizer = hydra_lab.load("demo")
    prompt = torch.tensor([tokenizer.encode("Q: country of Osaka? A:", add_special_tokens=False)])
    parts = direct_logit_attribution(demo, prompt, 300, contrast=301)
    np.testing.assert_allclose(parts.effect.sum(0), parts.logit, rtol=1e-4, atol=1e-4)


def test_what_is_no_token_is_refused(model: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokens lie in 97 .. 97, the vocabulary in 0 .. 96"):
        direct_logit_attribution(model, ids, 97)
    with pytest.raises(
        ValueError, match=r"contrast must be one token id or ids \[2, 21\], got torch.int64 \[3\]"
    ):
        direct_logit_attribution(model, ids, 5, contrast=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"num_tokens must lie in 1..97, got 0"):
        logit_lens(model, ids, num_tokens=0)
