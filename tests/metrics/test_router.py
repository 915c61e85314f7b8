"""Margin, sparsity, saturation and specialization on routing written out by hand."""

import dataclasses

import numpy as np
import pytest

from hydra_lab import metrics

# One block, 4 experts, top-2, chunks of 2 tokens. Samples of 6, 4 and 3 tokens: 3, 2 and 2 chunks.
EXPERTS = np.array([[[0, 1], [0, 1], [1, 2]], [[0, 2], [2, 0], [3, 3]], [[1, 0], [1, 2], [3, 3]]])[None]
LENGTH = np.array([6, 4, 3])
LN2 = np.log(2)


def record(**changes: object) -> metrics.RoutingRecord:
    fields: dict = {
        "layers": (2,),
        "experts": EXPERTS,
        "num_experts": 4,
        "chunk_size": 2,
        "length": LENGTH,
        "domains": ("code", "code", "prose"),
    }
    return metrics.RoutingRecord(**{**fields, **changes})


def test_margin_is_the_last_chosen_less_the_best_left_out() -> None:
    logits = np.full((1, 3, 3, 4), -9.0)
    logits[0, 0] = [[3, 2, 1.5, 0], [3, 2, -6, 1.9], [0, 1, 1, -1]]  # margins 0.5, 0.1, 1
    logits[0, 1, :2] = [[2, -9, 2, 0], [5, 0, 6, 1]]  # margins 2, 4
    logits[0, 2, :2] = [[1, 1, 1, 1], [0, 9, 0.25, 0]]  # margins 0, 0.25
    result = metrics.routing_margin(record(logits=logits))
    assert result.domains == ("code", "prose")
    code = np.array([0.5, 0.1, 1, 2, 4])
    np.testing.assert_allclose(result.mean, [[code.mean(), 0.125]])
    np.testing.assert_allclose(result.deviation, [[code.std(), 0.125]])
    np.testing.assert_allclose(result.near_tie, [[1 / 5, 1 / 2]])
    # to a sixteenth of an octave
    np.testing.assert_allclose(result.quantiles[0, 0, 2], 1, rtol=0.045)
    np.testing.assert_allclose(result.quantiles[0, 0, 3], 2, rtol=0.045)
    np.testing.assert_array_equal(result.num_chunks, [5, 2])


def test_margin_of_an_overruled_router_is_negative() -> None:
    logits = np.zeros((1, 3, 3, 4))
    logits[..., 3] = 2.0  # the expert that no chunk was given
    result = metrics.routing_margin(record(logits=logits))
    np.testing.assert_allclose(result.mean, -2)
    np.testing.assert_allclose(result.quantiles, -2, rtol=0.045)
    np.testing.assert_allclose(result.near_tie, 1)


def test_margin_needs_logits_and_a_choice() -> None:
    with pytest.raises(ValueError, match="needs the router's logits"):
        metrics.routing_margin(record())
    every = record(experts=np.zeros((1, 3, 3, 1), int), num_experts=1, logits=np.zeros((1, 3, 3, 1)))
    with pytest.raises(ValueError, match="all 1 experts are chosen"):
        metrics.routing_margin(every)


def test_sparsity_of_single_tokens_and_of_windows() -> None:
    result = metrics.expert_sparsity(record())
    np.testing.assert_array_equal(result.windows[:3], [1, 2, 4])
    np.testing.assert_allclose(result.token_sparsity, 0.5)  # every token uses 2 of 4 experts
    # windows of 2 tokens: within a chunk 2 experts, across chunks 01+01: 2, 01+12: 3, 02+20: 2, 10+12: 3;
    # the last sample has a single token in its second chunk
    used = [2, 2, 2, 3, 2] + [2, 2, 2] + [2, 3]
    np.testing.assert_array_equal(result.num_windows[:4], [13, 10, 4, 0])
    np.testing.assert_allclose(result.sparsity[0, 1], 1 - np.sum(used) / 40)
    # of 4: 01 01, 01 01 12 (3), 01 12 (3) and 02 20
    np.testing.assert_allclose(result.sparsity[0, 2], 1 - (2 + 3 + 3 + 2) / 16)
    assert np.isnan(result.sparsity[0, 3:]).all()  # no sample has 8 tokens
    # loads 5/7, 5/7, 4/7, 0; a window of 2 lies in one chunk half of the time, in two the other half
    left = np.array([2 / 7, 2 / 7, 3 / 7, 1.0])
    np.testing.assert_allclose(result.if_independent[0, 0], left.mean())
    np.testing.assert_allclose(result.if_independent[0, 1], (left + left**2).mean() / 2)


def test_sparsity_of_a_constant_choice_and_of_a_new_one_each_token() -> None:
    constant = metrics.RoutingRecord((0,), np.zeros((1, 1, 64, 1), int), 8, 1, np.array([64]), ("a",))
    np.testing.assert_allclose(metrics.expert_sparsity(constant).sparsity[0, :7], 7 / 8)
    turning = metrics.RoutingRecord(
        (0,), (np.arange(64) % 8).reshape(1, 1, 64, 1), 8, 1, np.array([64]), ("a",)
    )
    np.testing.assert_allclose(metrics.expert_sparsity(turning).sparsity[0, :5], [7 / 8, 6 / 8, 4 / 8, 0, 0])


def test_saturation_is_the_share_of_the_final_experts() -> None:
    reversed_ranks = record(experts=EXPERTS[..., ::-1].copy())
    other = record(experts=np.where(EXPERTS == 0, 3, EXPERTS))
    result = metrics.router_saturation([other, reversed_ranks], record(), labels=["step 10", "step 20"])
    assert result.checkpoints == ("step 10", "step 20")
    # chunks 01 01 12 | 02 20 | 10 12 against 31 31 12 | 32 23 | 13 12
    np.testing.assert_allclose(result.saturation[:, 0], [(0.5 + 0.5 + 1 + 0.5 + 0.5 + 0.5 + 1) / 7, 1])
    np.testing.assert_allclose(result.by_domain[:, 0], [[3 / 5, 1.5 / 2], [1, 1]])
    # loads 5/7, 5/7, 4/7, 0 with themselves, and with 0, 5/7, 4/7, 5/7
    np.testing.assert_allclose(result.if_independent[:, 0], [41 / 49 / 2, 66 / 49 / 2])
    assert (result.num_chunks, result.num_samples) == (7, 3)


def test_saturation_compares_the_same_texts() -> None:
    with pytest.raises(ValueError, match="checkpoint 0 has num_experts 5, the final one 4"):
        metrics.router_saturation([record(num_experts=5)], record())
    with pytest.raises(ValueError, match="checkpoint 0 has samples of other lengths"):
        metrics.router_saturation([record(length=np.array([6, 4, 4]))], record())
    with pytest.raises(ValueError, match="1 labels for 2 checkpoints"):
        metrics.router_saturation([record(), record()], record(), labels=["a"])


TOKENS = np.array([[0, 0, 1, 2, 2, 2], [1, 1, 0, 3, 9, 9], [3, 0, 0, 9, 9, 9]])


def test_experts_of_token_classes() -> None:
    result = metrics.expert_by_token_class(
        record(tokens=TOKENS), np.array([0, 2, 0, -1]), ("letters", "none", "digits")
    )
    assert result.classes == ("letters", "digits")
    # ids 0 and 2, by chunk: 01: 2, 01: 1, 12: 2 | 20: 1 | 10: 1, 12: 1 -> expert 0: 5, 1: 7, 2: 4 of 16
    np.testing.assert_allclose(result.share[0, 0], [5 / 16, 7 / 16, 4 / 16, 0])
    # id 1: 01: 1 | 02: 2 -> 0: 3, 1: 1, 2: 2 of 6
    np.testing.assert_allclose(result.share[0, 1], [3 / 6, 1 / 6, 2 / 6, 0])
    np.testing.assert_array_equal(result.num_tokens, [8, 3])
    np.testing.assert_allclose(result.lift[0, 1, 0], np.log2((3 / 6) / ((5 / 16 + 3 / 6) / 2)))


def test_token_classes_need_tokens_and_names() -> None:
    with pytest.raises(ValueError, match="needs the token ids"):
        metrics.expert_by_token_class(record(), np.zeros(4, int), ("a",))
    with pytest.raises(ValueError, match="token id 3 occurs, but classes has 3 entries"):
        metrics.expert_by_token_class(record(tokens=TOKENS), np.zeros(3, int), ("a",))
    with pytest.raises(ValueError, match="classes holds 1, but there are 1 names"):
        metrics.expert_by_token_class(record(tokens=TOKENS), np.ones(4, int), ("a",))


def test_class_of_a_token() -> None:
    texts = [" cat", "ing", " 12", "a1", "(", " ", "\n\n", "<eos>"]
    named = [metrics.TOKEN_CLASSES[code] for code in metrics.token_classes(texts, {7})]
    assert named == [
        "word",
        "word piece",
        "digit",
        "digit",
        "punctuation",
        "white space",
        "white space",
        "special",
    ]


def by_domain(share: list[list[float]], num_chunks: tuple[int, ...] = (10, 10)) -> metrics.ExpertByDomain:
    array = np.array(share)[None]
    counts = np.array(num_chunks)
    return metrics.ExpertByDomain((0,), ("code", "prose"), array, np.zeros_like(array), counts, counts)


def test_specialization_of_known_tables() -> None:
    apart = metrics.specialization(by_domain([[1, 0, 0], [0, 1, 0]]))
    np.testing.assert_allclose(apart.score[0], [1, 1, np.nan])
    np.testing.assert_array_equal(apart.favourite[0], [0, 1, -1])
    np.testing.assert_allclose(apart.block, 1)
    alike = metrics.specialization(by_domain([[0.3, 0.7], [0.3, 0.7]]))
    np.testing.assert_allclose(alike.score[0], 0, atol=1e-12)
    np.testing.assert_allclose(alike.block, 0, atol=1e-12)
    mixed = metrics.specialization(by_domain([[0.6, 0.4], [0.2, 0.8]], (10, 40)))
    # of expert 0's shares 3/4 are code, of expert 1's 1/3
    entropy = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (3 / 4, 1 / 3)]
    np.testing.assert_allclose(mixed.score[0], 1 - np.array(entropy) / LN2)
    np.testing.assert_array_equal(mixed.favourite[0], [0, 1])
    # the block's score is mutual information over ln 2, and the sizes of the domains do not matter
    information = metrics.mutual_information(np.array([[0.6, 0.4], [0.2, 0.8]]))
    np.testing.assert_allclose(mixed.block, information / LN2)
    np.testing.assert_allclose(mixed.bias, 1 * 1 / (2 * 2 * LN2) * (1 / 10 + 1 / 40) / 2)


def test_bias_of_specialization_is_what_independence_scores() -> None:
    """Independent chunks without structure: the mean score of 400 draws is the stated bias within its error."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(400):
        counts = rng.multinomial(200, [0.25] * 4, size=2)
        result = metrics.specialization(by_domain((counts / 200).tolist(), (200, 200)))
        scores.append(result.block[0])
    assert np.mean(scores) == pytest.approx(result.bias[0], rel=0.1)


def test_specialization_needs_two_labels() -> None:
    single = dataclasses.replace(by_domain([[1, 0], [np.nan, np.nan]]), num_chunks=np.array([3, 0]))
    with pytest.raises(ValueError, match="for two domains or more, there are 1"):
        metrics.specialization(single)


def test_counts_in_bins_are_not_cut() -> None:
    counts = dataclasses.replace(
        record(weights=np.full((1, 3, 6, 2), 0.5)).counts,
        edges=np.array([0, 2, 4, 6]),
        weight_by_position=np.ones((1, 3, 4)),
    )
    assert metrics.expert_by_position(counts, num_bins=3).weight.shape == (1, 3, 4)
    with pytest.raises(ValueError, match="in 3 bins and cannot be given in 2"):
        metrics.expert_by_position(counts, num_bins=2)
