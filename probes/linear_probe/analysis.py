"""Linear probes with their null and control: arrays only, so that they can be tested on data with a known answer.

Shape suffixes: O observations, F features, W permutations, K classes (1 for a number), N samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from probes.linear_probe.features import Site
from probes.linear_probe.tasks import Floats, Ints, Task

_COLUMNS_AT_ONCE = 4_000
_REDRAWS = 1_000


@dataclass(frozen=True, eq=False)
class SiteScore:
    """How well a task's label can be read off one site by a linear map, on samples that the map was not fitted on.

    Attributes:
        site: where.
        score: balanced accuracy (mean over classes of the share that is right), or R squared for a number.
        interval: (low, high), 95% bootstrap over samples, the maps as they were fitted.
        control: the same score for the control label.
        null: [W] the same score with the labels permuted.
    """

    site: Site
    score: float
    interval: tuple[float, float]
    control: float
    null: Floats

    @property
    def selectivity(self) -> float:
        """Score less that of the control label (Hewitt and Liang 2019)."""
        return self.score - self.control


def score_site(
    site: Site,
    features_OF: NDArray[np.float32],
    task: Task,
    permuted_WO: Floats,
    folds: list[tuple[Ints, Ints]],
    *,
    ridge: float,
    rng: np.random.Generator,
) -> SiteScore:
    """Fit, predict and score the label, its permutations and the control label; see `SiteScore`.

    Args:
        permuted_WO: the label under each permutation.
        folds: (observations to fit on, observations to predict); no sample in both.
    """
    columns = np.concatenate([task.label[None], task.control[None], permuted_WO])
    scores = np.zeros(len(columns))
    predicted_O: Floats | None = None
    for part in _parts(len(columns), task.num_classes):
        predicted_OC = _predict(features_OF, columns[part], task, folds, ridge)
        scores[part] = _score(predicted_OC, columns[part].T, task)
        if predicted_O is None:
            predicted_O = predicted_OC[:, 0]
    assert predicted_O is not None
    return SiteScore(
        site=site,
        score=float(scores[0]),
        interval=_interval(predicted_O, task, rng),
        control=float(scores[1]),
        null=scores[2:],
    )


def _parts(num_columns: int, num_classes: int) -> Iterator[slice]:
    size = max(1, _COLUMNS_AT_ONCE // num_classes)
    for start in range(0, num_columns, size):
        yield slice(start, start + size)


def _predict(
    features_OF: NDArray[np.float32],
    labels_CO: Floats,
    task: Task,
    folds: list[tuple[Ints, Ints]],
    ridge: float,
) -> Floats:
    """[O, C] prediction of each column of labels for observations that it was not fitted on: a class, or a number."""
    num_columns, num_classes = len(labels_CO), task.num_classes
    if task.kind == "class":
        targets = (labels_CO.T[..., None] == np.arange(num_classes)).astype(np.float32)
    else:
        targets = labels_CO.T[..., None].astype(np.float32)
    targets = targets.reshape(len(features_OF), -1)
    predicted = np.zeros_like(targets)
    for fit, test in folds:
        scaler = StandardScaler().fit(features_OF[fit])
        model = Ridge(alpha=ridge, solver="cholesky").fit(scaler.transform(features_OF[fit]), targets[fit])
        predicted[test] = model.predict(scaler.transform(features_OF[test])).reshape(len(test), -1)
    predicted = predicted.reshape(len(features_OF), num_columns, -1)
    return (predicted.argmax(axis=-1) if task.kind == "class" else predicted[..., 0]).astype(np.float64)


def _score(predicted_OC: Floats, labels_OC: Floats, task: Task) -> Floats:
    """[C] score of each column."""
    if task.kind == "number":
        error = ((predicted_OC - labels_OC) ** 2).sum(axis=0)
        spread = ((labels_OC - labels_OC.mean(axis=0)) ** 2).sum(axis=0)
        return 1.0 - error / np.maximum(spread, 1e-12)
    right_OC = predicted_OC == labels_OC
    recalls = []
    for k in range(task.num_classes):
        of_class_OC = labels_OC == k
        recalls.append(
            np.where(of_class_OC.any(axis=0), (right_OC & of_class_OC).sum(axis=0), np.nan)
            / np.maximum(of_class_OC.sum(axis=0), 1)
        )
    return np.nanmean(np.stack(recalls), axis=0)


def _interval(predicted_O: Floats, task: Task, rng: np.random.Generator) -> tuple[float, float]:
    """95% bootstrap interval of the score over samples."""
    _, sample_O = np.unique(task.row, return_inverse=True)
    num_samples = int(sample_O.max()) + 1
    weight = rng.multinomial(num_samples, np.full(num_samples, 1 / num_samples), size=_REDRAWS).astype(
        np.float64
    )
    if task.kind == "number":
        error_N = np.bincount(sample_O, (predicted_O - task.label) ** 2)
        spread_N = np.bincount(sample_O, (task.label - task.label.mean()) ** 2)
        drawn = 1.0 - (weight @ error_N) / np.maximum(weight @ spread_N, 1e-12)
    else:
        cell_O = sample_O * task.num_classes + task.label.astype(np.int64)
        size = num_samples * task.num_classes
        total_NK = np.bincount(cell_O, minlength=size).reshape(num_samples, -1)
        right_NK = np.bincount(cell_O, predicted_O == task.label, minlength=size).reshape(num_samples, -1)
        with np.errstate(invalid="ignore"):
            drawn = np.nanmean((weight @ right_NK) / (weight @ total_NK), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def permutations(task: Task, count: int, rng: np.random.Generator) -> Floats:
    """[W, O] labels under the null.

    A label of whole samples is exchanged between samples. One that varies inside a sample is turned round inside each
    (the sequence starts anywhere and goes on from its beginning), which keeps the order of neighbours. See `Task.null`.
    """
    if task.null == "choose":
        assert task.choices is not None
        drawn_WO = rng.integers(task.choices.shape[1], size=(count, len(task.row)))
        return task.choices[np.arange(len(task.row)), drawn_WO]
    rows, start_N, sample_O = np.unique(task.row, return_index=True, return_inverse=True)
    if task.null == "exchange":
        label_N = task.label[start_N]
        return np.stack([label_N[rng.permutation(len(rows))][sample_O] for _ in range(count)])
    size_N = np.bincount(sample_O)
    index_O = np.arange(len(task.row)) - start_N[sample_O]
    shift_WN = rng.integers(size_N, size=(count, len(rows)))
    turned_WO = (index_O + shift_WN[:, sample_O]) % size_N[sample_O]
    return task.label[start_N[sample_O] + turned_WO]


def folds_by_sample(task: Task, num_folds: int, rng: np.random.Generator) -> list[tuple[Ints, Ints]]:
    """(fit, test) observations of each fold; whole samples, at random.

    Raises:
        ValueError: there are fewer samples than folds.
    """
    rows, sample_O = np.unique(task.row, return_inverse=True)
    if len(rows) < num_folds:
        raise ValueError(f"{task.name}: {len(rows)} samples are too few for {num_folds} folds")
    fold_N = rng.permutation(np.arange(len(rows)) % num_folds)
    fold_O = fold_N[sample_O]
    return [(np.flatnonzero(fold_O != fold), np.flatnonzero(fold_O == fold)) for fold in range(num_folds)]


@dataclass(frozen=True, eq=False)
class KindScore:
    """The best site of a kind, against the best site of each permutation.

    Attributes:
        best: of the sites.
        null_mean: mean over the permutations of their best site's score.
        p_value: share of the permutations whose best site reaches it.
    """

    best: SiteScore
    null_mean: float
    p_value: float


def best_of(scores: list[SiteScore]) -> KindScore:
    """See `KindScore`: the null takes the best site too, which allows for the choice among several."""
    best = max(scores, key=lambda each: each.score)
    null_W = np.stack([each.null for each in scores]).max(axis=0)
    p_value = (1 + (null_W >= best.score - 1e-12).sum()) / (1 + len(null_W))
    return KindScore(best, float(null_W.mean()), float(p_value))


def directions(
    features_OF: NDArray[np.float32], label_O: Floats, task: Task, fit: Ints, *, ridge: float
) -> Floats:
    """[rank, F] orthonormal directions that a probe fitted on the observations `fit` reads the label from.

    Args:
        label_O: the task's, or a permutation of it.
    """
    scaler = StandardScaler().fit(features_OF[fit])
    label = label_O[fit]
    targets = (label[:, None] == np.arange(task.num_classes)) if task.kind == "class" else label[:, None]
    model = Ridge(alpha=ridge, solver="cholesky").fit(
        scaler.transform(features_OF[fit]), targets.astype(np.float64)
    )
    coefficients: Floats = np.atleast_2d(np.asarray(model.coef_, dtype=np.float64))
    spread: Floats = np.asarray(scaler.scale_, dtype=np.float64)
    return orthonormal(coefficients / spread)


def orthonormal(vectors: Floats) -> Floats:
    """[rank, F] orthonormal basis of what the rows span."""
    _, size, basis = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)
    return basis[size > 1e-6 * max(float(size.max()), 1e-300)]


def sign_test(differences_N: Floats, num_flips: int, rng: np.random.Generator) -> float:
    """One-sided p-value of "the mean difference is above 0", signs of the samples flipped at random."""
    signs = rng.choice([-1.0, 1.0], size=(num_flips, len(differences_N)))
    null = signs @ differences_N
    return float((1 + (null >= differences_N.sum() - 1e-12).sum()) / (1 + num_flips))
