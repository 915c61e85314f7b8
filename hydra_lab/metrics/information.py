"""Statistics for "does this decision depend on that label": mutual information with its null, interval and
correction.

The observations that a capture yields come in clusters: the chunks of one text resemble each other. So the
    unit that
is permuted and resampled is the whole sample, through its own table of counts; shuffling chunks one by one
would call any text-to-text variation significant.

Shape suffixes: N samples, Q groups (domains), A categories of the label, E values of the decision, W
    resamplings.
"""

from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray


def mutual_information(counts: FloatArray) -> FloatArray:
    """Plug-in mutual information of two variables from their joint counts, nats.

    I = sum p(a, e) log p(a, e) / (p(a) p(e)); biased upwards by about (A-1)(E-1)/2n at n independent
    observations.

    Args:
        counts: [..., A, E] joint counts (or any non-negative mass).

    Returns:
        [...] mutual information; 0 where there are no counts.
    """
    total = counts.sum(axis=(-2, -1), keepdims=True)
    joint = counts / np.where(total > 0, total, 1.0)
    return np.maximum(
        0.0,
        _entropy(joint.sum(axis=-1))
        + _entropy(joint.sum(axis=-2))
        - _entropy(joint.reshape(*joint.shape[:-2], -1)),
    )


def _entropy(probability: FloatArray) -> FloatArray:
    """Entropy over the last axis, nats, with 0 log 0 = 0."""
    return -(probability * np.log(np.where(probability > 0, probability, 1.0))).sum(axis=-1)


@dataclass(frozen=True, eq=False)
class InformationTest:
    """Mutual information of a decision and a label, with its permutation null and bootstrap interval.

    Attributes:
        value: plug-in mutual information, nats.
        corrected: `value` less the mean of the null: what dependence adds to chance and small samples, nats.
        interval: (low, high) 95% bootstrap interval of `corrected` over samples, nats, not below 0:
            `corrected` plus the 2.5 and 97.5% points of the redraws' deviations from their own mean (redraws
            are biased upwards too).
        null: [W] the values under permutation of whole samples, nats.
        p_value: (1 + #null >= value) / (1 + W), one-sided.
        num_samples: samples, the unit that is permuted and resampled.
        num_observations: counts behind the table.
    """

    value: float
    corrected: float
    interval: tuple[float, float]
    null: FloatArray
    p_value: float
    num_samples: int
    num_observations: int


def information_of_groups(
    counts: FloatArray, group: IntArray, *, num_resamplings: int = 1000, seed: int = 0
) -> InformationTest:
    """Does a decision depend on the group (domain) of its sample?

    Null: the groups' labels are permuted over whole samples. Interval: samples are drawn with replacement
        within each
    group.

    Args:
        counts: [N, E] how often each sample made each decision.
        group: [N] group of each sample, 0..Q-1.
        num_resamplings: W, for the null and for the interval.
        seed: of the permutations and the bootstrap.
    """
    rng = np.random.default_rng(seed)
    member_NQ = np.eye(int(group.max()) + 1)[group]
    value = float(mutual_information(member_NQ.T @ counts))
    null = np.array(
        [
            float(mutual_information(member_NQ[rng.permutation(len(group))].T @ counts))
            for _ in range(num_resamplings)
        ]
    )
    drawn = np.array(
        [
            float(mutual_information(member_NQ.T @ (weight[:, None] * counts)))
            for weight in _redraw(rng, group, num_resamplings)
        ]
    )
    return _summary(value, null, drawn, len(group), int(counts.sum()))


def information_of_labels(
    decisions: IntArray,
    labels: IntArray,
    group: IntArray,
    *,
    num_decisions: int,
    num_labels: int,
    num_resamplings: int = 1000,
    seed: int = 0,
) -> InformationTest:
    """Does a decision depend on a label that varies inside a sample (a token's class), beyond the sample's
    group?

    The statistic is the conditional mutual information I(decision; label | group). Null: inside each group,
    one sample's whole sequence of decisions is laid beside another's sequence of labels, which keeps both
    sequences' own order, the groups and the effects of position. Interval: samples are drawn with replacement
    within each group.

    Args:
        decisions: [N, L] decision at each token; -1 where there is none.
        labels: [N, L] label of each token; -1 where there is none.
        group: [N] group of each sample, 0..Q-1. All zeros tests plain dependence.
        num_decisions: E.
        num_labels: A.
        num_resamplings: W, for the null and for the interval.
        seed: of the permutations and the bootstrap.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(group == q) for q in range(int(group.max()) + 1)]
    # every pairing of a group's decisions with its labels, counted once: [n, n, A, E]
    tables = [_pair_tables(decisions[rows], labels[rows], num_decisions, num_labels) for rows in members]
    own = [table[np.arange(len(table)), np.arange(len(table))] for table in tables]
    value = _conditional_information([each.sum(axis=0) for each in own])
    null, drawn = np.zeros((2, num_resamplings))
    for w in range(num_resamplings):
        null[w] = _conditional_information(
            [table[rng.permutation(len(table)), np.arange(len(table))].sum(axis=0) for table in tables]
        )
        drawn[w] = _conditional_information(
            [each[rng.integers(len(each), size=len(each))].sum(axis=0) for each in own]
        )
    return _summary(value, null, drawn, len(group), int(sum(each.sum() for each in own)))


def _pair_tables(
    decisions_NL: IntArray, labels_NL: IntArray, num_decisions: int, num_labels: int
) -> FloatArray:
    """[N, N, A, E] joint counts of sample n's decisions laid beside sample m's labels, position by
    position."""
    decided = (decisions_NL[:, :, None] == np.arange(num_decisions)).astype(np.float64)
    labelled = (labels_NL[:, :, None] == np.arange(num_labels)).astype(np.float64)
    return np.einsum("nle,mla->nmae", decided, labelled, optimize=True)


def _conditional_information(tables: list[FloatArray]) -> float:
    """Mean of the groups' mutual information, weighted by their counts."""
    mass = np.array([table.sum() for table in tables])
    values = np.array([float(mutual_information(table)) for table in tables])
    return float((mass * values).sum() / mass.sum()) if mass.sum() > 0 else 0.0


def _redraw(rng: np.random.Generator, group: IntArray, num_draws: int) -> FloatArray:
    """[W, N] how often each sample is drawn, with replacement within its group."""
    weight = np.zeros((num_draws, len(group)))
    for q in np.unique(group):
        rows = np.flatnonzero(group == q)
        weight[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=num_draws)
    return weight


def _summary(
    value: float, null: FloatArray, drawn: FloatArray, num_samples: int, num_observations: int
) -> InformationTest:
    corrected = value - float(null.mean())
    low, high = corrected + np.quantile(drawn - drawn.mean(), [0.025, 0.975])
    return InformationTest(
        value=value,
        corrected=corrected,
        interval=(max(0.0, float(low)), max(0.0, float(high))),
        null=null,
        p_value=float((1 + (null >= value - 1e-12).sum()) / (1 + len(null))),
        num_samples=num_samples,
        num_observations=num_observations,
    )


def group_preference_p_values(
    counts: FloatArray, group: IntArray, *, num_resamplings: int = 1000, seed: int = 0
) -> FloatArray:
    """[Q, E] two-sided permutation p-values of "group q makes decision e more or less often than the others".

    The statistic is the difference between the group's share of the decision and that of all other samples;
    whole samples are permuted.

    Args:
        counts: [N, E] how often each sample made each decision.
        group: [N] group of each sample, 0..Q-1, at least two groups.
        num_resamplings: permutations.
        seed: of the permutations.
    """
    rng = np.random.default_rng(seed)
    member_NQ = np.eye(int(group.max()) + 1)[group]
    observed = np.abs(_share_difference(member_NQ, counts))
    exceeded = np.zeros_like(observed)
    for _ in range(num_resamplings):
        permuted = member_NQ[rng.permutation(len(group))]
        exceeded += np.abs(_share_difference(permuted, counts)) >= observed - 1e-12
    return (1 + exceeded) / (1 + num_resamplings)


def label_preference_p_values(
    decisions: IntArray,
    labels: IntArray,
    group: IntArray,
    *,
    num_decisions: int,
    num_labels: int,
    num_resamplings: int = 1000,
    seed: int = 0,
) -> FloatArray:
    """[A, E] two-sided permutation p-values of "tokens of label a get decision e more or less often than
    other tokens of the same groups would have it".

    The statistic is the difference between the label's share of the decision and that of all other labels.
    Null and arguments as in `information_of_labels`; since groups may differ, its mean need not be zero, so
    deviations are taken from the mean of the null.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(group == q) for q in range(int(group.max()) + 1)]
    tables = [_pair_tables(decisions[rows], labels[rows], num_decisions, num_labels) for rows in members]

    def difference(orders: list[IntArray]) -> FloatArray:
        paired = [table[order, np.arange(len(table))] for table, order in zip(tables, orders, strict=True)]
        return _difference_from_rest(np.sum([each.sum(axis=0) for each in paired], axis=0))

    observed = difference([np.arange(len(table), dtype=np.int64) for table in tables])
    null = np.array(
        [difference([rng.permutation(len(table)) for table in tables]) for _ in range(num_resamplings)]
    )
    deviation = np.abs(null - null.mean(axis=0))
    exceeded = (deviation >= np.abs(observed - null.mean(axis=0)) - 1e-12).sum(axis=0)
    return (1 + exceeded) / (1 + num_resamplings)


def _share_difference(member_NQ: FloatArray, counts_NE: FloatArray) -> FloatArray:
    return _difference_from_rest(member_NQ.T @ counts_NE)


def _difference_from_rest(inside: FloatArray) -> FloatArray:
    """[A, E] share of each column in each row, minus its share in all other rows together."""
    outside = inside.sum(axis=0) - inside
    inside_share = inside / np.maximum(inside.sum(axis=-1, keepdims=True), 1e-300)
    return inside_share - outside / np.maximum(outside.sum(axis=-1, keepdims=True), 1e-300)


def holm(p_values: FloatArray) -> FloatArray:
    """Holm's step-down adjusted p-values (Holm 1979), any shape: rejecting those below alpha keeps the chance
    of even one false rejection below alpha, however the tests depend on each other."""
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")
    stepped = np.maximum.accumulate((len(flat) - np.arange(len(flat))) * flat[order])
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted.reshape(p_values.shape)


def benjamini_hochberg(p_values: FloatArray) -> FloatArray:
    """Benjamini and Hochberg's adjusted p-values (1995), any shape: rejecting those below alpha keeps the
    expected share of false ones among the rejected below alpha, for independent or positively dependent
    tests."""
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")[::-1]
    stepped = np.minimum.accumulate(flat[order] * len(flat) / np.arange(len(flat), 0, -1))
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted.reshape(p_values.shape)


def mean_interval(values: FloatArray, *, num_resamplings: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values` [N], resampling its entries."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(num_resamplings, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
