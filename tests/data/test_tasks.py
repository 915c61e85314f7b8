"""The answers of the generated tasks, checked by solvers that share no code with the generators."""

import math
import random
import re

import pytest

from hydra_lab.data.document import Document
from hydra_lab.data.evaluation import chain_questions, recall_questions
from hydra_lab.data.tasks import (
    FILLER,
    MAX_STEPS,
    make_arithmetic,
    make_chain,
    make_chain_problem,
    make_recall,
)


def supervised(document: Document) -> list[str]:
    assert document.spans is not None
    return [document.text[start:end] for start, end in document.spans]


def solve_recall(text: str) -> list[str]:
    given, *asked = text.removeprefix("recall:").split(" ?")
    known: dict[str, str] = {}
    *pairs, filler = given.split(";")
    assert all(" " + word in FILLER for word in filler.split())
    for pair in pairs:
        key, value = pair.split("=")
        assert key not in known
        known[key] = value
    return [known[question.split("=")[0]].strip() for question in asked]


def follow(links: dict[str, str], variable: str) -> list[str]:
    path: list[str] = []
    while len(variable) > 1:
        variable = links[variable]
        path.append(variable)
    return path


def read_links(text: str) -> dict[str, str]:
    given = re.split(r" [?>]", text.removeprefix("chain:"))[0]
    pairs = re.findall(r" (\w+) = (\w+);", given)
    assert "".join(f" {left} = {right};" for left, right in pairs) == given
    assert len(dict(pairs)) == len(pairs), "a variable is assigned twice"
    return dict(pairs)


@pytest.mark.parametrize("seed", range(200))
def test_recall_answers(seed: int) -> None:
    document = make_recall(random.Random(seed))
    assert [answer.strip() for answer in supervised(document)] == solve_recall(document.text)


@pytest.mark.parametrize("seed", range(200))
def test_chain_answers(seed: int) -> None:
    document = make_chain(random.Random(seed))
    links = read_links(document.text)
    expected: list[str] = []
    for mark, section in re.findall(r"([?>])([^?>]*)", document.text):
        path = follow(links, section.split()[0])
        expected.append(path[-1] if mark == "?" else " = ".join(path) + ";")
    assert [answer.strip() for answer in supervised(document)] == expected


def test_chain_problems_vary() -> None:
    rng = random.Random(0)
    problems = [make_chain_problem(rng) for _ in range(400)]
    depths = {depth for problem in problems for depth in problem.steps.values()}
    assert depths == set(range(1, MAX_STEPS + 1))
    for problem in problems:
        assert {v: len(problem.path(v)) for v in problem.steps} == problem.steps
        if problem.ordered:
            seen: set[str] = set()
            for variable, source in problem.assignments:
                assert len(source.strip()) == 1 or source in seen
                seen.add(variable)
    assert 0.5 < sum(problem.ordered for problem in problems) / 400 < 0.7


@pytest.mark.parametrize("held_out", [False, True])
def test_arithmetic_is_right_and_split_by_problem(held_out: bool) -> None:
    rng = random.Random(1)
    problems: set[str] = set()
    for _ in range(100):
        document = make_arithmetic(rng, held_out=held_out)
        for line, answer in zip(document.text.splitlines(), supervised(document), strict=True):
            problem, working = line.split(":")
            assert answer == working + "\n"
            *steps, result = working.split()
            assert eval(problem) == int(result.removeprefix("=")) >= 0
            for step in steps:
                left, right = step.split("=")
                assert eval(left) == int(right) >= 0
            problems.add(problem)
    other = make_arithmetic(random.Random(2), held_out=not held_out)
    assert problems.isdisjoint(line.split(":")[0] for line in other.text.splitlines())


def test_eval_questions_are_right() -> None:
    for question in recall_questions(random.Random(3), num_main=100, num_other=50):
        assert solve_recall(question["prompt"] + question["answer"]) == [question["answer"].strip()]
        assert 1 / question["pairs"] == question["chance"]
    steps: list[int] = []
    for question in chain_questions(random.Random(4), num_each=40):
        links = read_links(question["prompt"])
        path = follow(links, question["prompt"].split()[-2])
        worked = question["form"] == "worked"
        assert question["answer"].strip() == (" = ".join(path) if worked else path[-1])
        assert question["steps"] == len(path)
        guesses = [sum(len(value) == 1 for value in links.values())] + [len(links)] * (len(path) - 1) * worked
        assert question["chance"] == pytest.approx(1 / math.prod(guesses))
        steps.append(question["steps"])
    assert sorted(set(steps)) == [1, 2, 3, 4, 5]


def test_seeds_decide() -> None:
    assert make_chain(random.Random(5)) == make_chain(random.Random(5))
    assert make_recall(random.Random(5)) != make_recall(random.Random(6))
