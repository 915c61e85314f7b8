"""Evaluation on models whose answers are known."""

import json
import math
from pathlib import Path

import pytest
import torch

from hydra_lab.config import HydraConfig
from hydra_lab.data import DOMAINS, load_tokenizer
from hydra_lab.modeling import HydraCausalLMOutput, HydraForCausalLM
from hydra_lab.training.evaluate import answer_scores, domain_score, evaluate, gate_scores, main


def nano(corpus: Path) -> HydraForCausalLM:
    torch.manual_seed(0)
    config = HydraConfig.from_preset("nano", vocab_size=len(load_tokenizer(corpus / "tokenizer")))
    return HydraForCausalLM(config).eval()


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    model = nano(corpus)
    torch.nn.init.zeros_(model.get_parameter("lm_head.weight"))
    texts = ["a small text of few words, é\n" * 9, "few"]
    found = domain_score(model, tokenizer, texts, domain="prose", window=32, stride=24, max_bytes=10_000)
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (found.num_tokens, found.num_bytes, found.num_documents) == (num_tokens, num_bytes, 2)
    assert found.nats_per_token == pytest.approx(math.log(len(tokenizer)))
    assert found.bits_per_byte == pytest.approx(math.log2(len(tokenizer)) * num_tokens / num_bytes)


class Teller(HydraForCausalLM):
    """Says each token of `told` after the one before it, and an unused token otherwise."""

    told: dict[int, int]

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> HydraCausalLMOutput:  # type: ignore[override]
        following = torch.tensor([[self.told.get(int(t), 0) for t in row] for row in input_ids])
        logits = torch.nn.functional.one_hot(following, self.config.vocab_size).float() * 50
        return HydraCausalLMOutput(logits=logits)


def test_an_answer_counts_only_if_all_its_tokens_are_right(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    model = Teller(nano(corpus).config).eval()
    model.told = {ids("=")[0]: ids("X")[0], ids("X")[0]: ids("Y")[0]}
    questions = [
        {"prompt": "a=", "answer": answer, "chance": chance, "form": "closed"}
        for answer, chance in (("XY", 0.1), ("X", 0.3), ("XZ", 0.1), ("ZY", 0.1))
    ]
    [found] = answer_scores(model, tokenizer, questions, task="facts")
    assert found.accuracy == 0.5
    assert found.chance == pytest.approx(0.15)
    assert found.standard_error == pytest.approx(0.25)
    assert (found.task, found.group, found.num_questions) == ("facts", "form=closed", 4)


def test_gate_is_read_on_the_question_only(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    model = nano(corpus)
    question = "Q: a? A:"
    length = len(tokenizer(question)["input_ids"])

    def shut_before_the_question(_module: object, _inputs: object, lookup):  # type: ignore[no-untyped-def]
        gate = torch.full_like(lookup.gate, 0.125)
        end = lookup.gate.shape[1]
        gate[:, end - length :] = 0.5
        gate[:, end - 1] = 0.75
        return lookup._replace(gate=gate)

    model.get_submodule("model.layers.2.memory.lookup").register_forward_hook(shut_before_the_question)
    [found] = gate_scores(model, tokenizer, [{"prompt": "Note: a is b.\n" + question, "form": "open"}])
    assert found.at_answer == pytest.approx(0.75)
    assert found.mean == pytest.approx((0.5 * (length - 1) + 0.75) / length)
    assert (found.form, found.num_questions) == ("open", 1)


def test_no_gates_without_a_memory(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    config = HydraConfig.from_preset("nano", vocab_size=len(tokenizer), memory_layers=[])
    model = HydraForCausalLM(config).eval()
    assert gate_scores(model, tokenizer, [{"prompt": "Q: a? A:", "form": "closed"}]) == []


def test_evaluate_reports_every_domain_task_and_form(corpus: Path, tmp_path: Path) -> None:
    model = nano(corpus)
    result = evaluate(model, load_tokenizer(corpus / "tokenizer"), corpus, window=64, stride=32)
    assert [row.domain for row in result.domains] == list(DOMAINS)
    assert [(row.task, row.group) for row in result.answers] == [
        ("recall", "pairs=2, form=near"),
        ("recall", "pairs=4, form=near"),
        ("chains", "steps=2, form=direct"),
        ("facts", "form=closed"),
        ("facts", "form=open"),
    ]
    assert [(row.form, row.mean) for row in result.gates] == [("closed", 0.5), ("open", 0.5)]
    assert json.loads(result.to_json())["domains"][0]["domain"] == "code"
    assert all(domain in result.table() for domain in DOMAINS)


def test_command_line_evaluates_a_directory(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nano(corpus).save_pretrained(tmp_path / "model")
    load_tokenizer(corpus / "tokenizer").save_pretrained(tmp_path / "model")
    out = tmp_path / "evaluation.json"
    assert main([str(tmp_path / "model"), "--corpus", str(corpus), "--out", str(out), "--quick"]) == 0
    assert "bits/byte" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["domains"]) == len(DOMAINS)
