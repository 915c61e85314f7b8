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

CONFIG = {**made.CONFIG, "moe_top_k": 2, "memory_num_heads": 2}
NAMES = ("poetry", *made.DOMAINS)  # nothing is of the first domain
DIMS = {
    ("routing", "experts"): "chunk rank",
    ("routing", "weights"): "position rank",
    ("routing", "logits"): "chunk expert",
    ("memory", "addresses"): "position head k",
    ("memory", "weights"): "position head k",
    ("memory", "gate"): "position",
    ("paths", "share"): "path",
    ("paths", "cosine"): "path",
}


class DrawnCapture(dict[str, xr.Dataset]):
    """A capture of random rows, with its summary taken in three commits."""

    def __init__(self) -> None:
        rows = made.draw_rows(np.random.default_rng(3), 14)
        rows["tokens", "domain"] += 1
        super().__init__()
        self.attributes: dict[str, Any] = {"config": CONFIG, "domains": list(NAMES)}
        self.domains = tuple(NAMES[code] for code in rows["tokens", "domain"])
        tokens = {name: (("sample", "position"), rows["tokens", name]) for name in ("token", "loss")}
        self["tokens"] = xr.Dataset({**tokens, "length": ("sample", rows["tokens", "length"])})
        for group in ("routing", "memory", "paths"):
            arrays = {
                name: (("sample", "layer", *dims.split()), rows[of, name])
                for (of, name), dims in DIMS.items()
                if of == group
            }
            coordinates: dict[str, list[Any]] = {"layer": list(summaries.layers_of(CONFIG, group))}
            if group == "paths":
                coordinates["path"] = list(PATHS)
            self[group] = xr.Dataset(
                arrays, coords=coordinates, attrs={"chunk_size": CONFIG["moe_chunk_size"]}
            )
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


def assert_same(have: Any, want: Any, rtol: float = 1e-12) -> None:
    """Every field of two results is the same; sums may be rounded in another order."""
    assert type(have) is type(want)
    for field in dataclasses.fields(want):
        one, other = getattr(have, field.name), getattr(want, field.name)
        if isinstance(other, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol, err_msg=field.name)
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=rtol, nan_ok=True), field.name
        elif isinstance(other, tuple) and other and dataclasses.is_dataclass(other[0]):
            for each, expected in zip(one, other, strict=True):
                assert_same(each, expected, rtol)
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


def test_path_use(capture: DrawnCapture) -> None:
    assert_same(metrics.summarized_path_use(capture), metrics.captured_path_use(capture), rtol=1e-7)


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
