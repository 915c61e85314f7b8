"""What is asked: facts without notes, with notes that hold the answer, and with notes that do not."""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from hydra_lab.data.world import Fact

FORMS = ("closed", "lacking", "holding")
"""Ways to ask: the question alone; after notes without its answer; after the same notes, one of which is its answer.

The last two differ in one note only, so that what differs between them is not the length of the context."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A fact that is asked, as tokens.

    Attributes:
        relation: what is asked for; answers are compared with those of the same relation.
        asked: tokens of the question itself.
        lacking, holding: tokens of the notes before it, without and with the answer.
        answer: tokens of the answer.
        text: for people.
    """

    relation: str
    asked: tuple[int, ...]
    lacking: tuple[int, ...]
    holding: tuple[int, ...]
    answer: tuple[int, ...]
    text: str

    def prompt(self, form: str) -> tuple[int, ...]:
        """The tokens before the answer, in one of the `FORMS`."""
        notes = {"closed": (), "lacking": self.lacking, "holding": self.holding}[form]
        return notes + self.asked


@dataclass(frozen=True, kw_only=True)
class EditableFact:
    """A fact and what it is to say instead.

    Attributes:
        prompt: the question that is edited, as text.
        rephrased: the same question in another phrasing, with the new answer as its answer.
        new_answer: as text, with its leading space.
        text: for people.
    """

    prompt: str
    rephrased: Question
    new_answer: str
    text: str


def world_questions(
    tokenizer: PreTrainedTokenizerBase, *, num_questions: int, num_notes: int, seed: int
) -> list[Question]:
    """Facts of the world that the demo's corpora are made of, in the phrasing that open-book documents use.

    Raises:
        ValueError: the packages that hold the facts are missing, or there are not as many facts.
    """
    facts = _facts()
    from hydra_lab.data.world import OpenBook

    rng = random.Random(seed)
    by_relation: dict[str, list[Fact]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    trained = [fact for fact in facts if fact.held_out_phrasing() != 0]
    if num_questions > len(trained):
        raise ValueError(f"num_questions={num_questions} must be at most {len(trained)}, the facts there are")

    questions: list[Question] = []
    for fact in rng.sample(trained, num_questions):
        others = [
            each
            for each in by_relation[fact.relation]
            if each.answer != fact.answer and each.subject != fact.subject
        ]
        notes: list[Fact] = []
        while len(notes) < num_notes:
            # The note that takes the answer's place is of the same relation, the others of any.
            other = rng.choice(others if not notes else facts)
            if other.answer != fact.answer and other.subject not in {
                fact.subject,
                *(n.subject for n in notes),
            }:
                notes.append(other)
        order = rng.sample(range(num_notes), num_notes)
        lacking = [notes[place] for place in order]
        holding = [fact if place == 0 else notes[place] for place in order]
        questions.append(
            Question(
                relation=fact.relation,
                asked=_encode(tokenizer, fact.question(0)),
                lacking=_encode(tokenizer, OpenBook(tuple(lacking), invented=False).stated()),
                holding=_encode(tokenizer, OpenBook(tuple(holding), invented=False).stated()),
                answer=_encode(tokenizer, f" {fact.answer}"),
                text=f"{fact.relation} of {fact.subject}: {fact.answer}",
            )
        )
    return questions


def editable_facts(tokenizer: PreTrainedTokenizerBase, *, num_facts: int, seed: int) -> list[EditableFact]:
    """Facts that training asks in both phrasings, each with the answer of another one of its relation.

    Raises:
        ValueError: as `world_questions`.
    """
    facts = _facts()
    rng = random.Random(f"edit {seed}")
    trained = [fact for fact in facts if fact.held_out_phrasing() is None]
    if num_facts > len(trained):
        raise ValueError(f"num_edited={num_facts} must be at most {len(trained)}, the facts there are")
    editable: list[EditableFact] = []
    for fact in rng.sample(trained, num_facts):
        new = rng.choice(
            [each.answer for each in facts if each.relation == fact.relation and each.answer != fact.answer]
        )
        editable.append(
            EditableFact(
                prompt=fact.question(0),
                rephrased=Question(
                    relation=fact.relation,
                    asked=_encode(tokenizer, fact.question(1)),
                    lacking=(),
                    holding=(),
                    answer=_encode(tokenizer, f" {new}"),
                    text=f"{fact.relation} of {fact.subject}: {new}",
                ),
                new_answer=f" {new}",
                text=f"{fact.relation} of {fact.subject}: {fact.answer}, edited to {new}",
            )
        )
    return editable


def _facts() -> "tuple[Fact, ...]":
    try:
        from hydra_lab.data.world import load_world
    except ModuleNotFoundError as error:
        raise ValueError(f"the facts need the package {error.name}: pip install 'hydra-lab[train]'") from None
    return load_world().facts


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))
