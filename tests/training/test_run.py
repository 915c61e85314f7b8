"""Whole runs of the nano preset."""

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hydra_lab.data import DOMAINS
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import PATHS
from hydra_lab.training import train
from hydra_lab.training.__main__ import main
from hydra_lab.training.checkpoint import checkpoints
from hydra_lab.training.evaluate import load_checkpoint
from hydra_lab.training.presets import training_preset
from hydra_lab.training.trainer import HydraTrainer


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("whole")
    result = train("nano", out, corpus=corpus)
    assert (result.step, result.finished, result.model) == (12, True, out / "model")
    return out


def test_training_learns(whole: Path) -> None:
    losses = [row["language_loss"] for row in logged(whole)]
    assert losses[-1] < losses[0] - 0.1


def test_log_says_what_happened(whole: Path) -> None:
    rows = logged(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    last = rows[-1]
    assert last["tokens"] == 12 * 4 * 64
    assert {f"scale_{path}" for path in PATHS} <= set(last)
    assert {"gate_0_ssm", "gate_1_attention", "gate_0_moe", "gate_1_workspace", "gate_2_memory"} <= set(last)
    assert {"loss", "learning_rate", "load_balance_loss", "tokens_per_second", "grad_norm"} <= set(last)
    assert sum(last[f"load_0_{expert}"] for expert in range(4)) == pytest.approx(1.0, abs=1e-5)
    assert 0 < last["memory_use_2"] <= 1 and 0 < last["memory_gate_2"] < 1 and last["state_norm_0"] > 0
    by_domain = {key.removeprefix("loss_") for row in rows for key in row if key.startswith("loss_")}
    assert by_domain <= set(DOMAINS)
    assert "facts" in by_domain
    before_memory = [row for row in rows if row["scale_memory"] == 0]
    assert before_memory
    assert not any("loss_facts" in row for row in before_memory)
    assert rows[0]["scale_attention"] == 0
    assert last["scale_attention"] == last["scale_memory"] == 1


def test_tensorboard_events_are_written(whole: Path) -> None:
    assert list(whole.glob("runs/*/events.out.tfevents.*"))


def test_no_file_is_a_pickle(whole: Path) -> None:
    files = [path for path in whole.rglob("*") if path.is_file() and "tfevents" not in path.name]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}


def test_at_most_two_checkpoints_stay(whole: Path) -> None:
    assert [path.name for path in checkpoints(whole)] == ["checkpoint-6", "checkpoint-12"]
    assert not list(whole.glob("incomplete-*"))


def test_the_exported_model_is_bf16_and_loads_anywhere(whole: Path) -> None:
    weights = load_file(whole / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    assert isinstance(model, HydraForCausalLM)
    assert model.config.use_cache
    run = json.loads((whole / "model" / "training.json").read_text())
    assert (run["preset"], run["seed"], run["steps"], run["tokens"]) == ("nano", 0, 12, 12 * 4 * 64)
    assert run["command"] == "hydra-lab train --preset nano --seed 0 --max-steps 12"
    assert logged(whole / "model") == logged(whole)


def start(corpus: Path, out: Path, *options: str, before: str = "") -> "subprocess.Popen[bytes]":
    """A training process of its own; `before` is Python that runs in it first."""
    code = f"{before}\nimport sys\nfrom hydra_lab.training.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, "--preset", "nano", "--corpus", str(corpus), "--out", str(out)]
    return subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)


KILLED_AFTER_STEP_8 = """
import os, signal
from hydra_lab.training.log import LogWriter
write = LogWriter.on_log
def on_log(self, args, state, control, **kwargs):
    write(self, args, state, control, **kwargs)
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
LogWriter.on_log = on_log
"""


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name}"
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_a_killed_run_resumes_at_the_same_loss(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(corpus, tmp_path, before=KILLED_AFTER_STEP_8).wait() == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6"]
    assert [row["step"] for row in logged(tmp_path)] == list(range(1, 9))

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was loaded")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    assert train("nano", tmp_path, corpus=corpus, resume=True).finished
    expected, found = logged(whole), logged(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 13))
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["learning_rate"] == one["learning_rate"]
        assert {k: v for k, v in other.items() if k.startswith("scale_")} == {
            k: v for k, v in one.items() if k.startswith("scale_")
        }
    first = load_file(whole / "checkpoint-12" / "model.safetensors")
    second = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-5


def test_a_signal_saves_and_fewer_steps_end_the_run_with_a_decay(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path, "--max-steps", "5000")
    wait_for(tmp_path / "checkpoint-6", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    [*_, last] = checkpoints(tmp_path)
    stopped = int(last.name.removeprefix("checkpoint-"))
    assert not (tmp_path / "model").exists()

    result = train("nano", tmp_path, corpus=corpus, resume=True, max_steps=stopped + 4)
    assert (result.step, result.finished) == (stopped + 4, True)
    rates = [row["learning_rate"] for row in logged(tmp_path)][stopped:]
    assert rates[0] == pytest.approx(3e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.3 * rates[0]
    plan = json.loads((result.model / "training.json").read_text())["plan"]  # type: ignore[operator]
    assert plan["begins"]["memory"] == 2500


def test_a_run_from_given_weights_has_every_path_on(corpus: Path, whole: Path, tmp_path: Path) -> None:
    result = train("nano", tmp_path, corpus=corpus, init_from=whole / "model", max_steps=3, tensorboard=False)
    assert result.model is not None
    made = json.loads((result.model / "training.json").read_text())
    assert made["command"] == "hydra-lab train --preset nano --seed 0 --max-steps 3 --init-from nano/model"
    (earlier,) = made["earlier"]
    assert earlier["command"] == "hydra-lab train --preset nano --seed 0 --max-steps 12"
    assert (result.model / "training_log.nano.jsonl").read_text() == (
        whole / "training_log.jsonl"
    ).read_text()
    rows = logged(tmp_path)
    assert all(row[f"scale_{path}"] == 1 for row in rows for path in PATHS)
    assert rows[0]["language_loss"] < logged(whole)[0]["language_loss"] - 0.1
    assert train("nano", tmp_path, corpus=corpus, resume=True, max_steps=4, tensorboard=False).step == 4


def test_scales_of_a_checkpoint_are_folded_into_the_gates(corpus: Path, tmp_path: Path) -> None:
    config = training_preset("nano")
    config = config.replace(
        max_steps=8, save_every=4, curriculum=dataclasses.replace(config.curriculum, ramp=1.0, max_hold=0.0)
    )
    train("nano", tmp_path, corpus=corpus, config=config, tensorboard=False)
    state = json.loads((tmp_path / "checkpoint-8" / "curriculum.json").read_text())
    assert 0 < state["scales"]["attention"] < 1
    raw = HydraForCausalLM.from_pretrained(tmp_path / "checkpoint-8", dtype=torch.float32).eval()
    for path, scale in state["scales"].items():
        raw.set_path_scale(path, scale)
    folded, _ = load_checkpoint(tmp_path / "checkpoint-8")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(folded(tokens).logits, raw(tokens).logits, atol=1e-5, rtol=1e-5)
        shipped = HydraForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        # bfloat16 weights: relative error 2^-9 each.
        torch.testing.assert_close(shipped(tokens).logits, raw(tokens).logits, atol=0.05, rtol=0.05)


def test_bf16_trains_on_the_cpu(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = HydraTrainer.compute_loss

    def spy(
        self: HydraTrainer, model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: Any
    ) -> Any:
        projection = self.hydra.get_submodule("model.layers.0.ssm.in_proj")
        handle = projection.register_forward_hook(
            lambda _m, _i, out: seen.append(out.dtype == torch.bfloat16)
        )
        loss = original(self, model, inputs, **kwargs)
        handle.remove()
        return loss

    monkeypatch.setattr(HydraTrainer, "compute_loss", spy)
    config = training_preset("nano").replace(bf16=True)
    train("nano", tmp_path, corpus=corpus, config=config, max_steps=6, tensorboard=False)
    assert seen
    assert all(seen)
    weights = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    rows = logged(tmp_path)
    assert rows[-1]["language_loss"] < rows[0]["language_loss"]


def test_accumulation_changes_nothing_but_memory(corpus: Path, tmp_path: Path) -> None:
    # Rows differ in how many tokens are supervised, and the loss of a part is a mean: the same to a few percent.
    for name, parts in (("one", 1), ("two", 2)):
        config = training_preset("nano").replace(accumulation=parts)
        train("nano", tmp_path / name, corpus=corpus, config=config, max_steps=4, tensorboard=False)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=0.02)
        assert second["language_loss"] == pytest.approx(first["language_loss"], rel=0.02)


def test_misuse_is_refused(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="already holds checkpoint-12"):
        train("nano", whole, corpus=corpus)
    with pytest.raises(ValueError, match="nothing to resume"):
        train("nano", tmp_path, corpus=corpus, resume=True)
    with pytest.raises(ValueError, match="seed 0, 4 rows per step"):
        train("nano", whole, corpus=corpus, resume=True, seed=1)
    with pytest.raises(ValueError, match="exclude each other"):
        train("nano", whole, corpus=corpus, resume=True, init_from=whole / "model")
    with pytest.raises(ValueError, match="device 'tpu'"):
        train("nano", tmp_path, corpus=corpus, device="tpu")
    with pytest.raises(SystemExit) as ended:
        main(["--preset", "nano", "--corpus", str(corpus), "--out", str(whole)])
    assert ended.value.code == 2
    assert "already holds" in capsys.readouterr().err
