"""The command line: one line and exit code 2 for bad input, JSON for programs, help with an example."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hydra_lab import HydraConfig, HydraForCausalLM, load, open_capture
from hydra_lab.cli import app, lab
from hydra_lab.cli.rules import explain

COMMANDS = ("info", "accounting", "generate", "train", "capture", "probe", "dashboard", "notebook")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def answer(*arguments: str) -> Any:
    """What a command that must succeed prints as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of an untrained nano model whose tokens are bytes."""
    directory = tmp_path_factory.mktemp("nano")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    config = HydraConfig.from_preset("nano", vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=None)
    HydraForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "notes.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 20, encoding="utf-8")
    return str(path)


def test_help_lists_every_command_and_each_shows_an_example() -> None:
    listing = run("--help").stdout
    for command in COMMANDS:
        assert command in listing
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert f"Example: hydra-lab {command}" in shown.stdout


def test_json_is_offered_where_a_program_may_read() -> None:
    for command in ("info", "accounting", "generate", "train", "capture"):
        assert "--json" in run(command, "--help").stdout


BAD_INPUT: list[tuple[list[str], str]] = [
    (["nosuch"], "No such command"),
    (["generate"], "Missing argument"),
    (["generate", "nosuch", "text"], "no model 'nosuch'"),
    (["generate", "NANO", ""], "the prompt is empty"),
    (["generate", "NANO", "text", "--top-k", "3"], "--temperature"),
    (["generate", "NANO", "text", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["generate", "NANO", "text", "--intervene", "moe[0].fly()"], "moe has no action 'fly'"),
    (
        ["generate", "NANO", "text", "--intervene", "moe[9].cut()"],
        "block 9 has no moe path; blocks [0, 2] have one",
    ),
    (["generate", "NANO", "text", "--intervene-file", "nosuch.json"], "nosuch.json"),
    (["generate", "NANO", "text", "--intervene-file", "TEXT"], "is not a JSON list of interventions"),
    (
        ["capture", "NANO", "TEXT", "--out", "OUT", "--workers", "2", "--scheduler", "tcp://nowhere:1"],
        "give one of them",
    ),
    (
        ["capture", "NANO", "TEXT", "--out", "OUT", "--intervene", "ssm[0].scale_decay(head=9, factor=2)"],
        "head 9",
    ),
    (["accounting"], "either a model or --preset"),
    (["accounting", "--preset", "huge"], "'huge'"),
    (["accounting", "--preset", "nano", "--context", "0"], "0"),
    (["info", "nosuch"], "no model 'nosuch'"),
    (["info", "NANO", "--record"], "--record"),
    (["info", "NANO", "--text", "nosuch.txt"], "nosuch.txt"),
    (["train"], "--out"),
    (["train", "--out", "OUT", "--preset", "huge"], "'huge'"),
    (["train", "--out", "OUT", "--device", "tpu"], "'tpu'"),
    (["capture", "NANO", "nosuch.txt", "--out", "OUT"], "nosuch.txt"),
    (["capture", "NANO", "TEXT", "--out", "TEXT"], "exists already"),
    (["capture", "NANO", "LATIN1", "--out", "OUT"], "not UTF-8"),
    (["capture", "NANO", "EMPTY", "--out", "OUT"], "no text"),
    (["probe", "nosuch", "NANO", "--out", "OUT"], "no study 'nosuch'"),
    (["dashboard", "nosuch"], "neither a model nor a capture"),
    (["dashboard", "--port", "99999999"], "--port"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=[" ".join(given) for given, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, nano: str, text: str, tmp_path: Path
) -> None:
    latin1, empty = tmp_path / "latin1.txt", tmp_path / "empty.txt"
    latin1.write_bytes(b"caf\xe9\n")
    empty.touch()
    places = {
        "NANO": nano,
        "TEXT": text,
        "LATIN1": str(latin1),
        "EMPTY": str(empty),
        "OUT": str(tmp_path / "out"),
    }
    result = run(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("hydra-lab: ")
    assert words in line


def test_debug_shows_the_traceback_too() -> None:
    result = run("info", "nosuch", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("hydra-lab: no model 'nosuch'")


def test_a_defect_of_ours_is_exit_code_1() -> None:
    line, code = explain(RuntimeError("shapes\n do not match"))
    assert code == 1
    assert line == "internal error, RuntimeError: shapes do not match (--debug shows where)"


def test_a_missing_library_is_named_with_its_extra() -> None:
    line, code = explain(ModuleNotFoundError("No module named 'zarr.api'", name="zarr.api"))
    assert code == 2
    assert line == "this needs zarr.api: pip install 'hydra-lab[lab]'"


def test_accounting_speaks_json_for_every_preset() -> None:
    for preset in ("nano", "demo", "29m", "1.6b"):
        told = answer("accounting", "--preset", preset, "--context", "64", "--context", "4096")
        parameters = told["parameters"]
        assert parameters["total"] == sum(part["total"] for part in parameters["by_component"].values())
        assert [table["context_length"] for table in told["flops_per_token"]] == [64, 4096]
    assert abs(told["parameters"]["total"] / 1.6e9 - 1) < 0.02


def test_accounting_of_a_model_is_that_of_its_configuration(nano: str) -> None:
    model = HydraForCausalLM.from_pretrained(nano)
    assert answer("accounting", nano)["parameters"]["total"] == model.num_parameters()
    shown = run("accounting", nano)
    assert shown.exit_code == 0
    assert f"{model.num_parameters():,}" in shown.stdout


def test_generate_continues_the_prompt(nano: str) -> None:
    told = answer("generate", nano, "The fox", "--max-new-tokens", "5")
    assert len(told["tokens"]) == 5
    shown = run("generate", nano, "The fox", "--max-new-tokens", "5")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("The fox")


def test_sampling_repeats_with_its_seed(nano: str) -> None:
    arguments = ("generate", nano, "The fox", "--max-new-tokens", "8", "--temperature", "2", "--seed")
    first, again, other = (answer(*arguments, seed)["tokens"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_generate_runs_a_changed_model(nano: str, tmp_path: Path) -> None:
    file = tmp_path / "changes.json"
    file.write_text('["ssm[1].cut()"]')
    told = answer(
        "generate", nano, "The fox", "--max-new-tokens", "5", "--intervene-file", str(file),
        "--intervene", "ssm[0].cut(); ssm[2].scale(factor=-1)", "--intervene", "ssm[3].scale(factor=0.5)",
    )  # fmt: skip
    assert told["interventions"] == [
        "ssm[1].cut()", "ssm[0].cut()", "ssm[2].scale(factor=-1.0)", "ssm[3].scale(factor=0.5)",
    ]  # fmt: skip
    model, tokenizer = load(nano)
    with torch.no_grad():
        for index, factor in enumerate((0.0, 0.0, -1.0, 0.5)):
            model.model.blocks[index].gates["ssm"] *= factor
    changed: Any = model
    ids = tokenizer("The fox", return_tensors="pt")["input_ids"]
    expected = changed.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert told["tokens"] == expected.tolist()
    assert told["tokens"] != answer("generate", nano, "The fox", "--max-new-tokens", "5")["tokens"]


def test_info_measures_path_use_and_keeps_it(nano: str, text: str) -> None:
    assert answer("info", nano)["path_use"] is None
    measured = answer("info", nano, "--text", text, "--samples", "2", "--record")["path_use"]
    kept = answer("info", nano)["path_use"]
    assert kept == measured
    assert kept["paths"] == ["ssm", "attention", "moe", "workspace", "memory"]
    shown = run("info", nano)
    assert shown.exit_code == 0, shown.stderr
    assert "Loss added when a path is cut" in shown.stdout


def test_capture_writes_what_open_capture_reads(nano: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    told = answer("capture", nano, text, "--out", str(out), "--sequence-length", "128")
    capture = open_capture(out)
    assert told["tokens"] == int(capture["tokens"]["mask"].sum()) == Path(text).stat().st_size
    assert told["groups"] == list(capture.groups)
    resumed = answer("capture", nano, text, "--out", str(out), "--sequence-length", "128", "--resume")
    assert resumed == told


def test_capture_keeps_a_summary_alone(nano: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    told = answer("capture", nano, text, "--out", str(out), "--signals", "summary")
    assert told["groups"] == ["tokens"]
    assert int(open_capture(out).summary["routing"]["first"].sum()) > 0


def test_capture_records_a_changed_model(nano: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    answer("capture", nano, text, "--out", str(out), "--intervene", "moe[*].force(expert=3)")
    routing = open_capture(out)["routing"].experts.values
    assert set(routing[routing < 4].tolist()) == {3}  # what lies past a sample's end holds no expert


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that would have replaced this process."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(lab, "become", lambda *words: commands.append(words))
    monkeypatch.setenv("JUPYTER_PATH", os.environ.get("JUPYTER_PATH", ""))  # put back what the command sets
    return commands


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dashboard", "--port", "8600", "--no-browser"], ["streamlit", "127.0.0.1", "8600"]),
        (["notebook", "--no-browser"], ["jupyterlab", "127.0.0.1", "--no-browser"]),
    ],
)
def test_servers_listen_on_this_machine_only(
    arguments: list[str], expected: list[str], started: list[tuple[str, ...]]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    (words,) = started
    joined = " ".join(words)
    assert all(word in joined for word in expected)
    assert any(Path(word).is_file() for word in words), "the file to serve is not there"


@pytest.mark.parametrize("lesson", [[], ["0"], ["00"], ["00_tour"], ["tour"], ["00_tour.ipynb"]])
def test_a_lesson_is_found_by_number_or_name(lesson: list[str], started: list[tuple[str, ...]]) -> None:
    result = run("notebook", *lesson, "--no-browser")
    assert result.exit_code == 0, result.stderr
    ((_, opened, *_),) = started
    assert Path(opened).is_file() and Path(opened).name == "00_tour.ipynb"


@pytest.mark.parametrize("lesson", ["99", "nonsense", ""])
def test_an_unknown_lesson_lists_those_there_are(lesson: str, started: list[tuple[str, ...]]) -> None:
    result = run("notebook", lesson)
    assert result.exit_code == 2
    assert f"no lesson {lesson!r}" in result.stderr and "00_tour" in result.stderr
    assert started == []


def test_a_notebook_runs_on_the_interpreter_that_opened_it(
    started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from jupyter_client.manager import KernelManager

    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    other = {"argv": ["/elsewhere/python", "{connection_file}"], "display_name": "x", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert KernelManager().format_kernel_cmd()[0] == "/elsewhere/python"
    assert run("notebook").exit_code == 0
    assert KernelManager().format_kernel_cmd()[0] == sys.executable


def test_the_installed_program_answers() -> None:
    program = Path(sys.executable).with_name("hydra-lab")
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "hydra-lab 0.1.0\n"), done.stderr
