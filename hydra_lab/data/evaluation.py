"""Evaluation prompts of the synthetic tasks and the facts; each ends where the answer's first token comes next."""

import random
from typing import TypedDict

from hydra_lab.data.tasks import MAX_STEPS, make_chain_problem, make_recall_problem, query
from hydra_lab.data.world import World, make_open_book


class Question(TypedDict):
    """`answer` is the text that follows `prompt`, its leading space included; `chance` is a blind guess's accuracy."""

    prompt: str
    answer: str
    form: str
    chance: float


class RecallQuestion(Question):
    """With the number of pairs and the number of filler tokens before the query."""

    pairs: int
    filler: int


class ChainQuestion(Question):
    """With the number of lookups to the answer; `form` is "direct" (the value) or "worked" (the way there)."""

    steps: int


class FactQuestion(Question):
    """With the relation; `form` is "closed" (as trained), "closed, unseen phrasing", "open" or "open, invented"."""

    relation: str


def recall_questions(
    rng: random.Random, *, num_main: int = 500, num_other: int = 150
) -> list[RecallQuestion]:
    """`num_main` questions over 8 pairs, `num_other` over 2, 4 and 16 pairs and over 8 with filler always."""
    questions: list[RecallQuestion] = []
    plan: list[tuple[int, bool | None, int]] = [(8, None, num_main), (8, True, num_other)]
    plan += [(size, None, num_other) for size in (2, 4, 16)]
    for num_pairs, filler, count in plan:
        for _ in range(count):
            problem = make_recall_problem(rng, num_pairs, filler)
            key = rng.choice(list(problem.pairs))
            questions.append(
                {
                    "prompt": problem.given() + query(key),
                    "answer": problem.pairs[key],
                    "form": "far" if filler else "as trained",
                    "chance": 1 / num_pairs,
                    "pairs": num_pairs,
                    "filler": len(problem.filler),
                }
            )
    return questions


def chain_questions(rng: random.Random, *, num_each: int = 300) -> list[ChainQuestion]:
    """`num_each` questions of each form for each number of steps from 1 to 5, problems drawn as in training.

    A blind guess takes one of the problem's values, and on the way there one of its variables at each step before.
    """
    questions: list[ChainQuestion] = []
    for steps in range(1, MAX_STEPS + 1):
        remaining = num_each
        while remaining:
            problem = make_chain_problem(rng)
            candidates = [variable for variable, depth in problem.steps.items() if depth == steps]
            if not candidates:
                continue
            variable = rng.choice(candidates)
            roots = sum(depth == 1 for depth in problem.steps.values())
            forms = {
                "direct": (" ?", problem.path(variable)[-1], 1 / roots),
                "worked": (" >", problem.way(variable), 1 / roots / len(problem.steps) ** (steps - 1)),
            }
            for form, (mark, answer, chance) in forms.items():
                questions.append(
                    {
                        "prompt": problem.given() + query(variable, mark),
                        "answer": answer,
                        "form": form,
                        "chance": chance,
                        "steps": steps,
                    }
                )
            remaining -= 1
    return questions


def fact_questions(
    world: World, rng: random.Random, *, num_closed: int = 1000, num_other: int = 400
) -> list[FactQuestion]:
    """Closed-book questions as trained, closed-book ones in the withheld phrasing, and open-book ones.

    `chance` of a closed-book question is the share of its relation's most frequent answer; of an open-book question,
    one over the distinct answers in the context.
    """
    counts: dict[str, dict[str, int]] = {}
    for fact in world.facts:
        answers = counts.setdefault(fact.relation, {})
        answers[fact.answer] = answers.get(fact.answer, 0) + 1
    most = {relation: max(answers.values()) / sum(answers.values()) for relation, answers in counts.items()}
    questions: list[FactQuestion] = []
    seen = [fact for fact in world.facts if fact.held_out_phrasing() != 0]
    for fact in rng.sample(seen, min(num_closed, len(seen))):
        questions.append(
            {
                "prompt": fact.question(0),
                "answer": f" {fact.answer}",
                "form": "closed",
                "chance": most[fact.relation],
                "relation": fact.relation,
            }
        )
    withheld = [fact for fact in world.facts if fact.held_out_phrasing() is not None]
    for fact in rng.sample(withheld, min(num_other, len(withheld))):
        phrasing = fact.held_out_phrasing()
        assert phrasing is not None
        questions.append(
            {
                "prompt": fact.question(phrasing),
                "answer": f" {fact.answer}",
                "form": "closed, unseen phrasing",
                "chance": most[fact.relation],
                "relation": fact.relation,
            }
        )
    subjects = frozenset(fact.subject for fact in world.facts)
    for _ in range(num_other):
        book = make_open_book(world, rng, subjects)
        fact = rng.choice(book.facts)
        questions.append(
            {
                "prompt": book.stated() + fact.question(0),
                "answer": f" {fact.answer}",
                "form": "open, invented" if book.invented else "open",
                "chance": 1 / len({stated.answer for stated in book.facts}),
                "relation": fact.relation,
            }
        )
    return questions
