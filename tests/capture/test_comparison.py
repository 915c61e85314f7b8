"""What `compare` counts, against the same counted by hand from the arrays of both captures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_lab.capture import Capture, compare
from hydra_lab.capture.in_memory import capture_batch
from tests.capture.shared import ByteTokenizer, run, write_texts
from tests.helpers import lively_model, random_ids

DOMAINS = ("prose", "x", "y")


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def baseline(model: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return run(model, texts, tmp_path_factory.mktemp("out") / "baseline.zarr")


@pytest.fixture(scope="module")
def cut(model: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """The workspace of block 1 adds nothing; what is upstream of it decides as before."""
    with model.cut("workspace", [1]):
        return run(model, texts, tmp_path_factory.mktemp("out") / "cut.zarr")


def test_a_capture_and_itself(baseline: Capture) -> None:
    same = compare(baseline, baseline)
    assert same.domains == DOMAINS and same.num_samples.tolist() == [6, 4, 2]
    assert same.num_tokens.tolist() == [109, 2 * 3 + 29, 2 * 3]
    assert (same.loss_change == 0).all()
    for change in (same.expert_set, same.first_expert, same.addresses, same.memory_gate, same.selected_blocks,
                   same.read_gate, same.write_gate, same.state_norm, *same.path_share.values()):  # fmt: skip
        assert change is not None
        assert (change.mean[change.count > 0] == 0).all() and np.isnan(change.mean[change.count == 0]).all()
    assert not same.expert_set_changed.values.any()


def test_an_intervention_beside_its_baseline(baseline: Capture, cut: Capture) -> None:
    found = compare(baseline, cut)
    labels = np.array(baseline.domains)
    a, b = baseline["tokens"].loss.values, cut["tokens"].loss.values
    np.testing.assert_array_equal(found.loss_difference.values, b - a)
    for z, domain in enumerate(DOMAINS):
        rows = labels == domain
        assert found.loss[z] == pytest.approx(np.nanmean(a[rows]), rel=1e-6)
        assert found.loss_change[z] == pytest.approx(np.nanmean(b[rows].astype(float) - a[rows]), rel=1e-6)
    assert np.abs(found.loss_change).max() > 1e-3, "the intervention did nothing"

    assert found.expert_set is not None and found.expert_set.layers == (0, 2)
    assert (found.expert_set.mean[0] == 0).all(), "block 0 comes before the cut"
    length = baseline["tokens"].length.values.astype(int)
    chunks = -(-length // 8)
    experts = [each["routing"].experts.values for each in (baseline, cut)]
    changed = found.expert_set_changed.values
    for y in range(2):
        for z, domain in enumerate(DOMAINS):
            sets, firsts = [], []
            for sample in np.flatnonzero(labels == domain):
                for chunk in range(chunks[sample]):
                    ours, theirs = (each[sample, y, chunk] for each in experts)
                    sets.append(set(ours.tolist()) != set(theirs.tolist()))
                    firsts.append(ours[0] != theirs[0])
                    assert changed[sample, y, chunk] == sets[-1]
            assert found.expert_set.count[y, z] == len(sets)
            assert found.expert_set.mean[y, z] == pytest.approx(np.mean(sets))
            assert found.first_expert is not None
            assert found.first_expert.mean[y, z] == pytest.approx(np.mean(firsts))

    assert found.addresses is not None and found.addresses.layers == (2,)
    replaced = []
    addresses = [each["memory"].addresses.values for each in (baseline, cut)]
    for sample in np.flatnonzero(labels == "prose"):
        for position in range(length[sample]):
            for head in range(2):
                ours, theirs = (set(each[sample, 0, position, head].tolist()) for each in addresses)
                replaced.append(len(ours - theirs) / 4)
    assert found.addresses.mean[0, 0] == pytest.approx(np.mean(replaced)) and np.mean(replaced) > 0
    assert found.addresses.count[0, 0] == len(replaced) == 2 * 109

    assert found.selected_blocks is not None and (found.selected_blocks.mean[0, 0]) == 0
    replaced = []
    blocks = [each["attention"].blocks.values for each in (baseline, cut)]
    for sample in np.flatnonzero(labels == "prose"):
        for position in range(length[sample]):
            for head in range(2):
                ours, theirs = (set(each[sample, 1, position, head].tolist()) - {-1} for each in blocks)
                if ours or theirs:
                    replaced.append(1 - len(ours & theirs) / max(len(ours), len(theirs)))
    assert found.selected_blocks.count[1, 0] == len(replaced) > 0
    assert found.selected_blocks.mean[1, 0] == pytest.approx(np.mean(replaced))

    prose = labels == "prose"
    for change, group, name, y in (
        (found.memory_gate, "memory", "gate", 0),
        (found.read_gate, "workspace", "read_gate", 1),
        (found.write_gate, "workspace", "write_gate", 1),
    ):
        assert change is not None
        ours, theirs = (each[group][name].values[prose, y].astype(float) for each in (baseline, cut))
        assert change.mean[y, 0] == pytest.approx(np.nanmean(theirs - ours)) and change.mean[y, 0] != 0
    assert found.state_norm is not None and (found.state_norm.mean[0] == 0).all()
    ours, theirs = (each["ssm"].norms.values[prose, 3] for each in (baseline, cut))
    assert found.state_norm.mean[3, 0] == pytest.approx(np.nanmean(np.log(theirs / ours)), rel=1e-5)

    share = found.path_share["workspace"]
    before = np.nanmean(baseline["paths"].share.sel(path="workspace").values[prose, 1])
    assert share.mean[1, 0] == pytest.approx(-before, rel=1e-5), "a path that is cut has no share left"
    assert np.isnan(share.mean[0, 0]) and share.count[0, 0] == 0, "block 0 has no workspace"


def test_prompts_are_compared_too(model: Any) -> None:
    ids = random_ids(model.config, 2, 16)
    before = capture_batch(model, ids, domains=["p", "q"])
    with model.cut("moe"):
        after = capture_batch(model, ids, domains=["p", "q"])
    found = compare(before, after)
    assert found.domains == ("p", "q") and np.abs(found.loss_change).min() > 0


def test_groups_that_only_one_has(model: Any, texts: Path, baseline: Capture, tmp_path: Path) -> None:
    found = compare(baseline, run(model, texts, tmp_path / "run.zarr", signals=("memory",)))
    assert found.addresses is not None
    assert found.expert_set is None and found.state_norm is None and found.path_share == {}


def test_other_texts_are_refused(model: Any, texts: Path, baseline: Capture, tmp_path: Path) -> None:
    def refused(capture: Capture, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            compare(baseline, capture)
        assert "\n" not in str(error.value)

    shorter = run(model, texts, tmp_path / "shorter.zarr", limit_tokens=100, signals=())
    refused(shorter, "different numbers of samples: 12 and 5")
    windows = run(model, texts, tmp_path / "windows.zarr", sequence_length=16, signals=())
    refused(windows, r"different windows \(sequence_length\): 20 and 16")

    class OtherTokenizer(ByteTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    other = run(model, texts, tmp_path / "tokenizer.zarr", tokenizer=OtherTokenizer(), signals=())
    refused(other, "different tokenizer")
    (tmp_path / "more").mkdir()
    changed = write_texts(tmp_path / "more")
    (changed / "mixed.jsonl").write_text((texts / "mixed.jsonl").read_text().replace("ccc", "cxc"))
    refused(run(model, changed, tmp_path / "text.zarr", signals=()), "different tokens, first in sample 8")
    (changed / "mixed.jsonl").write_text((texts / "mixed.jsonl").read_text().replace('"y"', '"z"'))
    refused(
        run(model, changed, tmp_path / "domain.zarr", signals=()), "different domains at sample 7: y and z"
    )
    wider = lively_model(moe_num_experts=5)
    refused(run(wider, texts, tmp_path / "wider.zarr"), "different routing: blocks")
