"""Running summaries: the same whatever the commits, and equal to counts taken token by token."""

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hydra_lab import summaries
from hydra_lab.summaries import Summary

_spec = spec_from_file_location("summary_rows", Path(__file__).with_name("rows.py"))
assert _spec is not None and _spec.loader is not None
made = module_from_spec(_spec)
_spec.loader.exec_module(made)

ROUNDED = {
    ("tokens", "loss_sum"), ("tokens", "loss_square"), ("tokens", "loss_by_position"),
    ("tokens", "sample_loss_sum"), ("tokens", "sample_loss_square"),
    ("routing", "margin_square"),
    ("memory", "gate_sum"), ("memory", "gate_square"),
    ("workspace", "gated_read_by_lag"), ("workspace", "read_entropy_by_position"),
    ("workspace", "write_gate_log_sum"), ("workspace", "write_entropy_sum"),
    ("ssm", "norm_sum"), ("ssm", "norm_square"), ("ssm", "norm_log_sum"), ("ssm", "last_norm_sum"),
    ("ssm", "last_norm_square"),
    ("paths", "share_sum"), ("paths", "cosine_sum"),
}  # fmt: skip
"""Sums of what has more than 16 bits, or of products: rounded as they are added. All others are exact."""


def summarize(rows: dict[tuple[str, str], NDArray[Any]], first_sample: int = 0) -> Summary:
    return summaries.summarize(rows, config=made.CONFIG, domains=made.DOMAINS, first_sample=first_sample)


def summarize_in_parts(rows: dict[tuple[str, str], NDArray[Any]], ends: Sequence[int]) -> Summary:
    edges = [0, *sorted(ends), len(rows["tokens", "length"])]
    whole = None
    for start, end in pairwise(edges):
        part = summarize(made.take(rows, slice(start, end)), start)
        whole = part if whole is None else summaries.merge(whole, part)
    assert whole is not None
    return whole


def assert_equal(have: Summary, want: Summary) -> None:
    assert {group: set(arrays) for group, arrays in have.items()} == {
        group: set(arrays) for group, arrays in want.items()
    }
    for group, arrays in want.items():
        for name, array in arrays.items():
            assert have[group][name].dtype == array.dtype
            if (group, name) in ROUNDED:
                # sums of at most a few hundred numbers: 1e-13 is some hundred times the rounding of fp64
                np.testing.assert_allclose(have[group][name], array, rtol=1e-13, atol=1e-12, err_msg=name)
            else:
                np.testing.assert_array_equal(have[group][name], array, err_msg=f"{group}.{name}")


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=3))
def test_parts_merge_to_the_whole(seed: int, num_samples: int, ends: list[int]) -> None:
    rows = made.draw_rows(np.random.default_rng(seed), num_samples)
    assert_equal(summarize_in_parts(rows, [min(end, num_samples) for end in ends]), summarize(rows))


def test_every_array_is_described() -> None:
    summary = summarize(made.draw_rows(np.random.default_rng(0), 5))
    assert set(summary) == set(summaries.FIELDS) == set(summaries.AXES)
    for group, arrays in summary.items():
        assert set(arrays) == set(summaries.FIELDS[group])
        for name, array in arrays.items():
            assert array.ndim == len(summaries.AXES[group][name]), name
            assert array.dtype in (np.int64, np.float64, np.int32, np.float16), name
    sizes: dict[tuple[str, str], set[int]] = defaultdict(set)
    for group, axes in summaries.AXES.items():
        for name, names in axes.items():
            for axis, size in zip(names, summary[group][name].shape, strict=True):
                sizes[group, "context " + name.split("_")[0] if axis == "context" else axis].add(size)
    assert all(len(found) == 1 for found in sizes.values()), sizes  # an axis has one size within a group


def test_only_the_groups_that_the_rows_have() -> None:
    rows = made.draw_rows(np.random.default_rng(0), 3)
    some = {key: array for key, array in rows.items() if key[0] in ("tokens", "ssm")}
    assert list(summarize(some)) == ["tokens", "ssm"]
    with pytest.raises(ValueError, match="only one has attention, mass, memory, paths, routing, workspace"):
        summaries.merge(summarize(rows), summarize(some))
    without_logits = {key: array for key, array in rows.items() if key != ("routing", "logits")}
    with pytest.raises(ValueError, match=r"only one has context_position, .*margin_histogram"):
        summaries.merge(summarize(rows), summarize(without_logits))
    longer = made.draw_rows(np.random.default_rng(0), 3, length=23)
    with pytest.raises(ValueError, match=r"hold length in shapes \(3, 20\) and \(3, 24\)"):
        summaries.merge(summarize(rows), summarize(longer))


ROWS = made.draw_rows(np.random.default_rng(7), 12)
WHOLE = summarize(ROWS, 100)
LENGTH = ROWS["tokens", "length"].astype(int)
DOMAIN = ROWS["tokens", "domain"].astype(int)


def best(
    found: dict[Any, list[tuple[float, int, int]]], item: Any, count: int
) -> list[tuple[float, int, int]]:
    """The best context of each sample, then the best samples: by falling score, then by sample."""
    of_sample: dict[int, tuple[float, int, int]] = {}
    for score, sample, position in sorted(found[item], key=lambda each: (-each[0], each[2])):
        of_sample.setdefault(sample, (score, sample, position))
    ranked = sorted(of_sample.values(), key=lambda each: (-each[0], each[1]))[:count]
    return ranked + [(-1.0, -1, -1)] * (count - len(ranked))


def listed(group: str, name: str, *item: int) -> list[tuple[float, int, int]]:
    arrays = WHOLE[group]
    parts = [arrays[f"{name}_{part}"][item] for part in ("score", "sample", "position")]
    return [
        (float(score), int(sample), int(position)) for score, sample, position in zip(*parts, strict=True)
    ]


def test_tokens() -> None:
    arrays = WHOLE["tokens"]
    for z in range(3):
        rows = DOMAIN == z
        np.testing.assert_array_equal(arrays["length"][z], np.bincount(LENGTH[rows], minlength=20))
        loss = ROWS["tokens", "loss"][rows].astype(float)
        known = loss[~np.isnan(loss)]
        assert arrays["loss_count"][z] == len(known) == (LENGTH[rows] - 1).sum()
        assert arrays["loss_sum"][z] == pytest.approx(known.sum())
        assert arrays["loss_square"][z] == pytest.approx((known**2).sum())
        np.testing.assert_array_equal(
            arrays["loss_histogram"][z], np.histogram(known, bins=summaries.LOSS_EDGES)[0]
        )
        assert arrays["first_sample"][z] == 100 + np.flatnonzero(rows)[0]
        means = [np.nanmean(row) for row in loss if not np.isnan(row).all()]
        assert arrays["sample_loss_sum"][z] == pytest.approx(sum(means))
        assert arrays["sample_loss_count"][z] == len(means)
        # with no more positions than bins, each position is a bin
        np.testing.assert_allclose(arrays["loss_by_position"][z], np.nansum(loss, axis=0))


def test_routing_counts() -> None:
    arrays, experts = WHOLE["routing"], ROWS["routing", "experts"]
    chosen, first = np.zeros((2, 2, 3, 4), dtype=int)
    by_chunk, pairs = np.zeros((2, 5, 4), dtype=int), np.zeros((2, 4, 4), dtype=int)
    switched, kept = np.zeros((2, 2, 3), dtype=int)
    tokens = np.zeros((2, 4, 11), dtype=int)
    weight = np.zeros((2, 19, 4))
    for n, y in np.ndindex(12, 2):
        before = None
        for c in range(-(-LENGTH[n] // 4)):
            here = experts[n, y, c].tolist()
            first[y, DOMAIN[n], here[0]] += 1
            for e in here:
                chosen[y, DOMAIN[n], e] += 1
                by_chunk[y, c, e] += 1
                for other in here:
                    pairs[y, e, other] += 1
            if before is not None:
                switched[y, DOMAIN[n]] += here[0] != before[0]
                kept[y, DOMAIN[n]] += len(set(here) & set(before))
            before = here
        for t in range(LENGTH[n]):
            for k in range(2):
                e = experts[n, y, t // 4, k]
                tokens[y, e, ROWS["tokens", "token"][n, t]] += 1
                weight[y, t, e] += float(ROWS["routing", "weights"][n, y, t, k])
    for name, want in (("chosen", chosen), ("first", first), ("by_chunk", by_chunk), ("pairs", pairs),
                       ("switched", switched), ("kept", kept), ("token_choices", tokens),
                       ("weight_by_position", weight)):  # fmt: skip
        np.testing.assert_array_equal(arrays[name], want, err_msg=name)


def test_windows_are_slid_token_by_token() -> None:
    used = np.zeros((2, len(summaries.WINDOWS)), dtype=int)
    for n, y in np.ndindex(12, 2):
        by_token = [set(ROWS["routing", "experts"][n, y, t // 4].tolist()) for t in range(LENGTH[n])]
        for w, window in enumerate(summaries.WINDOWS):
            for start in range(LENGTH[n] - window + 1):
                used[y, w] += len(set().union(*by_token[start : start + window]))
    np.testing.assert_array_equal(WHOLE["routing"]["used_in_window"], used)


def test_margins_and_contexts_of_experts() -> None:
    margin: dict[tuple[int, int], list[float]] = defaultdict(list)
    found: dict[tuple[int, int], list[tuple[float, int, int]]] = defaultdict(list)
    for n, y in np.ndindex(12, 2):
        for c in range(-(-LENGTH[n] // 4)):
            logits = ROWS["routing", "logits"][n, y, c].astype(float)
            here = ROWS["routing", "experts"][n, y, c].tolist()
            left = [e for e in range(4) if e not in here]
            margin[y, DOMAIN[n]].append(min(logits[here]) - max(logits[left]))
            probability = np.exp(logits) / np.exp(logits).sum()
            for e in here:
                found[y, e].append((float(np.float16(probability[e])), 100 + n, 4 * c))
    arrays = WHOLE["routing"]
    for (y, z), values in margin.items():
        assert arrays["margin_sum"][y, z] == pytest.approx(sum(values))
        assert arrays["margin_square"][y, z] == pytest.approx(sum(value**2 for value in values))
        counts = np.histogram(values, bins=summaries.MARGIN_EDGES)[0]
        np.testing.assert_array_equal(arrays["margin_histogram"][y, z], counts)
    for y, e in np.ndindex(2, 4):
        assert listed("routing", "context", y, e) == best(found, (y, e), summaries.NUM_CONTEXTS)


def test_memory() -> None:
    arrays = WHOLE["memory"]
    weight, reads = np.zeros((3, 2, 12)), np.zeros((3, 2, 12), dtype=int)
    found: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
    gates: dict[int, list[float]] = defaultdict(list)
    for n in range(12):
        for t, h, k in np.ndindex(LENGTH[n], 2, 3):
            row, share = (ROWS["memory", name][n, 0, t, h, k] for name in ("addresses", "weights"))
            weight[DOMAIN[n], h, row] += float(share)
            reads[DOMAIN[n], h, row] += 1
            found[int(row)].append((float(share), 100 + n, t))
        gates[DOMAIN[n]].append(float(ROWS["memory", "gate"][n, 0, : LENGTH[n]].astype(float).mean()))
    for name, want in (("weight", weight), ("reads", reads)):
        np.testing.assert_array_equal(arrays[name][0], want.sum(axis=(0, 1)))
        np.testing.assert_array_equal(arrays[f"{name}_by_domain"][0], want.sum(axis=1))
        np.testing.assert_array_equal(arrays[f"{name}_by_head"][0], want.sum(axis=0))
    for row in range(12):
        assert listed("memory", "context", 0, row) == best(found, row, 3)
    for z, means in gates.items():
        assert arrays["gate_sum"][0, z] == pytest.approx(sum(means))
        assert arrays["gate_square"][0, z] == pytest.approx(sum(mean**2 for mean in means))
    thousandths = np.concatenate([ROWS["memory", "gate"][n, 0, : LENGTH[n]] for n in range(12)]).astype(float)
    steps = np.arange(1001) @ arrays["gate_histogram"][0].sum(axis=0) / 1000
    assert steps == pytest.approx(thousandths.sum(), abs=5e-4 * len(thousandths))


def test_what_is_not_bounded_is_left_out() -> None:
    rows = {key: array for key, array in ROWS.items() if key[0] in ("tokens", "memory", "routing")}
    large = {**made.CONFIG, "memory_num_keys": [1500, 1500], "vocab_size": 2**21}
    summary = summaries.summarize(rows, config=large, domains=made.DOMAINS, first_sample=0)
    assert "weight_by_domain" not in summary["memory"] and "reads_by_head" not in summary["memory"]
    assert "token_choices" not in summary["routing"]
    assert summary["memory"]["reads"].shape == (1, 1500 * 1500)
    np.testing.assert_array_equal(summary["memory"]["reads"][0, :12], WHOLE["memory"]["reads"][0])


def test_workspace() -> None:
    arrays = WHOLE["workspace"]
    read, by_domain, lag = np.zeros((2, 19, 3)), np.zeros((2, 3, 3)), np.zeros((2, 3, 5))
    reads: dict[tuple[int, int], list[tuple[float, int, int]]] = defaultdict(list)
    writes: dict[tuple[int, int], list[tuple[float, int, int]]] = defaultdict(list)
    gates: dict[tuple[int, int], list[float]] = defaultdict(list)
    entropies: dict[tuple[int, int], list[float]] = defaultdict(list)

    def relative_entropy(weights: NDArray[Any]) -> float:
        share = weights.astype(float) / weights.astype(float).sum()
        return float(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(len(share)))

    read_entropy = np.zeros((2, 19))
    for n, y in np.ndindex(12, 2):
        address, gate, write, write_gate = (
            ROWS["workspace", name][n, y].astype(float)
            for name in ("read_address", "read_gate", "write_address", "write_gate")
        )
        for t in range(LENGTH[n]):
            read[y, t] += address[t]
            by_domain[y, DOMAIN[n]] += address[t]
            read_entropy[y, t] += relative_entropy(address[t])
            for s in range(3):
                reads[y, s].append((float(np.float16(gate[t] * address[t, s])), 100 + n, t))
                left = 1.0
                for back in range(
                    1, t // 4 + 1
                ):  # what was written `back` chunks ago, later writes undone first
                    lag[y, s, back] += gate[t] * address[t, s] * left * write_gate[t // 4 - back, s]
                    left *= 1 - write_gate[t // 4 - back, s]
                lag[y, s, 0] += gate[t] * address[t, s] * left
        for c, s in np.ndindex(LENGTH[n] // 4, 3):
            gates[y, s].append(write_gate[c, s])
            entropies[y, s].append(relative_entropy(write[4 * c : 4 * c + 4, s]))
            for t in range(4 * c, 4 * c + 4):
                writes[y, s].append((float(np.float16(write_gate[c, s] * write[t, s])), 100 + n, t))
    np.testing.assert_array_equal(arrays["read_by_position"], read)
    np.testing.assert_allclose(arrays["read_by_domain"], by_domain)
    np.testing.assert_allclose(arrays["gated_read_by_lag"], lag)
    np.testing.assert_allclose(arrays["read_entropy_by_position"], read_entropy)
    assert arrays["read_entropy_histogram"].sum(axis=1).tolist() == [LENGTH.sum()] * 2
    for y, s in np.ndindex(2, 3):
        assert listed("workspace", "read", y, s) == best(reads, (y, s), summaries.NUM_CONTEXTS)
        assert listed("workspace", "write", y, s) == best(writes, (y, s), summaries.NUM_CONTEXTS)
        assert arrays["write_gate_sum"][y, s] == pytest.approx(sum(gates[y, s]))
        assert arrays["write_gate_log_sum"][y, s] == pytest.approx(np.log1p(-np.array(gates[y, s])).sum())
        steps = np.rint(1000 * np.array(gates[y, s])).astype(int)
        np.testing.assert_array_equal(
            arrays["write_gate_histogram"][y, s], np.bincount(steps, minlength=1001)
        )
        assert arrays["write_entropy_sum"][y, s] == pytest.approx(sum(entropies[y, s]))


def test_states() -> None:
    arrays = WHOLE["ssm"]
    norms, decay = (ROWS["ssm", name].astype(float) for name in ("norms", "decay"))
    for y in range(6):
        for c in range(3):
            whole = norms[LENGTH >= 8 * (c + 1), y, c]
            np.testing.assert_allclose(arrays["norm_sum"][y, c], whole.sum(axis=0))
            np.testing.assert_allclose(arrays["norm_square"][y, c], (whole**2).sum(axis=0))
            np.testing.assert_allclose(arrays["norm_log_sum"][y, c], np.log2(whole).sum(axis=0))
            assert arrays["norm_positive"][y, c].tolist() == [len(whole)] * 2
        last = [norms[n, y, LENGTH[n] // 8] for n in range(12) if LENGTH[n] % 8]
        np.testing.assert_allclose(arrays["last_norm_sum"][y], np.sum(last, axis=0))
        np.testing.assert_array_equal(arrays["decay_by_position"][y], np.nansum(decay[:, y], axis=0))
        for h in range(2):
            tokens = -decay[:, y, :, h][~np.isnan(decay[:, y, :, h])]
            counts = np.histogram(tokens, bins=summaries.DECAY_EDGES)[0]
            np.testing.assert_array_equal(arrays["decay_histogram"][y, h], counts)
    by_domain = [np.nansum(decay[DOMAIN == z], axis=(0, 2)) for z in range(3)]
    np.testing.assert_array_equal(arrays["decay_by_domain"], np.stack(by_domain, axis=1))


def test_attention_and_mass() -> None:
    edges = summaries.distance_edges(19, 4)
    np.testing.assert_array_equal(edges, [0, 4, 8, 16, 32])
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for n, y in np.ndindex(12, 2):
        for t, h, k in np.ndindex(LENGTH[n], 2, 2):
            block = int(ROWS["attention", "blocks"][n, y, t, h, k])
            if block >= 0:
                found[y, h].append(t - 4 * block)
    for (y, h), distances in found.items():
        # the drawn blocks may lie after the query, which no model's do: those count into the first bin
        counts = np.histogram(np.maximum(distances, 0), bins=edges)[0]
        np.testing.assert_array_equal(WHOLE["attention"]["distance_count"][y, h], counts)
        assert WHOLE["attention"]["distance_sum"][y, h] == sum(distances)
    mass = ROWS["mass", "mass"].astype(float)
    np.testing.assert_array_equal(WHOLE["mass"]["mass_by_position"], np.nansum(mass, axis=0))
    by_domain = [np.nansum(mass[DOMAIN == z], axis=(0, 2)) for z in range(3)]
    np.testing.assert_array_equal(WHOLE["mass"]["mass_by_domain"], np.stack(by_domain, axis=1))


def test_paths() -> None:
    share, cosine = (ROWS["paths", name].astype(float) for name in ("share", "cosine"))
    arrays = WHOLE["paths"]
    np.testing.assert_allclose(arrays["share_sum"], np.tensordot(LENGTH, share, axes=1))
    np.testing.assert_array_equal(arrays["share_tokens"], np.full((6, 5), LENGTH.sum()))
    assert (arrays["cosine_tokens"][:, 3] == 0).all() and (arrays["cosine_sum"][:, 3] == 0).all()
    np.testing.assert_allclose(arrays["cosine_sum"][:, 0], np.tensordot(LENGTH, cosine[..., 0], axes=1))


def test_half_as_many_bins_are_pairs_of_bins() -> None:
    for size in (1, 7, 64, 100, 127, 128, 129, 512, 1000, 32768):
        fine, coarse = summaries.bin_edges(size, 128), summaries.bin_edges(size, 64)
        assert set(coarse) <= set(fine)


def test_layers_of_a_group() -> None:
    of = {group: summaries.layers_of(made.CONFIG, group) for group in summaries.FIELDS}
    assert of["routing"] == (0, 2) and of["memory"] == (3,) and of["workspace"] == (1, 4)
    assert of["attention"] == of["mass"] == (2, 5)
    assert of["ssm"] == of["paths"] == (0, 1, 2, 3, 4, 5)
    assert summaries.layers_of({**made.CONFIG, "attention_every": 0}, "attention") == ()
