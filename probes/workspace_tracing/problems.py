"""Problems of which one premise is changed: the same tokens otherwise, so that whatever differs is that premise."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from hydra_lab.data.tasks import VALUES, make_chain_problem, make_recall_problem, query

if TYPE_CHECKING:
    from hydra_lab.data.world import Fact

KINDS = ("recall", "chain", "open book")
_NUM_PAIRS = 8
_MOST_DRAWS = 100  # per problem that is asked for


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One text in three versions of equal length; the answer comes after its last token.

    Attributes:
        tokens: as it is.
        changed: the premise that is asked for says something else.
        control: another premise, which is not asked for, says something else.
        answer: first token of the answer to `tokens` and to `control`.
        changed_answer: first token of the answer to `changed`.
    """

    tokens: tuple[int, ...]
    changed: tuple[int, ...]
    control: tuple[int, ...]
    answer: int
    changed_answer: int

    @property
    def premise(self) -> list[int]:
        """Positions of the tokens that the change touches."""
        return _differing(self.tokens, self.changed)

    @property
    def other_premise(self) -> list[int]:
        """The same of the other premise."""
        return _differing(self.tokens, self.control)

    def can_be_traced(self, chunk_size: int) -> bool:
        """Whether both premises stand in chunks that are over before the answer's, so that slots can hold them."""
        asking = (len(self.tokens) - 1) // chunk_size
        return max(*self.premise, *self.other_premise) // chunk_size < asking


def _differing(first: tuple[int, ...], second: tuple[int, ...]) -> list[int]:
    return [place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]


def draw_problems(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_problems: int,
    chunk_size: int,
    most_tokens: int,
    seed: int,
) -> list[Problem]:
    """Problems of one of the `KINDS` whose premises a slot can hold when the answer is asked for.

    Raises:
        ValueError: too few can be drawn, for this tokenizer or this length; or the facts' packages are missing.
    """
    rng = random.Random(f"{kind} {seed}")
    drawn = {"recall": _recall, "chain": _chain, "open book": _open_book}[kind](rng)
    problems: list[Problem] = []
    for _ in range(_MOST_DRAWS * num_problems):
        texts = next(drawn)
        problem = _tokenize(texts, tokenizer)
        if problem is None or len(problem.tokens) > most_tokens or not problem.can_be_traced(chunk_size):
            continue
        problems.append(problem)
        if len(problems) == num_problems:
            return problems
    raise ValueError(
        f"only {len(problems)} of {num_problems} {kind} problems of at most {most_tokens} tokens could be drawn for "
        f"chunks of {chunk_size} tokens"
    )


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """A problem as text; fields as in `Problem`, answers whole and with their leading space."""

    text: str
    changed: str
    control: str
    answer: str
    changed_answer: str


def _tokenize(texts: _Texts, tokenizer: PreTrainedTokenizerBase) -> Problem | None:
    """None where the versions differ in length, one of them not at all, or the answers not in their first token."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    versions = [encode(text) for text in (texts.text, texts.changed, texts.control)]
    answer, changed_answer = encode(texts.answer)[0], encode(texts.changed_answer)[0]
    if len({*map(len, versions)}) > 1 or len({*versions}) < 3 or answer == changed_answer:
        return None
    return Problem(
        tokens=versions[0],
        changed=versions[1],
        control=versions[2],
        answer=answer,
        changed_answer=changed_answer,
    )


def _recall(rng: random.Random) -> Iterator[_Texts]:
    """Pairs, filler, a query: the value of the key that is asked, or of another one, is changed."""
    while True:
        problem = make_recall_problem(rng, _NUM_PAIRS, filler=True)
        key, other = rng.sample(list(problem.pairs), 2)
        unused = [value for value in VALUES if value not in problem.pairs.values()]
        new, new_other = rng.sample(unused, 2)
        given = problem.given()
        # Only the values change; the filler follows unchanged.
        pair, other_pair = f"{key} ={problem.pairs[key]};", f"{other} ={problem.pairs[other]};"
        yield _Texts(
            text=given + query(key),
            changed=given.replace(pair, f"{key} ={new};") + query(key),
            control=given.replace(other_pair, f"{other} ={new_other};") + query(key),
            answer=problem.pairs[key],
            changed_answer=new,
        )


def _chain(rng: random.Random) -> Iterator[_Texts]:
    """A variable that refers to another one, asked for the way and given its first step: the value is changed."""
    while True:
        problem = make_chain_problem(rng)
        values = {variable: value for variable, value in problem.assignments if value in VALUES}
        asked = [variable for variable, depth in problem.steps.items() if depth == 2]
        if not asked or len(values) < 2:
            continue
        variable = rng.choice(asked)
        root = problem.path(variable)[0]
        other = rng.choice([each for each in values if each != root])
        unused = [value for value in VALUES if value not in values.values()]
        new, new_other = rng.sample(unused, 2)
        given, question = problem.given(), f"{query(variable, ' >')}{root} ="
        yield _Texts(
            text=given + question,
            changed=given.replace(f"{root} ={values[root]};", f"{root} ={new};") + question,
            control=given.replace(f"{other} ={values[other]};", f"{other} ={new_other};") + question,
            answer=values[root],
            changed_answer=new,
        )


def _open_book(rng: random.Random) -> Iterator[_Texts]:
    """Notes about places that do not exist, then a question: the answer in a note is changed."""
    try:
        from hydra_lab.data.world import OpenBook, invent_fact, load_world
    except ModuleNotFoundError as error:
        raise ValueError(f"the facts need the package {error.name}: pip install 'hydra-lab[train]'") from None
    world = load_world()
    subjects = frozenset(fact.subject for fact in world.facts)
    answers: dict[str, list[str]] = {}
    for fact in world.facts:
        answers.setdefault(fact.relation, []).append(fact.answer)
    while True:
        facts = {fact.subject: fact for fact in (invent_fact(world, rng, subjects) for _ in range(5))}
        asked, other = rng.sample(list(facts.values()), 2)
        taken = {fact.answer for fact in facts.values()}
        new, new_other = (
            rng.choice([answer for answer in answers[fact.relation] if answer not in taken] or [fact.answer])
            for fact in (asked, other)
        )
        question = asked.question(0)

        def told(replaced: "Fact", book: "dict[str, Fact]" = facts, question: str = question) -> str:
            """The notes, one fact of them replaced, and the question."""
            return (
                OpenBook(tuple({**book, replaced.subject: replaced}.values()), invented=True).stated()
                + question
            )

        yield _Texts(
            text=told(asked),
            changed=told(replace(asked, answer=new)),
            control=told(replace(other, answer=new_other)),
            answer=f" {asked.answer}",
            changed_answer=f" {new}",
        )
