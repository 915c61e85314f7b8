"""The benches run end to end on small sizes, and what they write can be read, recorded and drawn."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hydra_lab.bench import BenchResult
from hydra_lab.bench.agreement import Agreement, agreements
from hydra_lab.bench.capture import IDLE, PLAIN, RECORDED, TRACED, CapturePlan, measure_capture
from hydra_lab.bench.contests import Contest, Contestant
from hydra_lab.bench.kernels import FORWARD, TRAINING, KernelsPlan, measure_kernels, record_measured
from hydra_lab.bench.peers import num_parameters, peer_configs
from hydra_lab.bench.plots import plot_result
from hydra_lab.bench.throughput import ThroughputPlan, measure_throughput
from hydra_lab.ops import backend as backends
from hydra_lab.ops.backend import PACKAGES

CPU = torch.device("cpu")
KEPT = sorted((Path(backends.__file__).parents[1] / "bench" / "results").glob("*.json"))


def silent(_what: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def kernels() -> BenchResult:
    plan = KernelsPlan(
        preset="nano",
        length=64,
        attention_lengths=(96,),
        path_lengths=(64,),
        rounds=2,
        least_seconds=0.0,
        device=CPU,
        dtype=torch.float32,
    )
    return measure_kernels(plan, silent)


def test_peers_have_as_many_parameters_as_hydra() -> None:
    configs, missing = peer_configs("29m", CPU)
    counts = {name: num_parameters(config) for name, config in configs.items()}
    assert set(counts) == {"hydra", "transformer", "mamba2"}
    assert all(abs(count / counts["hydra"] - 1) <= 0.02 for count in counts.values())
    assert set(missing) == {"hybrid", "mamba_ssm"}
    model = AutoModelForCausalLM.from_config(configs["mamba2"])
    assert sum(p.numel() for p in model.parameters()) == counts["mamba2"]
    with pytest.raises(ValueError, match=r"preset 'demo' has no peers: choose 29m, 1.6b"):
        peer_configs("demo", CPU)


def test_kernels_measures_every_operation_in_both_directions(kernels: BenchResult) -> None:
    seen = {(row["operation"], row["direction"], row["contestant"]) for row in kernels.rows}
    for operation in PACKAGES:
        for direction in (FORWARD,) if operation == "select_blocks" else (FORWARD, TRAINING):
            assert {(operation, direction, "torch"), (operation, direction, "reference")} <= seen
    peers = {
        "causal_conv": "torch conv1d",
        "sparse_attention": "dense SDPA",
        "chunk_moe": "dense GEMM",
        "memory_read": "F.embedding_bag",
        "ssm path": "transformers Mamba2",
    }
    for operation, peer in peers.items():
        assert {(operation, FORWARD, peer), (operation, TRAINING, peer)} <= seen
    assert ("chunk_moe", FORWARD, "grouped_mm") in seen
    assert kernels.skipped["triton of ssd at 64"].startswith("it needs a CUDA device")
    assert all(row["ms"] > 0 and row["of_matmul"] > 0 for row in kernels.rows)


def test_kernels_says_how_near_each_backend_comes_to_its_reference(kernels: BenchResult) -> None:
    found = {(each["operation"], each["backend"]): each for each in kernels.findings["agreement"]}
    assert {operation for operation, _ in found} == {*PACKAGES, "memory_read"}
    for (operation, _), each in found.items():
        assert each["output"] <= 1e-5
        assert (each["gradient"] is None) == (operation == "select_blocks")
        assert (each["gradient"] or 0.0) <= 1e-5


def test_a_backend_that_is_wrong_does_not_agree() -> None:
    def contestant(gain: float) -> Contestant:
        x = torch.arange(1.0, 5.0).requires_grad_()
        return Contestant(lambda: torch.cat([gain * x, torch.tensor([-torch.inf])]), (x,))

    contest = Contest(
        "ssd", 4, 0, 0, {"reference": contestant(1), "torch": contestant(1.5), "a peer": contestant(9)}
    )
    (found,) = agreements(contest)
    assert found == Agreement("ssd", "torch", 0.5, 0.5)


def test_a_measurement_is_recorded_for_auto(
    kernels: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "measured.json"
    monkeypatch.setattr("hydra_lab.bench.kernels.MEASURED", path)
    path.write_text(json.dumps({"another device": {"milliseconds": {}}}))
    record_measured(kernels)
    written = json.loads(path.read_text())
    assert set(written) == {"another device", "cpu"}
    assert set(written["cpu"]["milliseconds"]) == set(PACKAGES)
    with pytest.raises(ValueError, match="not one of bench capture"):
        record_measured(BenchResult("capture", {}, {}, []))


def test_throughput_measures_prefill_and_decode() -> None:
    plan = ThroughputPlan(
        preset="29m",
        contexts=(32, 64),
        rounds=2,
        decode_steps=2,
        longest_seconds=100.0,
        training_context=16,
        device=CPU,
        dtype=torch.float32,
    )
    result = measure_throughput(plan, silent)
    seen = {(row["phase"], row["model"], row["context"]) for row in result.rows}
    models = ("hydra", "transformer", "mamba2")
    assert seen == {(phase, m, c) for phase in ("prefill", "decode") for m in models for c in (32, 64)}
    assert set(result.findings["crossover"]) == {"transformer", "mamba2"}
    assert result.findings["training"]["model_flops_utilisation"] > 0
    for found in result.findings["time"]:
        parts = [seconds for part, seconds in found["seconds"].items() if part != "total"]
        assert all(seconds > 0 for seconds in parts)
    assert len(list(plot_result(result, "dark").select_traces())) == 9
    with pytest.raises(ValueError, match="contexts must ascend"):
        measure_throughput(ThroughputPlan(**{**plan.__dict__, "contexts": (64, 32)}), silent)


def test_a_model_that_would_take_too_long_is_left_out_and_named() -> None:
    plan = ThroughputPlan(
        preset="29m",
        contexts=(16, 4096),
        rounds=1,
        decode_steps=1,
        longest_seconds=1e-3,
        training_context=None,
        device=CPU,
        dtype=torch.float32,
    )
    result = measure_throughput(plan, silent)
    assert {row["context"] for row in result.rows} == {16}
    assert "a prefill would take about" in result.skipped["transformer at 4096"]


def test_capture_measures_what_looking_costs() -> None:
    plan = CapturePlan(hidden_size=64, length=64, rounds=2, device=CPU, dtype=torch.float32)
    result = measure_capture(plan, silent)
    of_model = {row["contestant"] for row in result.rows if row["subject"] == "model"}
    assert of_model == {PLAIN, IDLE, RECORDED, TRACED}
    emissions = {row["subject"] for row in result.rows} - {"model"}
    assert emissions == {"ssd state norms, torch", "sparse_attention mass by kind, torch"}
    assert [goal.goal for goal in result.goals] == ["at most 1% more", "at most 10% more"]


def test_a_result_survives_a_file_and_can_be_drawn(kernels: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.json"
    kernels.save(path)
    again = BenchResult.read(path)
    assert again.to_dict() == json.loads(json.dumps(kernels.to_dict()))
    assert len(list(plot_result(again).select_traces())) > 3
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a bench result"):
        BenchResult.read(path)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_say_how_they_were_made(path: Path) -> None:
    result = BenchResult.read(path)
    environment = result.environment
    assert environment["commit"] and environment["hardware"]["cpu"] and environment["versions"]["torch"]
    assert {"dtype", "seed", "rounds"} <= set(result.settings)
    assert result.rows
    plot_result(result)
