"""A capture holds what `record` sees, whatever the batch size, and survives being killed at any point."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from hydra_lab.capture import Capture, CaptureProgress, open_capture, record
from hydra_lab.capture.store import CaptureWriter
from hydra_lab.interventions import from_dict, intervened, parse
from hydra_lab.summaries import merge, summarize
from hydra_lab.taps import PATHS
from tests.capture.shared import COMMIT, LENGTH, arrays, assert_identical, run, write_texts
from tests.helpers import lively_model


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def whole(model: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return run(model, texts, tmp_path_factory.mktemp("out") / "whole.zarr", batch_size=4)


@pytest.fixture(scope="module")
def once(model: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """The same, a sample at a time."""
    return run(model, texts, tmp_path_factory.mktemp("out") / "once.zarr", batch_size=1)


def test_groups_dims_and_attributes(whole: Capture, model: Any) -> None:
    assert tuple(whole) == ("tokens", "routing", "attention", "workspace", "memory", "ssm", "paths")
    assert whole.complete and whole.num_samples == 12 and whole.num_tokens == 109 + 12 + 29
    dims = {name: whole[group][name].dims for group in whole for name in whole[group].data_vars}
    assert dims["experts"] == ("sample", "layer", "chunk", "rank")
    assert dims["logits"] == ("sample", "layer", "chunk", "expert")
    assert dims["blocks"] == dims["addresses"] == ("sample", "layer", "position", "head", "k")
    assert dims["write_address"] == ("sample", "layer", "position", "slot")
    assert dims["norms"] == ("sample", "layer", "chunk", "head")
    assert dims["share"] == ("sample", "layer", "path")
    types = {name: str(whole[group][name].dtype) for group in whole for name in whole[group].data_vars}
    assert types["token"] == types["experts"] == types["addresses"] == "uint8" and types["blocks"] == "int8"
    assert types["loss"] == "float32" and types["decay"] == types["write_address"] == "float16"
    assert whole["routing"].layer.values.tolist() == [0, 2] and whole["routing"].attrs["chunk_size"] == 8
    assert whole["memory"].layer.values.tolist() == [2] and whole["memory"].attrs["num_keys"] == [8, 8]
    assert whole["paths"].path.values.tolist() == list(PATHS)
    assert whole.domains == ("prose",) * 6 + ("x", "y", "x", "y", "x", "x")
    attributes = whole.attributes
    assert attributes["backend"] == "torch" and attributes["dtype"] == "float32"
    assert attributes["config"]["moe_num_experts"] == 4 and attributes["tokenizer_name"] == "bytes"
    assert attributes["signals"] == ["routing", "attention", "workspace", "memory", "ssm", "paths", "summary"]
    assert [source["bytes"] for source in attributes["sources"]] == [109, (attributes["sources"][1]["bytes"])]
    assert all(
        len(attributes[name]) == 64 for name in ("weights_sha256", "config_sha256", "tokenizer_sha256")
    )


def test_samples_hold_what_record_sees(whole: Capture, model: Any, texts: Path) -> None:
    tokens = whole["tokens"]
    assert tokens.length.values.tolist() == [20] * 5 + [9] + [3] * 4 + [20, 9]
    assert tokens.document.values.tolist() == [0] * 6 + [1, 2, 3, 4, 5, 5]
    assert tokens.offset.values.tolist() == [0, 20, 40, 60, 80, 100, 0, 0, 0, 0, 0, 20]
    for sample in (0, 5, 7):
        size = int(tokens.length[sample])
        ids = torch.from_numpy(tokens.token.values[sample, :size].astype(np.int64))[None]
        recorded = record(model, ids, contributions=True)
        chunks = -(-size // 8)

        routing = recorded.by_layer("moe.routing")
        for y, layer in enumerate((0, 2)):
            ours = whole["routing"].isel(sample=sample, layer=y)
            np.testing.assert_array_equal(ours.experts[:chunks], routing[layer].experts[0])
            close(ours["weights"][:size], routing[layer].weights[0])
            close(ours.logits[:chunks], routing[layer].logits[0])
        for y, layer in enumerate((1, 3)):
            selection = recorded[f"layers.{layer}.attention.selection"]
            ours = whole["attention"].isel(sample=sample, layer=y)
            np.testing.assert_array_equal(ours.blocks[:size], selection.blocks[0])
            close(ours.scores[:size], selection.scores[0])
            write, read = (recorded[f"layers.{layer}.workspace.{tap}"] for tap in ("write", "read"))
            ours = whole["workspace"].isel(sample=sample, layer=y)
            for position in range(size):
                close(ours.write_address[position], write.address[0, position // 8, :, position % 8])
            close(ours.write_gate[:chunks], write.gate[0])
            close(ours.read_address[:size], read.address[0])
            close(ours.read_gate[:size], read.gate[0, :, 0])
        lookup = recorded["layers.2.memory.lookup"]
        ours = whole["memory"].isel(sample=sample, layer=0)
        np.testing.assert_array_equal(ours.addresses[:size], lookup.addresses[0])
        close(ours["weights"][:size], lookup.weights[0])
        close(ours.gate[:size], lookup.gate[0, :, 0])
        for layer in range(4):
            state = recorded[f"layers.{layer}.ssm.state"]
            ours = whole["ssm"].isel(sample=sample, layer=layer)
            close(ours.norms[:chunks], state.norms[0])
            close(ours.decay[:size], state.decay[0])
            for p, path in enumerate(PATHS):
                share = float(whole["paths"].share[sample, layer, p])
                update = recorded.contributions.get(f"layers.{layer}.{path}")
                assert (
                    np.isnan(share)
                    if update is None
                    else share == pytest.approx(float(update.share.mean()), 1e-5)
                )
        losses = torch.nn.functional.cross_entropy(recorded.logits[0, :-1], ids[0, 1:], reduction="none")
        assert np.isnan(tokens.loss[sample, 0])
        np.testing.assert_allclose(tokens.loss[sample, 1:size], losses, rtol=1e-5)


def close(stored: Any, value: torch.Tensor) -> None:
    """Equal to the rounding of float16 (relative 2**-11, and the sums' own rounding)."""
    np.testing.assert_allclose(np.asarray(stored, dtype=np.float64), value.numpy(), rtol=1e-3, atol=1e-6)


def test_behind_a_samples_end(whole: Capture) -> None:
    sample = 7  # three tokens
    tokens = whole["tokens"].isel(sample=sample)
    assert tokens["mask"].values.tolist() == [True] * 3 + [False] * 17
    assert (tokens.token[3:] == 255).all() and np.isnan(tokens.loss[3:]).all()
    routing = whole["routing"].isel(sample=sample)
    assert (routing.experts[:, 1:] == 255).all() and np.isnan(routing["weights"][:, 3:]).all()
    assert (whole["attention"].blocks[sample, :, 3:] == -1).all()
    assert (whole["memory"].addresses[sample, :, 3:] == 255).all()
    assert (
        np.isnan(whole["ssm"].norms[sample, :, 1:]).all()
        and not np.isnan(whole["ssm"].norms[sample, :, 0]).any()
    )


@pytest.mark.parametrize("batch_size", [3, 50])
def test_the_batch_size_does_not_matter(
    once: Capture, model: Any, texts: Path, tmp_path: Path, batch_size: int
) -> None:
    """Decisions are equal to the bit. Floats may differ in the last bit or two, because the order of a sum inside a
    matrix product or a norm depends on the shape of the batch: 1e-5 relative in float32 (1.5e-7 was seen), one step
    of float16 (none was seen on most arrays)."""
    other = run(model, texts, tmp_path / "other.zarr", batch_size=batch_size)
    assert other.attributes == once.attributes
    theirs = arrays(other)
    for name, array in arrays(once).items():
        if name.startswith("summary."):
            continue  # counts of what is compared here, in bins whose edge a last bit may cross
        if array.dtype.kind in "iub":
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
        else:
            rtol = 1e-5 if array.dtype == np.float32 else 2.0**-10
            np.testing.assert_allclose(array, theirs[name], rtol=rtol, atol=1e-7, err_msg=name)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_killed_capture_is_resumed_to_the_same(
    once: Capture, model: Any, texts: Path, tmp_path: Path, after: int
) -> None:
    """Interrupted after each of several samples; commits are of 4. What is kept is a commit, arrays and summary."""
    out = tmp_path / "run.zarr"

    def kill(done: CaptureProgress) -> None:
        if done.samples >= after:
            raise Killed

    with pytest.raises(Killed):
        run(model, texts, out, batch_size=1, progress=kill)
    partial = open_capture(out)
    assert not partial.complete and partial.num_samples == after // 4 * 4
    assert partial["routing"].sizes["sample"] == partial.num_samples
    expected = arrays(once)
    for name, array in arrays(partial).items():
        if not name.startswith("summary."):
            np.testing.assert_array_equal(array, expected[name][: partial.num_samples], err_msg=name)
    assert_identical(run(model, texts, out, batch_size=1, resume=True), once)
    assert_identical(run(model, texts, out, batch_size=1, resume=True), once)  # nothing is left to do


def test_a_commit_cut_short_is_written_again(
    once: Capture, model: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the arrays of a commit and its counter: the arrays are longer than the capture."""
    out = tmp_path / "run.zarr"
    note = CaptureWriter._note

    def kill(writer: CaptureWriter) -> None:
        if writer.committed > 4:
            raise Killed
        note(writer)

    with monkeypatch.context() as patch:
        patch.setattr(CaptureWriter, "_note", kill)
        with pytest.raises(Killed):
            run(model, texts, out, batch_size=1)
    assert zarr.open_array(out / "tokens" / "token", mode="r").shape[0] == 8
    partial = open_capture(out)
    assert partial.num_samples == 4 and partial["tokens"].sizes["sample"] == 4
    assert_identical(run(model, texts, out, batch_size=1, resume=True), once)


def test_a_real_kill(once: Capture, texts: Path, tmp_path: Path) -> None:
    """The process dies of SIGKILL after its first commit."""
    code = f"""
import os, signal
from pathlib import Path
from tests.capture.shared import run
from tests.helpers import lively_model
kill = lambda done: done.samples > 4 and os.kill(os.getpid(), signal.SIGKILL)
run(lively_model(), Path({str(texts)!r}), Path({str(tmp_path / "run.zarr")!r}), batch_size=1, progress=kill)
"""
    died = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert died.returncode == -9, died.stderr
    partial = open_capture(tmp_path / "run.zarr")
    assert partial.num_samples == 4 and not partial.complete
    resumed = run(lively_model(), texts, tmp_path / "run.zarr", batch_size=1, resume=True)
    assert_identical(resumed, once)


def test_signals_are_chosen(model: Any, texts: Path, tmp_path: Path) -> None:
    capture = run(model, texts, tmp_path / "run.zarr", signals=("memory", "routing"), limit_tokens=30)
    assert tuple(capture) == ("tokens", "routing", "memory")
    assert capture.num_tokens == 30 and capture["tokens"].length.values.tolist() == [20, 10]
    with pytest.raises(KeyError, match="has no group 'ssm'; it has tokens, routing, memory"):
        capture["ssm"]
    without = lively_model(moe_layers=[])
    assert tuple(run(without, texts, tmp_path / "without.zarr"))[1] == "attention"
    with pytest.raises(ValueError, match="this model has no moe path, so there is no signal 'routing'"):
        run(without, texts, tmp_path / "more.zarr", signals=("routing",))


def test_the_summary_is_that_of_the_commits_in_order(once: Capture) -> None:
    rows = {
        (group, str(name)): array.values for group in once for name, array in once[group].data_vars.items()
    }
    parts = [
        summarize(
            {key: array[first : first + COMMIT] for key, array in rows.items()},
            config=once.attributes["config"],
            domains=once.attributes["domains"],
            first_sample=first,
        )
        for first in range(0, once.num_samples, COMMIT)
    ]
    expected = merge(merge(parts[0], parts[1]), parts[2])
    summary = once.summary
    assert summary.keys() == expected.keys() == set(once.groups)
    for group, inner in expected.items():
        assert summary[group].keys() == inner.keys()
        for name, array in inner.items():
            np.testing.assert_array_equal(summary[group][name], array, err_msg=f"{group}.{name}")
    lengths = summary["tokens"]["length"].sum(axis=0)
    assert lengths.sum() == once.num_samples and lengths @ np.arange(LENGTH + 1) == once.num_tokens


def test_a_summary_alone(once: Capture, model: Any, texts: Path, tmp_path: Path) -> None:
    """The same summary without any raw array but the tokens; and raw arrays without a summary."""
    alone = run(model, texts, tmp_path / "alone.zarr", signals=("summary",), batch_size=1)
    assert tuple(alone) == ("tokens",) and alone.attributes["signals"] == ["summary"]
    for group, inner in once.summary.items():
        for name, array in inner.items():
            np.testing.assert_array_equal(alone.summary[group][name], array, err_msg=f"{group}.{name}")
    without = run(model, texts, tmp_path / "without.zarr", signals=("routing",))
    with pytest.raises(ValueError, match="keeps no summary: it was captured without the signal 'summary'"):
        _ = without.summary


def test_interventions_are_made_and_noted(model: Any, texts: Path, tmp_path: Path) -> None:
    """Given by name, or in force already: the same capture, which says what was done."""
    text = "moe[0].force(expert=3); memory[2].cut()"
    named = run(model, texts, tmp_path / "named.zarr", interventions=[text], limit_tokens=40)
    with intervened(model, text):
        in_force = run(model, texts, tmp_path / "in_force.zarr", limit_tokens=40)
    assert_identical(named, in_force)
    assert (named["routing"].experts.values[:, 0, :3] == 3).all()
    assert np.abs(named["paths"].share.sel(path="memory").values[:, 2]).max() == 0
    assert tuple(map(from_dict, named.attributes["interventions"])) == tuple(parse(text))
    with pytest.raises(ValueError, match="made with another interventions"):
        run(model, texts, tmp_path / "named.zarr", limit_tokens=40, resume=True)


def test_a_full_disk(once: Capture, model: Any, texts: Path, tmp_path: Path) -> None:
    """No file may grow any more after the second commit: one line says so, and what is committed is kept."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: CaptureProgress) -> None:
        if done.samples > 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    out = tmp_path / "run.zarr"
    try:
        with pytest.raises(OSError, match="cannot grow: file too large; its 8 committed samples are kept"):
            run(model, texts, out, batch_size=1, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_capture(out).num_samples == 8
    assert_identical(run(model, texts, out, batch_size=1, resume=True), once)


def test_a_line_that_cannot_be_read_any_more(once: Capture, model: Any, tmp_path: Path) -> None:
    """A file is damaged while it is captured. Before a capture begins, `inspect` finds such a line."""
    (tmp_path / "texts").mkdir()
    texts = write_texts(tmp_path / "texts")
    good = (texts / "mixed.jsonl").read_text()
    bad = good.replace('"ddd"', '"ddd')

    def damage(_done: CaptureProgress) -> None:
        (texts / "mixed.jsonl").write_text(bad)

    out = tmp_path / "run.zarr"
    with pytest.raises(
        ValueError, match=r"mixed\.jsonl:4: not JSON .* put it back as it was, and resume"
    ) as error:
        run(model, texts, out, batch_size=1, progress=damage)
    assert "\n" not in str(error.value)
    assert open_capture(out).num_samples == 8
    with pytest.raises(ValueError, match=r"mixed\.jsonl:4: not JSON"):
        run(model, texts, out, batch_size=1, resume=True)
    assert open_capture(out).num_samples == 8
    (texts / "mixed.jsonl").write_text(good)
    resumed = arrays(run(model, texts, out, batch_size=1, resume=True))
    for name, array in arrays(once).items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def test_progress_is_told(
    model: Any, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[CaptureProgress] = []
    run(model, texts, tmp_path / "run.zarr", batch_size=3, progress=told.append)
    total = sum((texts / name).stat().st_size for name in ("prose.txt", "mixed.jsonl"))
    assert [done.samples for done in told] == [3, 4, 7, 8, 11, 12]  # batches are cut within commits of 4
    assert told[-1].tokens == 150 and told[-1].bytes_read == told[-1].bytes_total == total
    run(model, texts, tmp_path / "bar.zarr", progress=True)
    assert "150 tokens" in capsys.readouterr().err


def test_what_is_refused(model: Any, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    run(model, texts, out, signals=(), limit_tokens=5)
    with pytest.raises(ValueError, match="exists already; resume it"):
        run(model, texts, out)
    with pytest.raises(ValueError, match="cannot be resumed: it was made with another signals, limit_tokens"):
        run(model, texts, out, resume=True, signals=("ssm",))
    with pytest.raises(ValueError, match="made with another weights_sha256"):
        run(lively_model(seed=1), texts, out, resume=True, signals=(), limit_tokens=5)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"limit_tokens": 0}, "limit_tokens must be at least 1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"workers": 2, "scheduler": "tcp://x:1"}, "give one of them"),
        ({"signals": ("experts",)}, "signal 'experts' is not one of routing, attention"),
        ({"interventions": ["moe[1].ablate(expert=0)"]}, "block 1 has no moe path"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            run(model, texts, tmp_path / "more.zarr", **options)
    assert not (tmp_path / "more.zarr").exists()


def test_what_is_no_capture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_capture(tmp_path / "missing.zarr")
    with pytest.raises(ValueError, match="is not a capture"):
        open_capture(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(ValueError, match="is not a capture"):
        open_capture(tmp_path / "other.zarr")
    zarr.create_group(
        tmp_path / "newer.zarr", attributes={"format": "hydra-lab-capture", "format_version": 99}
    )
    with pytest.raises(ValueError, match="has format version 99; this program reads 1 and 2"):
        open_capture(tmp_path / "newer.zarr")
