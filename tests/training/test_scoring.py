"""Scores of many sequences are those of each alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.training.scoring import batches, score, stretches


@given(length=st.integers(1, 200), window=st.integers(2, 40), share=st.floats(0.05, 0.95))
def test_stretches_score_each_token_but_the_first_once(length: int, window: int, share: float) -> None:
    stride = min(window - 1, max(1, round(share * window)))
    tokens = list(range(length))
    scored: list[int] = []
    for stretch in stretches(tokens, window, stride):
        assert len(stretch.tokens) <= window
        assert stretch.begin >= (1 if stretch.tokens[0] == 0 else window - stride)
        scored += stretch.tokens[stretch.begin :]
    assert scored == tokens[1:]


def test_stretches_refuse_windows_that_do_not_overlap() -> None:
    with pytest.raises(ValueError, match="stride=8 must lie between 0 and window=8"):
        list(stretches([1, 2, 3], 8, 8))


@given(lengths=st.lists(st.integers(1, 50), max_size=30), limit=st.integers(1, 120))
def test_batches_hold_every_sequence_once_and_keep_the_limit(lengths: list[int], limit: int) -> None:
    groups = list(batches(lengths, limit))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= limit


def test_scores_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model = HydraForCausalLM(HydraConfig.from_preset("nano")).eval()
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 97, size).tolist() for size in (3, 17, 1, 40, 9)]
    together = score(model, sequences, max_tokens=100)
    for sequence, found in zip(sequences, together, strict=True):
        assert found.loss.shape == found.hit.shape == (len(sequence) - 1,)
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        expected = -logits.log_softmax(dim=-1)[torch.arange(len(sequence) - 1), tokens[0, 1:]]
        np.testing.assert_allclose(found.loss, expected.numpy(), atol=1e-5)
        np.testing.assert_array_equal(found.hit, (logits.argmax(dim=-1) == tokens[0, 1:]).numpy())
