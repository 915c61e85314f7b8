"""Half-life by context, growth, saturation and reach of the state-space path, on values known by hand and against the
sums written out."""

from typing import Any

import numpy as np
import pytest

from hydra_lab import metrics
from hydra_lab.metrics.arrays import FloatArray

NAN = float("nan")


def states(norms: Any = None, decay: Any = None, **changes: Any) -> metrics.StateRecord:
    """A record of samples of equal length in chunks of four, from norms [N, C, H] or decays [N, L, H]."""
    if norms is None:
        norms = np.ones((decay.shape[0], -(-decay.shape[1] // 4), decay.shape[2]))
    if decay is None:
        decay = np.zeros((norms.shape[0], 4 * norms.shape[1], norms.shape[2]))
    fields: dict[str, Any] = {"layer": 0, "length": np.full(len(norms), decay.shape[1]), "chunk_size": 4}
    return metrics.StateRecord(norms=norms, decay=decay, **{**fields, **changes})


def half_lives(*tokens: float) -> FloatArray:
    return -np.log(2) / np.array(tokens)


def test_half_life_by_position() -> None:
    decay = np.zeros((2, 6, 2))
    decay[:, :3] = half_lives(10.0, np.inf)
    decay[:, 3:] = half_lives(40.0, 5.0)
    decay[1, 4:] = NAN
    result = metrics.half_life_by_position(states(decay=decay, length=np.array([6, 4])), num_bins=2)
    np.testing.assert_allclose(result.half_life, [[10, np.inf], [40, 5]])
    assert result.edges.tolist() == [0, 3, 6] and result.num_tokens.tolist() == [6, 4]


def test_half_life_by_domain_takes_the_mean_rate_over_tokens() -> None:
    decay = np.zeros((3, 8, 1))
    decay[0, :] = half_lives(10.0)
    decay[1, :4] = half_lives(30.0)
    decay[1, 4:] = NAN
    decay[2, :] = half_lives(2.0)
    record = states(decay=decay, length=np.array([8, 4, 8]), domains=("prose", "prose", "code"))
    result = metrics.half_life_by_domain(record)
    assert result.domains == ("prose", "code") and result.num_tokens.tolist() == [12, 8]
    # 8 tokens at 1/10 and 4 at 1/30: mean 7/90 of a halving per token
    np.testing.assert_allclose(result.half_life[:, 0], [90 / 7, 2])
    assert result.num_samples.tolist() == [2, 1]
    with pytest.raises(ValueError, match="holds no domains"):
        metrics.half_life_by_domain(states(decay=decay))
    with pytest.raises(ValueError, match="domains has 1 labels, the record 3 samples"):
        states(decay=decay, domains=("prose",))


def test_growth_exponents_of_power_laws() -> None:
    position = 4.0 * np.arange(1, 17)
    exponents = np.array([0.0, 0.5, 1.0, -0.25])
    norms = 3 * position[None, :, None] ** exponents * np.ones((3, 1, 1))
    norms[1, 9:] = NAN  # this sample has 9 whole chunks and some more tokens
    norms[2, 1:] = NAN  # and this one a single chunk, which gives no slope
    record = states(norms, length=np.array([64, 38, 7]))
    result = metrics.norm_growth(record)
    np.testing.assert_allclose(result.slope, exponents, atol=1e-12)
    np.testing.assert_allclose(result.slope_error, 0, atol=1e-12)
    assert result.position.tolist() == [4, 8, 16, 32, 64] and result.num_samples.tolist() == [3, 2, 2, 2, 1]
    np.testing.assert_allclose(result.mean, 3 * result.position[:, None] ** exponents)


def test_growth_is_a_mean_over_samples_with_its_error() -> None:
    position = 4.0 * np.arange(1, 5)
    slopes = np.array([0.2, 0.4, 0.9])
    norms = position[None, :, None] ** slopes[:, None, None] * np.ones((1, 1, 2))
    norms[0, 1, 1] = 0.0  # a state of exactly zero has no logarithm: the second head loses this sample
    result = metrics.norm_growth(states(norms))
    np.testing.assert_allclose(result.slope, [0.5, 0.65])
    np.testing.assert_allclose(
        result.slope_error, [slopes.std(ddof=1) / np.sqrt(3), slopes[1:].std(ddof=1) / np.sqrt(2)]
    )
    assert np.isnan(metrics.norm_growth(states(norms[:1])).slope_error).all()
    with pytest.raises(ValueError, match="no sample has a whole chunk of 4 tokens"):
        metrics.norm_growth(states(norms, length=np.array([3, 2, 0])))


def test_saturation_is_the_slope_over_the_last_doubling() -> None:
    position = 4.0 * np.arange(1, 18)
    exponents = np.array([0.0, 0.5, 1.0])
    norms = position[None, :, None] ** exponents * np.ones((3, 1, 1))
    norms[1, 5:] = NAN
    norms[2, 3:] = NAN  # three chunks have no middle and end
    decay = np.zeros((3, 68, 3))
    decay[..., 1] = np.log(0.99)
    decay[..., 2] = -1.0
    result = metrics.state_saturation(states(norms, decay, length=np.array([68, 20, 12])))
    np.testing.assert_allclose(result.growth, exponents, atol=1e-12)
    assert result.saturated.tolist() == [True, False, False]
    assert result.growing.tolist() == [False, True, True]
    assert result.contexts == (20, 68) and result.num_samples == 2
    # chunk ends 7 and 8 of 17 chunks, and 2 of 5, stand against those at twice the place
    kept = 0.99 ** (2 * 4 * np.array([7.0, 8.0])), 0.99 ** (2 * 4 * 2.0)
    expected = (np.log2(1 + kept[0]).mean() + np.log2(1 + kept[1])) / 4
    np.testing.assert_allclose(result.growth_if_random, [0.5, expected, 0.0], atol=1e-4)  # e^-16 is left
    with pytest.raises(ValueError, match="no sample has 4 whole chunks of 4 tokens"):
        metrics.state_saturation(states(norms, decay, length=np.array([15, 15, 12])))


def test_heads_between_the_limits_are_undecided() -> None:
    exponents = np.array([0.0, 0.1])  # over two samples: mean 0.05, error 0.05
    norms = (4.0 * np.arange(1, 9))[None, :, None] ** exponents[:, None, None]
    result = metrics.state_saturation(states(norms))
    np.testing.assert_allclose([result.growth[0], result.error[0]], [0.05, 0.05])
    assert not result.saturated[0] and not result.growing[0]
    assert metrics.state_saturation(states(norms), tolerance=0.2).saturated[0]
    alone = metrics.state_saturation(states(norms[:1]))
    assert not alone.saturated[0] and not alone.growing[0]  # one sample decides nothing


def test_unrelated_writes_grow_as_foretold() -> None:
    rng = np.random.default_rng(0)
    decay = np.array([1.0, 0.99, 0.9])
    num_samples, num_tokens, entries = 64, 256, 32
    state = np.zeros((num_samples, 3, entries))
    norms = np.zeros((num_samples, num_tokens // 4, 3))
    for t in range(num_tokens):
        state = decay[:, None] * state + rng.normal(size=state.shape)
        if t % 4 == 3:
            norms[:, t // 4] = np.linalg.norm(state, axis=-1)
    log_decay = np.broadcast_to(np.log(decay), (num_samples, num_tokens, 3))
    result = metrics.state_saturation(states(norms, log_decay))
    assert (np.abs(result.growth - result.growth_if_random) < 4 * result.error + 0.01).all()
    # the middle lies from 104 to 128 tokens: 0.99^208 = 0.124, 0.99^256 = 0.076
    low, high = np.log2([1.076, 1.124]) / 2
    assert low < result.growth_if_random[1] < high
    np.testing.assert_allclose(result.growth_if_random[[0, 2]], [0.5, 0.0], atol=1e-6)
    assert result.growing[0] and not result.saturated[0]
    growth = metrics.norm_growth(states(norms, log_decay)).slope
    np.testing.assert_allclose(growth[0], 0.5, atol=0.02)
    assert growth[2] < 0.15  # the first doublings still count


def test_reach_of_a_constant_decay() -> None:
    decay = np.zeros((1, 200, 3))
    decay[..., 0] = np.log(0.5)  # weights 1, 1/2, 1/4, 1/8 and then less than 0.1
    decay[..., 1] = np.log(0.9)
    result = metrics.receptive_field(states(decay=decay), threshold=0.1)
    np.testing.assert_array_equal(result.reach[:2], [4, 22])  # 0.9^21 = 0.109, 0.9^22 = 0.098
    np.testing.assert_allclose(result.quantiles[0], [4, 4])
    np.testing.assert_allclose(result.cut_off, [0, 0, 1])
    np.testing.assert_allclose(result.reach[2], 150.5)  # all of the text, for tokens 100 to 199
    np.testing.assert_allclose(
        result.reach_at_mean_rate, [np.log2(10) + 1, np.log(10) / -np.log(0.9) + 1, np.inf]
    )
    # a / (1 - a); without decay the mean over t of t / 2. After 100 tokens 0.9^100 is left of the sum.
    np.testing.assert_allclose(result.mean_distance, [1.0, 9.0, 149.5 / 2], rtol=1e-3)
    assert (result.num_tokens, result.num_samples, result.threshold) == (100, 1, 0.1)


def test_reach_ends_where_the_state_is_wiped() -> None:
    decay = np.zeros((1, 20, 1))
    decay[0, 12] = -60.0  # token 12 comes in after everything before it has been forgotten
    result = metrics.receptive_field(states(decay=decay))
    # tokens 10 and 11 see everything, tokens 12 to 19 only what came since
    np.testing.assert_allclose(result.reach, np.median([11, 12, 1, 2, 3, 4, 5, 6, 7, 8]))
    np.testing.assert_allclose(result.cut_off, 0.2)


def test_reach_and_distance_are_those_of_the_products_written_out() -> None:
    rng = np.random.default_rng(0)
    decay = -rng.exponential(0.3, size=(2, 30, 2))
    decay[1, 17:] = NAN
    length = np.array([30, 17])
    result = metrics.receptive_field(states(decay=decay, length=length), threshold=0.2)
    reach, distance, cut = [], [], []
    for n, size in enumerate(length):
        for t in range(size // 2, size):
            weights = np.array([np.exp(decay[n, j + 1 : t + 1].sum(axis=0)) for j in range(t + 1)])
            reach.append((weights >= 0.2).sum(axis=0))
            cut.append(weights[0] >= 0.2)
            distance.append((t - np.arange(t + 1)) @ weights / weights.sum(axis=0))
    np.testing.assert_allclose(result.reach, np.median(reach, axis=0))
    np.testing.assert_allclose(result.quantiles, np.quantile(reach, [0.05, 0.95], axis=0).T)
    np.testing.assert_allclose(result.cut_off, np.mean(cut, axis=0))
    np.testing.assert_allclose(result.mean_distance, np.mean(distance, axis=0))


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
        metrics.receptive_field(states(np.ones((1, 1, 1))), threshold=threshold)


def test_mixing_distance_of_known_matrices() -> None:
    size = 8
    previous = np.eye(size, k=-1)
    even = np.tril(np.ones((size, size)))
    signed = even * np.where(np.arange(size) % 2, -1.0, 1.0)
    result = metrics.mixing_distance(np.stack([np.eye(size), previous, even, signed]), layer=3, num_bins=4)
    np.testing.assert_allclose(result.last, [0, 1, 3.5, 3.5])
    np.testing.assert_allclose(result.distance[:, 0], 0)
    np.testing.assert_allclose(
        result.distance[:, 1], 1
    )  # the first token, which mixes in nothing, does not count
    np.testing.assert_allclose(result.distance[:, 2], result.distance_if_even)
    np.testing.assert_allclose(result.distance[:, 3], result.distance_if_even)
    np.testing.assert_allclose(result.distance_if_even, [0.25, 1.25, 2.25, 3.25])
    assert (result.layer, result.num_tokens) == (3, 8)


def test_decays_alone_give_the_same_distance_either_way() -> None:
    decay = -np.random.default_rng(0).exponential(0.1, size=(1, 24, 2))
    total = np.cumsum(decay[0], axis=0)
    matrix = np.tril(np.exp(total.T[:, :, None] - total.T[:, None, :]))
    by_matrix = metrics.mixing_distance(matrix, layer=0, num_bins=24).distance[12:]
    by_decay = metrics.receptive_field(states(decay=decay)).mean_distance
    np.testing.assert_allclose(by_matrix.mean(axis=0), by_decay)


def test_a_matrix_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match="above its diagonal"):
        metrics.mixing_distance(np.ones((1, 3, 3)), layer=0)
    with pytest.raises(ValueError, match=r"must be \[heads, tokens, tokens\], got \[3, 3\]"):
        metrics.mixing_distance(np.eye(3), layer=0)
