"""Editing a fact: what is written, what it does, and what it leaves alone."""

import json
import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest
import torch

import hydra_lab
from hydra_lab.attribution import FactEdit, edit_fact, specificity
from hydra_lab.interventions import from_dict, intervened
from tests.attribution.hooks import num_hooks
from tests.helpers import lively_model

PROMPT, ANSWER = "fact", "ab"


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) - 31 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + 31) for token in ids)


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model(seed=9)


@pytest.fixture(scope="module")
def edit(model: Any) -> FactEdit:
    return edit_fact(model, Letters(), PROMPT, ANSWER, num_rows=8, steps=200)  # pyright: ignore[reportArgumentType]


def answer_probability(model: Any, prompt: str, answer: str) -> float:
    tokens = Letters()
    ids = torch.tensor([tokens.encode(prompt + answer)])
    with torch.no_grad():
        log = model(ids, use_cache=False).logits[0].log_softmax(-1)
    size = len(answer)
    return float(torch.stack([log[-size - 1 + k, ids[0, -size + k]] for k in range(size)]).sum().exp())


def test_the_edited_model_answers_as_asked_and_is_the_old_one_afterwards(model: Any, edit: FactEdit) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert edit.previous_answer != ANSWER and edit.achieved
    assert answer_probability(model, PROMPT, ANSWER) == pytest.approx(edit.previous_probability, rel=1e-4)
    with edit.applied(model):
        # The search adds to what the path reads; the edit writes the table. Both must be the same model.
        assert answer_probability(model, PROMPT, ANSWER) == pytest.approx(edit.probability, rel=1e-3)
        changed = (model.model.layers[2].memory.values != weights["model.layers.2.memory.values"]).any(dim=-1)
        assert set(changed.nonzero()[:, 0].tolist()) == set(edit.addresses.tolist())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and num_hooks(model) == 0


def test_the_edit_is_made_of_interventions(model: Any, edit: FactEdit) -> None:
    again = [from_dict(json.loads(json.dumps(change.to_dict()))) for change in edit.interventions()]
    with edit.applied(model):
        table = model.model.layers[2].memory.values.detach().clone()
    with intervened(model, *again):
        assert torch.equal(model.model.layers[2].memory.values, table)
    np.testing.assert_array_equal(table[edit.addresses], edit.values)


def test_the_rows_are_those_that_the_prompt_reads_most(model: Any, edit: FactEdit) -> None:
    ids = torch.tensor([Letters().encode(PROMPT)])
    lookup = hydra_lab.record(model, ids, taps="memory.lookup")["layers.2.memory.lookup"]
    reads = np.zeros((len(PROMPT), 64))
    for position, gate in enumerate(lookup.gate[0, :, 0].tolist()):
        addresses, weights = lookup.addresses[0, position].flatten(), lookup.weights[0, position].flatten()
        np.add.at(reads[position], addresses.numpy(), gate * weights.numpy())
    assert edit.addresses.tolist() == np.argsort(-reads.sum(axis=0))[:8].tolist()
    np.testing.assert_allclose(edit.reads, reads[:, edit.addresses], rtol=1e-5)
    np.testing.assert_allclose(edit.beta, lookup.gate[0, :, 0], rtol=1e-5)
    assert edit.tokens.tolist() == ids[0].tolist()


def test_the_change_is_the_smallest_with_its_effect(edit: FactEdit) -> None:
    """No part of the change lies in directions that the prompt's reads do not see."""
    change = edit.values - edit.previous_values
    seen = edit.reads.T @ np.linalg.pinv(edit.reads.T)
    np.testing.assert_allclose(seen @ change, change, atol=1e-4 * np.abs(change).max())
    assert np.abs(change).max() > 0


def test_specificity_counts_what_changed(model: Any, edit: FactEdit) -> None:
    tokens: Any = Letters()
    others = [("other question", "x"), ("unrelated", "yz"), (PROMPT, "q")]
    texts = ["some words to read", "fact", "another, longer text" * 3]
    found = specificity(model, tokens, edit, phrasings=[PROMPT, "zzzz"], others=others, texts=texts)
    with edit.applied(model):
        says = answer_probability(model, "zzzz", ANSWER)
    assert (
        found.num_phrasings == 2
        and found.generality in (0.5, 1.0)
        and (found.generality == 0.5 or says > 0.1)
    )

    def greedy(prompt: str) -> int:
        with torch.no_grad():
            return int(model(torch.tensor([tokens.encode(prompt)]), use_cache=False).logits[0, -1].argmax())

    before = [greedy(prompt) for prompt, _ in others]
    with edit.applied(model):
        after = [greedy(prompt) for prompt, _ in others]
    assert found.others_changed == sum(a != b for a, b in zip(before, after, strict=True)) >= 1
    right = [(prompt, tokens.decode([token])) for (prompt, _), token in zip(others, before, strict=True)]
    kept = specificity(model, tokens, edit, others=right)
    assert (kept.num_others, kept.others_right) == (3, 3)
    assert kept.others_kept == 3 - found.others_changed and np.isnan(kept.kl) and np.isnan(kept.generality)

    divergence, readers, share, count = 0.0, 0, 0.0, 0
    for text in texts:
        ids = torch.tensor([tokens.encode(text)])
        with torch.no_grad():
            p = model(ids, use_cache=False).logits[0].double().softmax(-1)
            with edit.applied(model):
                q = model(ids, use_cache=False).logits[0].double().softmax(-1)
        lookup = hydra_lab.record(model, ids, taps="memory.lookup")["layers.2.memory.lookup"]
        hit = np.isin(lookup.addresses[0].numpy(), edit.addresses)
        divergence += float((p * (p / q).log()).sum())
        readers += int(hit.any(axis=(1, 2)).sum())
        share += float((hit * lookup.weights[0].numpy()).sum() / 2)  # two heads, whose weights sum to 1 each
        count += ids.shape[1]
    assert (found.num_tokens, found.num_readers) == (count, readers)
    assert found.kl == pytest.approx(divergence / count, rel=1e-3)
    assert found.read_share == pytest.approx(share / count, rel=1e-4)


def test_text_that_reads_no_edited_row_is_untouched() -> None:
    model = lively_model(seed=9, memory_num_keys=(64, 64))
    tokens: Any = Letters()
    edit = edit_fact(model, tokens, PROMPT, ANSWER)
    readers = [specificity(model, tokens, edit, texts=[letter]) for letter in "ghijklmn"]
    away = [found for found in readers if found.num_readers == 0]
    assert away and all(found.kl == 0 for found in away)


def test_a_fact_of_the_shipped_model_in_one_line() -> None:
    model, tokenizer = hydra_lab.load("demo")
    edit = edit_fact(model, tokenizer, "Q: country of Osaka? A:", " Kenya")
    assert edit.previous_answer.startswith(" Japan") and edit.achieved and edit.layer == 3
    with edit.applied(model):
        ids = torch.tensor([tokenizer.encode("Q: country of Osaka? A:", add_special_tokens=False)])
        written = cast(Any, model).generate(
            ids, max_new_tokens=len(tokenizer.encode(" Kenya")), do_sample=False
        )
    assert tokenizer.decode(written[0, ids.shape[1] :]) == " Kenya"


def test_what_cannot_be_edited_is_refused(model: Any) -> None:
    tokens: Any = Letters()
    with pytest.raises(ValueError, match="block 1 has no memory; blocks 2 have"):
        edit_fact(model, tokens, PROMPT, ANSWER, layer=1)
    with pytest.raises(ValueError, match="prompt and answer need at least one token each, got 'fact' and ''"):
        edit_fact(model, tokens, PROMPT, "")
    with pytest.raises(ValueError, match="this model has no memory to edit"):
        edit_fact(lively_model(memory_layers=[]), tokens, PROMPT, ANSWER)
    silent = lively_model()
    silent.set_path_scale("memory", 0.0)
    with pytest.raises(ValueError, match="the memory of block 2 is switched off"):
        edit_fact(silent, tokens, PROMPT, ANSWER)


def test_attribution_needs_nothing_of_the_lab() -> None:
    code = (
        "import sys, hydra_lab.attribution; print(*{'plotly', 'xarray', 'zarr', 'nnsight'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
