"""A tiny corpus with every domain, made once."""

import json
from pathlib import Path

import numpy as np
import pytest

from hydra_lab.data import DOMAINS, PackedTokens
from hydra_lab.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus directory: 2,000 tokens of noise per domain, a few held-out texts and questions."""
    directory = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(["a small text of few words\n" * 4], vocabulary_size=270)
    tokenizer.save_pretrained(directory / "tokenizer")
    for number, domain in enumerate(DOMAINS):
        generator = np.random.default_rng(number)
        # Each domain has its own 20 tokens, so that there is something to learn.
        tokens = (generator.integers(0, 20, 2000) + 20 * number).astype(np.uint16)
        mask = (generator.random(2000) < 0.8).astype(np.uint8)
        PackedTokens(tokens, mask, np.arange(0, 2000, 100)).save(directory, domain)
        texts = [f"{domain} {word} text\n" * 3 for word in ("first", "second", "third")]
        _write(
            directory / f"{domain}.heldout.jsonl", [{"text": t, "domain": domain, "form": ""} for t in texts]
        )
    question = {"prompt": "few ", "answer": " words", "form": "near", "chance": 0.5}
    _write(directory / "eval_recall.jsonl", [{**question, "pairs": pairs} for pairs in (2, 2, 4)])
    _write(directory / "eval_chains.jsonl", [{**question, "steps": 2, "form": "direct"}])
    facts = [
        {"prompt": "Q: a? A:", "answer": " b", "form": "closed", "chance": 0.1},
        {"prompt": "Note: a is b.\nQ: a? A:", "answer": " b", "form": "open", "chance": 0.2},
        {"prompt": "Note: c is d.\nQ: c? A:", "answer": " d", "form": "open", "chance": 0.2},
    ]
    _write(directory / "eval_facts.jsonl", facts)
    return directory


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
