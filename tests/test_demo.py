"""The model that ships: what its card claims holds for the weights that lie beside it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hydra_lab
from hydra_lab.capture.path_use import measure_path_use
from hydra_lab.data import NATURAL_DOMAINS
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.loading import model_directory
from hydra_lab.path_use import IDLE_LOSS, IDLE_SHARE, PATH_USE_FILE, read_path_use
from hydra_lab.taps import PATHS
from hydra_lab.training.evaluate import answer_scores

DEMO = model_directory("demo")
QUESTIONS = Path(__file__).with_name("demo_questions.jsonl")
"""80 of the evaluation's questions of each kind: closed-book facts, recall of 8 pairs, chains of 2 steps."""


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return hydra_lab.load("demo")


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return json.loads((DEMO / "evaluation.json").read_text())


def test_weights_are_small_bf16_shards_without_pickles() -> None:
    shards = sorted(DEMO.glob("*.safetensors"))
    assert shards
    assert all(shard.stat().st_size <= 15e6 for shard in shards)
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 25e6
    assert not [file for file in DEMO.rglob("*") if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}


@pytest.mark.parametrize("task", ["facts", "recall", "chains"])
def test_answers_are_as_good_as_the_card_says(
    demo: tuple[Any, Any], evaluation: dict[str, Any], task: str
) -> None:
    model, tokenizer = demo
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    (measured,) = answer_scores(model, tokenizer, [row for row in rows if row["task"] == task], task=task)
    (claimed,) = [
        entry for entry in evaluation["answers"] if (entry["task"], entry["group"]) == (task, measured.group)
    ]
    p = claimed["accuracy"]
    # four binomial standard errors of the smaller sample, and never less than one question
    allowed = max(4 * math.sqrt(p * (1 - p) / measured.num_questions), 1 / measured.num_questions)
    assert measured.accuracy == pytest.approx(p, abs=allowed)


@pytest.mark.parametrize(
    ("task", "group", "least"),
    [
        ("facts", "form=closed", 0.5),
        ("recall", "pairs=8, form=as trained", 0.9),
        ("chains", "steps=2, form=worked", 0.9),
    ],
)
def test_questions_are_answered(evaluation: dict[str, Any], task: str, group: str, least: float) -> None:
    (found,) = [e for e in evaluation["answers"] if (e["task"], e["group"]) == (task, group)]
    assert found["accuracy"] >= least


@pytest.mark.parametrize("domain", NATURAL_DOMAINS)
def test_held_out_text_costs_less_than_under_the_5_gram_model(
    evaluation: dict[str, Any], domain: str
) -> None:
    baseline = json.loads((DEMO / "ngram.json").read_text())
    assert baseline["order"] == 5
    (found,) = [row for row in evaluation["domains"] if row["domain"] == domain]
    assert found["bits_per_byte"] < baseline["bits_per_byte"][domain]


def test_the_memory_opens_wider_without_the_book(evaluation: dict[str, Any]) -> None:
    mean = {gate["form"]: gate["mean"] for gate in evaluation["gates"]}
    assert mean["closed"] > mean["open"]


def test_every_path_is_alive() -> None:
    use = read_path_use(DEMO)
    assert set(use.paths) == set(PATHS)
    for path in use.paths:
        assert use.cost_of(path)[0] >= IDLE_LOSS, path
        for layer in use.layers_with(path):
            assert use.share_of(path, layer) >= IDLE_SHARE, (path, layer)


def test_path_use_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hydra-lab info .* --record"):
        read_path_use(tmp_path)
    (tmp_path / PATH_USE_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"path_use\.json is no path use: path use lacks"):
        read_path_use(tmp_path)


def test_path_shares_are_what_was_recorded(demo: tuple[Any, Any]) -> None:
    """Measured anew on the texts that ship with the model, which are others than the recorded ones."""
    model, tokenizer = demo
    recorded = read_path_use(DEMO)
    texts = {domain: texts[:4] for domain, texts in read_sample_texts(DEMO).items()}
    measured = measure_path_use(model, tokenizer, texts)
    assert (measured.paths, measured.layers) == (recorded.paths, recorded.layers)
    assert measured.share == pytest.approx(recorded.share, abs=0.03, nan_ok=True)
