"""How good a model is: held-out bits per byte, answers, and when it opens its memory.

python -m hydra_lab.training.evaluate MODEL --corpus DIR --out evaluation.json
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hydra_lab.data import DOMAINS, NATURAL_DOMAINS, load_tokenizer
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Lookup
from hydra_lab.training.curriculum import STATE_FILE
from hydra_lab.training.export import fold_scales
from hydra_lab.training.scoring import Stretch, batches, padded, score, stretches

TASKS = ("recall", "chains", "facts")
GROUPS = {"recall": ("pairs", "form"), "chains": ("steps", "form"), "facts": ("form",)}
"""Fields of a question by which its task's answers are counted."""


@dataclass(frozen=True)
class DomainScore:
    """Held-out text of one domain."""

    domain: str
    bits_per_byte: float
    """Total negative log2-likelihood over the UTF-8 bytes of the text."""
    nats_per_token: float
    """Mean negative log-likelihood of a token."""
    num_bytes: int
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class AnswerScore:
    """Questions of one kind, answered greedily."""

    task: str
    """`recall`, `chains` or `facts`."""
    group: str
    """What the questions have in common, such as `pairs=8, form=as trained`."""
    accuracy: float
    """Share of the questions whose answer's tokens are all the most likely ones."""
    standard_error: float
    """Binomial standard error of `accuracy`."""
    chance: float
    """Accuracy of a blind guess."""
    num_questions: int


@dataclass(frozen=True)
class GateScore:
    """The memory's gate beta on the tokens of one form of fact question (its last line), mean over the blocks."""

    form: str
    mean: float
    """Mean over the question's tokens."""
    at_answer: float
    """Mean at the last of them, which predicts the answer's first token."""
    standard_error: float
    """Standard error of `mean` over the questions."""
    num_questions: int


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` measures."""

    domains: tuple[DomainScore, ...]
    answers: tuple[AnswerScore, ...]
    gates: tuple[GateScore, ...]
    """Empty where the model has no memory."""
    window: int
    """Tokens of context at most, in the bits per byte."""
    stride: int
    seconds: float
    """How long it took."""

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def table(self) -> str:
        """The result as text for people."""
        lines = [f"{'held-out text':<34}{'bits/byte':>10}{'nats/token':>12}{'bytes':>10}"]
        for row in self.domains:
            lines.append(
                f"{row.domain:<34}{row.bits_per_byte:>10.3f}{row.nats_per_token:>12.3f}{row.num_bytes:>10}"
            )
        lines.append(f"\n{'answers':<44}{'right':>8}{'chance':>8}{'n':>6}")
        for answer in self.answers:
            name = f"{answer.task}: {answer.group}"
            lines.append(f"{name:<44}{answer.accuracy:>8.3f}{answer.chance:>8.3f}{answer.num_questions:>6}")
        lines.append(f"\n{'memory gate beta':<34}{'question':>10}{'at answer':>12}{'n':>6}")
        for gate in self.gates:
            lines.append(f"{gate.form:<34}{gate.mean:>10.3f}{gate.at_answer:>12.3f}{gate.num_questions:>6}")
        return "\n".join(lines)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def domain_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    domain: str,
    window: int,
    stride: int,
    max_bytes: int,
    bf16: bool = False,
) -> DomainScore:
    """Bits per byte of documents, each read on its own after an end-of-text token.

    Args:
        texts: held-out documents; taken in order until `max_bytes` bytes are reached.
    """
    taken: list[Stretch] = []
    num_bytes = num_documents = 0
    for text in texts:
        if num_bytes >= max_bytes:
            break
        tokens = _encode(tokenizer, f"{tokenizer.eos_token}{text}")
        taken += stretches(tokens, window, stride)
        num_bytes += len(text.encode())
        num_documents += 1
    nats, num_tokens = 0.0, 0
    for stretch, scores in zip(taken, score(model, [s.tokens for s in taken], bf16=bf16), strict=True):
        new = scores.loss[stretch.begin - 1 :]
        nats += float(new.sum())
        num_tokens += len(new)
    return DomainScore(
        domain=domain,
        bits_per_byte=nats / math.log(2) / num_bytes,
        nats_per_token=nats / num_tokens,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        num_documents=num_documents,
    )


def answer_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, Any]],
    *,
    task: str,
    bf16: bool = False,
) -> list[AnswerScore]:
    """Greedy answers, right where each answer token is the most likely one after the prompt and those before it.

    Args:
        questions: rows with `prompt`, `answer`, `chance` and the fields of `GROUPS[task]`.
    """
    prompts = [_encode(tokenizer, question["prompt"]) for question in questions]
    answers = [_encode(tokenizer, question["answer"]) for question in questions]
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    hits: dict[str, list[tuple[bool, float]]] = {}
    for question, answer, scores in zip(questions, answers, score(model, sequences, bf16=bf16), strict=True):
        group = ", ".join(f"{field}={question[field]}" for field in GROUPS[task])
        right = bool(scores.hit[-len(answer) :].all())
        hits.setdefault(group, []).append((right, question["chance"]))
    rows: list[AnswerScore] = []
    for group, found in sorted(hits.items()):
        accuracy = sum(right for right, _ in found) / len(found)
        rows.append(
            AnswerScore(
                task=task,
                group=group,
                accuracy=accuracy,
                standard_error=math.sqrt(accuracy * (1 - accuracy) / len(found)),
                chance=sum(chance for _, chance in found) / len(found),
                num_questions=len(found),
            )
        )
    return rows


@contextmanager
def _gates(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Within the context, every forward pass puts its blocks' gates beta, [B, L] each, into the list."""
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, lookup: Lookup) -> None:
        seen.append(lookup.gate[..., 0].detach().float().cpu())

    taps = [module for name, module in model.named_modules() if name.endswith("memory.lookup")]
    handles = [tap.register_forward_hook(keep) for tap in taps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def gate_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, Any]],
    *,
    bf16: bool = False,
    max_tokens: int = 8192,
) -> list[GateScore]:
    """The memory's gate on fact questions by form, over the tokens of the question itself (not of the notes before).

    Args:
        questions: rows with `prompt` and `form`; the question is the last line of the prompt.
    """
    contexts, asked = [], []
    for question in questions:
        before, line_end, last = question["prompt"].rpartition("\n")
        contexts.append(_encode(tokenizer, before + line_end))
        asked.append(_encode(tokenizer, last))
    sequences = [context + question for context, question in zip(contexts, asked, strict=True)]
    device = next(model.parameters()).device
    found: dict[str, list[tuple[float, float]]] = {}
    with _gates(model) as seen:
        for group in batches([len(sequence) for sequence in sequences], max_tokens):
            seen.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                model(input_ids=padded([sequences[i] for i in group], device), use_cache=False)
            if not seen:
                return []
            mean_BL = torch.stack(seen).mean(dim=0)
            for row, index in enumerate(group):
                gates = mean_BL[row, len(contexts[index]) : len(sequences[index])]
                values = found.setdefault(questions[index]["form"], [])
                values.append((float(gates.mean()), float(gates[-1])))
    rows: list[GateScore] = []
    for form, pairs in sorted(found.items()):
        means, lasts = np.array(pairs).T
        error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
        rows.append(GateScore(form, float(means.mean()), float(lasts.mean()), error, len(means)))
    return rows


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | Path,
    *,
    window: int = 512,
    stride: int = 384,
    natural_bytes: int = 300_000,
    synthetic_bytes: int = 60_000,
    max_questions: int = 500,
    bf16: bool = False,
) -> Evaluation:
    """Measure a model on a corpus's held-out files.

    Args:
        corpus: corpus directory with `<domain>.heldout.jsonl` and `eval_<task>.jsonl`.
        window, stride: of the bits per byte, in tokens (see `stretches`).
        natural_bytes, synthetic_bytes: held-out text to read, per domain that people and that programs wrote.
        max_questions: questions per group of a task.
        bf16: compute under bfloat16 autocast.
    """
    began = time.perf_counter()
    corpus = Path(corpus)
    was_training = model.training
    model.eval()
    domains: list[DomainScore] = []
    for domain in DOMAINS:
        rows = _read_jsonl(corpus / f"{domain}.heldout.jsonl")
        limit = natural_bytes if domain in NATURAL_DOMAINS else synthetic_bytes
        texts = [row["text"] for row in rows]
        domains.append(
            domain_score(
                model,
                tokenizer,
                texts,
                domain=domain,
                window=window,
                stride=stride,
                max_bytes=limit,
                bf16=bf16,
            )
        )
    answers: list[AnswerScore] = []
    gates: list[GateScore] = []
    for task in TASKS:
        questions = _first_of_each(_read_jsonl(corpus / f"eval_{task}.jsonl"), GROUPS[task], max_questions)
        answers += answer_scores(model, tokenizer, questions, task=task, bf16=bf16)
        if task == "facts":
            gates = gate_scores(model, tokenizer, questions, bf16=bf16)
    model.train(was_training)
    return Evaluation(
        domains=tuple(domains),
        answers=tuple(answers),
        gates=tuple(gates),
        window=window,
        stride=stride,
        seconds=time.perf_counter() - began,
    )


def _first_of_each(rows: list[dict[str, Any]], fields: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    taken: dict[tuple[Any, ...], int] = {}
    kept: list[dict[str, Any]] = []
    for row in rows:
        key = tuple(row[field] for field in fields)
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= count:
            kept.append(row)
    return kept


def load_checkpoint(directory: str | Path) -> tuple[HydraForCausalLM, PreTrainedTokenizerBase]:
    """A model and its tokenizer, ready to evaluate.

    A training checkpoint is loaded with the path multipliers that its curriculum stood at.
    """
    directory = Path(directory)
    model = HydraForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if (directory / STATE_FILE).exists():
        fold_scales(model, json.loads((directory / STATE_FILE).read_text())["scales"])
    return model, load_tokenizer(directory)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a model or training checkpoint from the command line."""
    parser = argparse.ArgumentParser(prog="python -m hydra_lab.training.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a model or of a training checkpoint")
    parser.add_argument("--corpus", type=Path, required=True, help="corpus directory")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--bf16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument("--quick", action="store_true", help="a tenth of the text and of the questions")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_checkpoint(options.model)
    less = 10 if options.quick else 1
    result = evaluate(
        model,
        tokenizer,
        options.corpus,
        natural_bytes=300_000 // less,
        synthetic_bytes=60_000 // less,
        max_questions=500 // less,
        bf16=options.bf16,
    )
    print(result.table())
    if options.out is not None:
        options.out.write_text(result.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
