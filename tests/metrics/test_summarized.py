"""A capture's running summary gives the numbers that its raw arrays give."""

import dataclasses
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hydra_lab import metrics, summaries
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.summaries import Summary
from hydra_lab.taps import PATHS
from tests.helpers import lively_model

_spec = spec_from_file_location("summary_rows", Path(__file__).parents[1] / "summaries" / "rows.py")
assert _spec is not None and _spec.loader is not None
made = module_from_spec(_spec)
_spec.loader.exec_module(made)

CONFIG = {**made.CONFIG, "moe_top_k": 2, "memory_num_heads": 2, "attention_num_selected": 2}
NAMES = ("poetry", *made.DOMAINS)  # nothing is of the first domain
OCTAVE_16TH = 2 ** (1 / 16) - 1
"""Relative error of a half-life's quantile from a summary: half of a bin of an eighth of an octave."""
DIMS = {
    ("routing", "experts"): "chunk rank",
    ("routing", "weights"): "position rank",
    ("routing", "logits"): "chunk expert",
    ("memory", "addresses"): "position head k",
    ("memory", "weights"): "position head k",
    ("memory", "gate"): "position",
    ("workspace", "write_address"): "position slot",
    ("workspace", "write_gate"): "chunk slot",
    ("workspace", "read_address"): "position slot",
    ("workspace", "read_gate"): "position",
    ("attention", "blocks"): "position head k",
    ("mass", "mass"): "position query_head kind",
    ("ssm", "norms"): "chunk head",
    ("ssm", "decay"): "position head",
    ("paths", "share"): "path",
    ("paths", "cosine"): "path",
}
GROUPS = ("routing", "attention", "mass", "workspace", "memory", "ssm", "paths")
CHUNK_SIZES = {"routing": "moe_chunk_size", "workspace": "workspace_chunk_size", "ssm": "ssm_chunk_size"}


class DrawnCapture(dict[str, xr.Dataset]):
    """A capture of random rows, with its summary taken in three commits."""

    def plain(self, group: str) -> xr.Dataset:
        return self[group]

    def __init__(self, shortest: int = 1, length: int = 19) -> None:
        rows = made.draw_rows(np.random.default_rng(3), 14, length=length, shortest=shortest)
        rows["tokens", "domain"] += 1
        super().__init__()
        self.attributes: dict[str, Any] = {"config": CONFIG, "domains": list(NAMES)}
        self.domains = tuple(NAMES[code] for code in rows["tokens", "domain"])
        tokens = {name: (("sample", "position"), rows["tokens", name]) for name in ("token", "loss")}
        self["tokens"] = xr.Dataset({**tokens, "length": ("sample", rows["tokens", "length"])})
        for group in GROUPS:
            arrays = {
                name: (("sample", "layer", *dims.split()), rows[of, name])
                for (of, name), dims in DIMS.items()
                if of == group
            }
            coordinates: dict[str, list[Any]] = {"layer": list(summaries.layers_of(CONFIG, group))}
            if group == "paths":
                coordinates["path"] = list(PATHS)
            if group == "mass":
                coordinates["kind"] = list(metrics.KINDS)
            attributes = {"chunk_size": CONFIG[CHUNK_SIZES[group]]} if group in CHUNK_SIZES else {}
            self[group] = xr.Dataset(arrays, coords=coordinates, attrs=attributes)
        self.summary = self._summarize(rows, 0, 5)
        for start, end in ((5, 6), (6, 14)):
            self.summary = summaries.merge(self.summary, self._summarize(rows, start, end))

    @staticmethod
    def _summarize(rows: dict[tuple[str, str], Any], start: int, end: int) -> Summary:
        part = made.take(rows, slice(start, end))
        return summaries.summarize(part, config=CONFIG, domains=NAMES, first_sample=start)


class RecordedCapture:
    """A batch that a model was run on, with its summary."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = lively_model()
        ids = torch.randint(model.config.vocab_size, (5, 40), generator=torch.Generator().manual_seed(2))
        length = torch.tensor([40, 33, 7, 16, 1])
        labels = ("b", "a", "a", "b", "c")
        self.batch = capture_batch(model, ids, (torch.arange(40) < length[:, None]).long(), domains=labels)
        names = sorted(set(labels))
        rows = {
            (group, str(name)): array.to_numpy()
            for group, arrays in self.batch.items()
            for name, array in arrays.data_vars.items()
        }
        rows["tokens", "domain"] = np.array([names.index(label) for label in labels])
        self.attributes = {**self.batch.attributes, "domains": names}
        self.summary = summaries.summarize(
            rows, config=self.attributes["config"], domains=names, first_sample=0
        )


@pytest.fixture(scope="module")
def capture() -> DrawnCapture:
    return DrawnCapture()


def test_a_model_s_own_decisions() -> None:
    recorded = RecordedCapture()
    assert set(recorded.summary) == {"tokens", "routing", "attention", "workspace", "memory", "ssm", "paths"}
    routing = metrics.routing_record(recorded.batch, logits=True)
    counts = metrics.summarized_routing(recorded)
    assert counts.layers == routing.layers and counts.domains == ("b", "a", "c")
    assert_same(metrics.expert_load(counts), metrics.expert_load(routing))
    margin = metrics.routing_margin(counts)
    assert_same(margin, metrics.routing_margin(routing))
    # the choice follows the logits, so no margin is below zero but by the 16 bits they are stored in
    assert (margin.quantiles >= 0).all() and (margin.mean > 0).all()
    lookups = metrics.lookup_record(recorded.batch, 2)
    assert_same(metrics.memory_use(metrics.summarized_lookups(recorded, 2)), metrics.memory_use(lookups))
    assert_same(metrics.summarized_path_use(recorded), metrics.captured_path_use(recorded.batch), rtol=1e-6)
    spaces = metrics.workspace_record(recorded.batch, 1), metrics.summarized_workspace(recorded, 1)
    assert_same(*(metrics.read_entropy(each, num_bins=40) for each in reversed(spaces)))
    assert_same(*(metrics.read_lag(each) for each in reversed(spaces)))
    states = metrics.state_record(recorded.batch, 0), metrics.summarized_states(recorded, 0)
    assert_same(*(metrics.state_norms(each) for each in reversed(states)), rtol=1e-6)
    lives = metrics.half_life(states[0]), metrics.half_life(states[1])
    np.testing.assert_allclose(lives[1].quantiles, lives[0].quantiles, rtol=OCTAVE_16TH)
    assert_same(lives[1], lives[0], leave_out=("quantiles",))
    uses = (metrics.selection_record(recorded.batch, 3), metrics.summarized_selections(recorded, 3))
    assert_same(metrics.selection_use(uses[1]), metrics.selection_use(uses[0]))


def assert_same(have: Any, want: Any, *, rtol: float = 1e-12, leave_out: tuple[str, ...] = ()) -> None:
    """Every field of two results is the same; sums may be rounded in another order."""
    assert type(have) is type(want)
    for field in dataclasses.fields(want):
        if field.name in leave_out:
            continue
        one, other = getattr(have, field.name), getattr(want, field.name)
        if isinstance(other, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol, err_msg=field.name)
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=rtol, nan_ok=True), field.name
        elif isinstance(other, tuple) and other and dataclasses.is_dataclass(other[0]):
            for each, expected in zip(one, other, strict=True):
                assert_same(each, expected, rtol=rtol)
        else:
            assert one == other, field.name


def test_routing(capture: DrawnCapture) -> None:
    record = metrics.routing_record(capture, logits=True, tokens=True)
    counts = metrics.summarized_routing(capture)
    assert counts.domains == tuple(dict.fromkeys(capture.domains)) and len(counts.domains) == 3
    for metric in (
        metrics.expert_load,
        metrics.expert_by_domain,
        metrics.expert_by_chunk,
        metrics.expert_by_position,
        metrics.co_activation,
        metrics.switch_rate,
        metrics.routing_margin,
        metrics.expert_sparsity,
    ):
        assert_same(metric(counts), metric(record))
    classes = np.arange(11) % 3
    of_summary, of_record = (
        metrics.expert_by_token_class(each, classes, ("a", "b", "c")) for each in (counts, record)
    )
    assert_same(of_summary, of_record)
    assert_same(metrics.specialization(of_summary), metrics.specialization(of_record))


def test_memory(capture: DrawnCapture) -> None:
    record = metrics.lookup_record(capture, 3)
    counts = metrics.summarized_lookups(capture, 3)
    for metric in (
        metrics.memory_use,
        metrics.memory_use_by_domain,
        metrics.memory_use_by_head,
        metrics.beta_by_domain,
        metrics.memory_map,
        metrics.dead_addresses,
    ):
        assert_same(metric(counts), metric(record))


@pytest.mark.parametrize("layer", [1, 4])
def test_workspace(capture: DrawnCapture, layer: int) -> None:
    record = metrics.workspace_record(capture, layer)
    counts = metrics.summarized_workspace(capture, layer)
    for bins in (19, 1):
        assert_same(metrics.slot_reads(counts, bins), metrics.slot_reads(record, bins))
        assert_same(metrics.read_entropy(counts, bins), metrics.read_entropy(record, bins))
    assert_same(metrics.read_lag(counts), metrics.read_lag(record))
    # gates and entropies are counted to the nearest thousandth
    writes = [metrics.slot_writes(each) for each in (counts, record)]
    np.testing.assert_allclose(writes[0].strength_quantiles, writes[1].strength_quantiles, rtol=0, atol=5e-4)
    assert_same(*writes, leave_out=("strength_quantiles",))
    entropies = [metrics.write_entropy(each) for each in (counts, record)]
    np.testing.assert_allclose(entropies[0].quantiles, entropies[1].quantiles, rtol=0, atol=5e-4)
    assert_same(*entropies, leave_out=("quantiles",))


@pytest.mark.parametrize("shortest", [1, 19])
def test_states(shortest: int) -> None:
    capture = DrawnCapture(shortest)  # samples of one length keep their partial last chunk
    record = metrics.state_record(capture, 5)
    counts = metrics.summarized_states(capture, 5)
    # a spread is the root of a difference of sums of squares
    assert_same(metrics.state_norms(counts), metrics.state_norms(record), rtol=1e-7)
    assert metrics.state_norms(counts).position.tolist() == ([8, 16, 19] if shortest == 19 else [8, 16, 24])
    for bins in (19, 1):
        assert_same(metrics.half_life_by_position(counts, bins), metrics.half_life_by_position(record, bins))
    assert_same(metrics.half_life_by_domain(counts), metrics.half_life_by_domain(record))
    lives = [metrics.half_life(each) for each in (counts, record)]
    np.testing.assert_allclose(lives[0].quantiles, lives[1].quantiles, rtol=OCTAVE_16TH)
    assert_same(*lives, leave_out=("quantiles",))


def test_half_lives_at_the_ends_of_the_histogram() -> None:
    rows = made.draw_rows(np.random.default_rng(0), 4, shortest=19)
    rows["ssm", "decay"][..., 0], rows["ssm", "decay"][..., 1] = 0.0, -500.0
    summary = DrawnCapture._summarize(rows, 0, 4)
    counts = metrics.StateCounts.from_summary(summary, 0, config=CONFIG, domains=NAMES)
    result = metrics.half_life(counts)
    np.testing.assert_array_equal(result.half_life, [np.inf, np.log(2) / 500])
    np.testing.assert_array_equal(result.quantiles, [[np.inf, np.inf], [np.log(2) / 64] * 2])


def test_attention(capture: DrawnCapture) -> None:
    record, counts = metrics.selection_record(capture, 5), metrics.summarized_selections(capture, 5)
    assert_same(metrics.selection_use(counts), metrics.selection_use(record))
    masses = metrics.summarized_mass(capture), metrics.mass_record(capture)
    assert masses[0].layers == (2, 5)
    for bins in (19, 1):
        assert_same(*(metrics.mass_by_kind(each, bins) for each in masses))


def test_what_looks_at_single_samples_refuses_counts(capture: DrawnCapture) -> None:
    counts = metrics.summarized_states(capture, 0)
    for metric in (metrics.norm_growth, metrics.state_saturation, metrics.receptive_field):
        with pytest.raises(
            ValueError, match=rf"{metric.__name__} looks at every sample by itself.*state_record"
        ):
            metric(counts)
    one = np.zeros(1, dtype=int)
    selections: Any = metrics.summarized_selections(capture, 2)
    with pytest.raises(ValueError, match=r"hit_rate looks at every sample by itself.*selection_record"):
        metrics.hit_rate(metrics.TargetRecord(selections, one, one, one))


def test_long_samples_are_summarized_in_128_bins() -> None:
    capture = DrawnCapture(length=301)  # bins of two and three tokens
    workspaces = metrics.summarized_workspace(capture, 1), metrics.workspace_record(capture, 1)
    states = metrics.summarized_states(capture, 1), metrics.state_record(capture, 1)
    masses = metrics.summarized_mass(capture), metrics.mass_record(capture)
    assert_same(*(metrics.slot_reads(each) for each in workspaces))
    assert_same(*(metrics.read_entropy(each, 32) for each in workspaces))
    assert_same(*(metrics.half_life_by_position(each) for each in states))
    assert_same(*(metrics.mass_by_kind(each) for each in masses))
    assert metrics.slot_reads(workspaces[1], 100).read.shape == (100, 3)
    with pytest.raises(ValueError, match="in 128 bins and cannot be given in 100"):
        metrics.slot_reads(workspaces[0], 100)


def test_path_use(capture: DrawnCapture) -> None:
    assert_same(metrics.summarized_path_use(capture), metrics.captured_path_use(capture), rtol=1e-7)


def test_loss(capture: DrawnCapture) -> None:
    result = metrics.loss_by_domain(capture.summary, domains=NAMES, num_bins=19)
    assert result.domains == metrics.summarized_routing(capture).domains
    for z, domain in enumerate(result.domains):
        loss = capture["tokens"]["loss"].to_numpy()[[label == domain for label in capture.domains]]
        assert result.mean[z] == pytest.approx(np.nanmean(loss.astype(float)))
        means = [np.nanmean(row.astype(float)) for row in loss if not np.isnan(row).all()]
        assert result.sample_mean[z] == pytest.approx(np.mean(means))
        assert result.error[z] == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)))
        assert result.num_samples[z] == len(means) and result.num_tokens[z] == (~np.isnan(loss)).sum()
        assert result.by_position[z, 1] == pytest.approx(np.nanmean(loss[:, 1].astype(float)))
    assert np.isnan(result.by_position[:, 0]).all()  # the first token of a sample has no loss
    halved = metrics.loss_by_domain(capture.summary, domains=NAMES, num_bins=1)
    np.testing.assert_allclose(halved.by_position[:, 0], result.mean)


def test_contexts_point_into_the_capture(capture: DrawnCapture) -> None:
    top = metrics.top_contexts(capture.summary, "memory row", 3, 5, config=CONFIG)
    lookups = metrics.lookup_record(capture, 3)
    best = lookups.weights[(lookups.addresses == 5) & lookups.mask[:, :, None, None]].max()
    assert top.score[0] == best and (np.diff(top.score) <= 0).all()
    at = (top.sample[0], top.position[0])
    assert best in lookups.weights[at][lookups.addresses[at] == 5]
    assert len(set(top.sample.tolist())) == len(top.sample)  # each from another sample
    assert (top.num_tokens, top.num_samples) == (lookups.length.sum(), 14)
    expert = metrics.top_contexts(capture.summary, "expert", 2, 3, config=CONFIG)
    assert (expert.position % 4 == 0).all() and expert.kind == "expert"
    assert len(metrics.top_contexts(capture.summary, "slot write", 4, 0, config=CONFIG).score) > 0


def test_what_the_summary_lacks_is_named(capture: DrawnCapture) -> None:
    summary = {"tokens": capture.summary["tokens"]}
    options: dict[str, Any] = {"config": CONFIG, "domains": NAMES}
    with pytest.raises(ValueError, match="summary has no routing; it has tokens"):
        metrics.RoutingCounts.from_summary(summary, **options)
    with pytest.raises(ValueError, match="summary has no memory; it has tokens"):
        metrics.LookupCounts.from_summary(summary, 3, **options)
    with pytest.raises(ValueError, match="block 2 has no memory; blocks 3 have"):
        metrics.summarized_lookups(capture, 2)
    with pytest.raises(ValueError, match="summary has no workspace; it has tokens"):
        metrics.WorkspaceCounts.from_summary(summary, 1, config=CONFIG)
    with pytest.raises(ValueError, match="block 0 has no attention; blocks 2, 5 have"):
        metrics.summarized_selections(capture, 0)
    with pytest.raises(ValueError, match="summary has no mass; it has tokens"):
        metrics.MassCounts.from_summary(summary, config=CONFIG)
    with pytest.raises(ValueError, match="no contexts of kind 'expert'"):
        metrics.top_contexts(summary, "expert", 0, 0, config=CONFIG)
    with pytest.raises(ValueError, match=r"expert 4 is not one of 0\.\.3"):
        metrics.top_contexts(capture.summary, "expert", 0, 4, config=CONFIG)
    large = dataclasses.replace(
        metrics.summarized_lookups(capture, 3),
        num_keys=(2000, 2000),
        reads_by_domain=None,
        reads_by_head=None,
    )
    with pytest.raises(ValueError, match="not counted by domain for 4,000,000 rows and 3 domains"):
        metrics.memory_use_by_domain(large)
    with pytest.raises(ValueError, match="not counted by head for 4,000,000 rows and 2 heads"):
        metrics.memory_use_by_head(large)
