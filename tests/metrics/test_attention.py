"""Attention mass by kind and the hit rate on a target: on values known by hand, against every selection written out,
and on models whose attention is known."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from hydra_lab import metrics
from hydra_lab.capture import record
from hydra_lab.capture.in_memory import capture_batch
from tests.helpers import lively_model, random_ids


def masses(mass: Any, length: Any, **changes: Any) -> metrics.MassRecord:
    fields: dict[str, Any] = {"layers": (2,), "window": 4, "block_size": 2, "num_selected": 1}
    return metrics.MassRecord(mass=np.asarray(mass), length=np.asarray(length), **{**fields, **changes})


def test_mass_by_head_and_position() -> None:
    mass = np.full((1, 2, 4, 2, 3), np.nan)
    mass[0, 0, :, 0] = [1, 0, 0]
    mass[0, 0, :2, 1] = [0.5, 0.5, 0]
    mass[0, 0, 2:, 1] = [0.2, 0.3, 0.5]
    mass[0, 1, :2, 0] = [0, 1, 0]  # two tokens only
    mass[0, 1, :2, 1] = [0, 0, 1]
    result = metrics.mass_by_kind(masses(mass, [4, 2]), num_bins=2)
    np.testing.assert_allclose(result.by_head[0, 0], [4 / 6, 2 / 6, 0])
    np.testing.assert_allclose(result.by_head[0, 1], [1.4 / 6, 1.6 / 6, 3 / 6])
    np.testing.assert_allclose(result.by_position[0], [[3 / 8, 3 / 8, 2 / 8], [0.6, 0.15, 0.25]])
    assert result.edges.tolist() == [0, 2, 4] and result.num_tokens.tolist() == [4, 2]
    np.testing.assert_allclose(result.keys, [1, 0, 0])  # four tokens lie in a window of four
    with pytest.raises(ValueError, match="mass has shape"):
        masses(mass[..., :2], [4, 2])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    ("window", "size", "places"), [(4, 2, 1), (7, 3, 2), (7, 4, 2), (5, 4, 2), (2, 5, 3)]
)
def test_keys_in_view_are_the_mean_over_all_selections(
    window: int, size: int, places: int, tiled: bool
) -> None:
    length = 30
    found = metrics.keys_in_view(
        np.arange(length), window=window, block_size=size, num_selected=places, tiled=tiled
    )
    for t in range(length):
        served = t // size * size + size - 1 if tiled else t
        candidates = [j for j in range(1, t // size) if j * size <= served - window]
        counts = []
        for blocks in combinations(candidates, min(places, len(candidates))):
            in_window = [k for k in range(t + 1) if t - k < window]
            sink = [k for k in range(t + 1) if k < size and k not in in_window]
            selected = [k for k in range(t + 1) if k // size in blocks and k not in in_window + sink]
            counts.append([len(in_window), len(sink), len(selected)])
        np.testing.assert_allclose(found[t], np.mean(counts, axis=0), err_msg=str(t))


def test_a_model_that_attends_to_all_keys_alike_meets_the_baseline() -> None:
    model = lively_model(
        attention_num_selected=8
    )  # more places than there are candidates: the keys are known
    with torch.no_grad():
        for layer in model.config.layers_with("attention"):
            model.get_parameter(f"model.layers.{layer}.attention.q_proj.weight").zero_()
    capture = capture_batch(model, random_ids(model.config, 2, 37), signals=["mass"])
    captured = metrics.mass_record(capture)
    assert captured.layers == tuple(model.config.layers_with("attention"))
    result = metrics.mass_by_kind(captured)
    assert (result.keys > 0.05).all()
    for layer in range(len(captured.layers)):
        np.testing.assert_allclose(result.by_head[layer], np.tile(result.keys, (4, 1)), atol=5e-4)  # 16 bits
        np.testing.assert_allclose(result.by_position[layer], result.keys_by_position, atol=5e-4)


def test_the_mass_is_captured_only_where_it_is_asked_for() -> None:
    model = lively_model()
    ids = random_ids(model.config, 2, 29)
    assert "mass" not in capture_batch(model, ids)
    capture = capture_batch(model, ids, signals=["mass", "attention"])
    assert capture.attributes["signals"] == ["attention", "mass"]
    mass = capture["mass"]["mass"]
    assert mass.dims == ("sample", "layer", "position", "query_head", "kind") and mass.dtype == np.float16
    np.testing.assert_allclose(mass.sum("kind"), 1, atol=2e-3)
    tap = record(model, ids, taps=["attention.mass"])["layers.3.attention.mass"].mass
    np.testing.assert_allclose(mass.sel(layer=3, kind="sink"), tap[..., 1], atol=1e-3)
    some = metrics.mass_record(capture, samples=[1])
    np.testing.assert_array_equal(some.mass[1, 0], mass.to_numpy()[1, 1])
    assert (some.window, some.block_size, some.num_selected, some.tiled) == (8, 4, 2, False)


def selections(blocks: Any, length: int, window: int = 4, size: int = 2) -> metrics.SelectionRecord:
    return metrics.SelectionRecord(2, np.asarray(blocks), np.full(len(blocks), length), window, size)


def targets(selection: metrics.SelectionRecord, *queries: tuple[int, int, int]) -> metrics.TargetRecord:
    sample, query, target = np.array(queries).T
    return metrics.TargetRecord(selection, sample, query, target)


def test_hits_count_where_selection_decides() -> None:
    # one sample of 12 tokens, window 4, blocks of 2: at t = 11, blocks 1, 2 and 3 are candidates
    blocks = np.full((1, 12, 2, 1), -1)
    blocks[0, 11] = [[2], [3]]
    blocks[0, 8] = [[1], [2]]
    selection = selections(blocks, 12)
    record = targets(
        selection,
        (0, 11, 5),  # block 2: head 0 selects it
        (0, 11, 7),  # block 3: head 1 does
        (0, 8, 3),  # block 1, of two candidates: head 0
        (0, 11, 9),  # in the window
        (0, 8, 5),  # in the window too, although its block 2 is a candidate, and head 1 selects it
        (0, 11, 1),  # in the sink
    )
    result = metrics.hit_rate(record)
    np.testing.assert_allclose(result.hit, [2 / 3, 1 / 3])
    np.testing.assert_allclose(result.chance, (1 / 3 + 1 / 3 + 1 / 2) / 3)
    np.testing.assert_allclose(result.visible, [5 / 6, 4 / 6])
    assert np.isnan(result.error).all()  # one sample
    assert result.edges.tolist()[:5] == [0, 2, 4, 8, 16]
    np.testing.assert_array_equal(result.num_queries[:4], [0, 2, 3, 1])
    np.testing.assert_array_equal(result.num_eligible[:4], [0, 0, 3, 0])
    np.testing.assert_allclose(result.hit_by_distance[:, 2], [2 / 3, 1 / 3])
    np.testing.assert_allclose(result.visible_by_distance[:, 3], [1, 1])
    assert np.isnan(result.hit_by_distance[:, 3]).all() and np.isnan(result.chance_by_distance[3])


def planted(kind: str, seed: int = 0) -> metrics.HitRate:
    """300 samples with one query at the end of 64 tokens, one target far back, and one place to select."""
    rng = np.random.default_rng(seed)
    num_samples = 300
    candidates = int(metrics.num_candidates(np.array([63]), window=8, block_size=4)[0])
    target = rng.integers(4, 4 * (candidates + 1), size=num_samples)
    blocks = np.full((num_samples, 64, 1, 1), -1)
    blocks[:, 63, 0, 0] = (
        target // 4 if kind == "finder" else rng.integers(1, candidates + 1, size=num_samples)
    )
    selection = selections(blocks, 64, window=8, size=4)
    return metrics.hit_rate(
        metrics.TargetRecord(selection, np.arange(num_samples), np.full(num_samples, 63), target)
    )


def test_a_selection_that_always_finds_the_target_and_one_that_guesses() -> None:
    finder, guesser = planted("finder"), planted("guesser")
    assert finder.hit == 1 and finder.visible == 1 and finder.error == 0
    np.testing.assert_allclose(finder.chance, 1 / 13)  # of 16 blocks, not the sink nor the window's two
    assert abs(guesser.hit[0] - guesser.chance) < 3 * guesser.error[0]
    binomial = np.sqrt(guesser.hit[0] * (1 - guesser.hit[0]) / 300)
    np.testing.assert_allclose(guesser.error[0], binomial)  # one query per sample: independent
    covered = [
        abs(r.hit[0] - r.chance) < 1.96 * r.error[0] for r in (planted("guesser", s) for s in range(200))
    ]
    assert 0.9 <= np.mean(covered) <= 0.98  # 95% of intervals, 200 of them


def test_queries_of_one_sample_are_not_counted_as_independent() -> None:
    blocks = np.full((2, 12, 1, 1), -1)
    blocks[0, 8:, 0, 0] = 1
    selection = selections(blocks, 12)
    queries = [(n, t, 3) for n in range(2) for t in (8, 9, 10, 11)]
    result = metrics.hit_rate(targets(selection, *queries))
    assert result.hit == 0.5
    # each sample's four queries move together: sqrt(2 samples * (4 * 0.5)^2) / 8 queries
    np.testing.assert_allclose(result.error, np.sqrt(8) / 8)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([(0, 5, 6)], "entry 0 has target 6 and query 5 in a sample of 12 tokens"),
        ([(0, 5, 3), (0, 12, 3)], "entry 1 has target 3 and query 12"),
        ([(1, 5, 3)], r"sample must lie in 0 \.\. 0"),
    ],
)
def test_impossible_targets_are_named(queries: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets(selections(np.full((1, 12, 1, 1), -1), 12), *queries)
