"""Synthetic tasks whose answers must be computed from the context: arithmetic, chains, recall.

Keys and variables are invented names. Single letters, of which there are 26, are bound anew in every problem of a row:
with them a model of the demo's size still answered at chance after 20 million tokens. Values are single tokens. Only
what the context determines is supervised: random names and operands would be noise in the loss.

    recall: Fenmar = Q; Kelgor = D; ? Kelgor = D;                pairs, then queries
    chain: Fenmar = Q; Kelgor = Fenmar; ? Kelgor = Q;            `?` asks for the value at the end of the chain
    chain: Fenmar = Q; Kelgor = Fenmar; > Kelgor = Fenmar = Q;   `>` asks for the way there, one lookup at a time
    47+38: 7+8=15 4+3+1=8 =85                                    from the lowest digit, the carry written as a term
"""

import hashlib
import random
from dataclasses import dataclass

from hydra_lab.data.document import Document, Piece
from hydra_lab.data.names import invent_names

LETTERS = tuple(f" {letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
VALUES = tuple(f" {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
MARKS = (" ?", " >")
# Words that carry no answer; they only put distance between the pairs and the queries.
FILLER = tuple(
    f" {word}"
    for word in (
        "the of and to in that is was for it with as his on be at by had not are but from or have an they which one "
        "you were her all she there would their we him been has when who will more no if out so said what up its "
        "about into than them can only other new some could time these two may then do first any my now such like"
    ).split()
)
LABELS = ("recall", "chain")
SYMBOLS = LETTERS + VALUES + MARKS + FILLER + LABELS
"""Pieces that the tokenizer keeps whole."""

MAX_STEPS = 5
HELD_OUT_SHARE = 16
"""One arithmetic problem of this many is held out, chosen by a hash of the problem itself."""


def query(name: str, mark: str = " ?") -> str:
    """What asks for `name`; the answer comes next."""
    return f"{mark}{name} ="


def _names(rng: random.Random, count: int) -> list[str]:
    return [f" {name}" for name in invent_names(rng, count)]


def make_filler(rng: random.Random) -> list[str]:
    """Filler of 16 to 320 tokens, short lengths as frequent as long ones on a log scale."""
    return rng.choices(FILLER, k=round(16 * 20 ** rng.random()))


@dataclass(frozen=True, slots=True)
class RecallProblem:
    """Pairs to remember and what stands between them and the first query.

    Attributes:
        pairs: key -> value, in the order in which they are given.
        filler: filler words, possibly none.
    """

    pairs: dict[str, str]
    filler: tuple[str, ...]

    def given(self) -> str:
        """The text before the first query."""
        return "recall:" + "".join(f"{k} ={v};" for k, v in self.pairs.items()) + "".join(self.filler)


def make_recall_problem(
    rng: random.Random, num_pairs: int | None = None, filler: bool | None = None
) -> RecallProblem:
    """Draws 2 to 16 pairs (mostly 2 to 8) and, in one of eight problems, filler; both can be asked for."""
    if num_pairs is None:
        num_pairs = rng.randint(2, 8) if rng.random() < 0.8 else rng.randint(9, 16)
    if filler is None:
        filler = rng.random() < 1 / 8
    pairs = dict(zip(_names(rng, num_pairs), rng.sample(VALUES, num_pairs), strict=True))
    return RecallProblem(pairs, tuple(make_filler(rng)) if filler else ())


def make_recall(rng: random.Random) -> Document:
    """A recall problem with one to three queries per pair, their keys drawn at random.

    Not each key once a round: then a value that was not asked yet is a better guess than any, and a model learns to
    strike values off a list before it learns to look one up.
    """
    problem = make_recall_problem(rng)
    pieces: list[Piece] = [(problem.given(), False)]
    for key in rng.choices(list(problem.pairs), k=rng.randint(1, 3) * len(problem.pairs)):
        pieces += [(query(key), False), (problem.pairs[key], True), (";", False)]
    return Document.from_pieces(pieces, form="far" if problem.filler else "near")


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """A forest of assignments: a variable is a value or another variable.

    Attributes:
        assignments: (variable, variable or value) in the order in which they are given.
        steps: variable -> number of lookups to its value; 1 where it is assigned a value directly.
        ordered: whether every variable is assigned before another one refers to it.
    """

    assignments: tuple[tuple[str, str], ...]
    steps: dict[str, int]
    ordered: bool

    def given(self) -> str:
        """The assignments as text."""
        return "chain:" + "".join(f"{variable} ={source};" for variable, source in self.assignments)

    def path(self, variable: str) -> list[str]:
        """What `variable` refers to, lookup by lookup; the value comes last."""
        links = dict(self.assignments)
        path = [links[variable]]
        while path[-1] in links:
            path.append(links[path[-1]])
        return path

    def way(self, variable: str) -> str:
        """`path` as the text that answers a question for the way."""
        return " =".join(self.path(variable))


def make_chain_problem(rng: random.Random) -> ChainProblem:
    """Draws 2 to 6 valued variables and as many or more that refer to others, at most `MAX_STEPS` deep."""
    easy = rng.random() < 0.4
    num_roots = rng.randint(2, 3) if easy else rng.randint(3, 6)
    num_links = rng.randint(2, 4) if easy else rng.randint(3, 9)
    variables = _names(rng, num_roots + num_links)
    roots, others = variables[:num_roots], variables[num_roots:]
    assignments = list(zip(roots, rng.sample(VALUES, num_roots), strict=True))
    steps = dict.fromkeys(roots, 1)
    deepen = rng.random() < 0.3
    for variable in others:
        candidates = [name for name, depth in steps.items() if depth < MAX_STEPS]
        source = max(candidates, key=steps.__getitem__) if deepen else rng.choice(candidates)
        assignments.append((variable, source))
        steps[variable] = steps[source] + 1
    ordered = rng.random() < 0.6
    if not ordered:
        rng.shuffle(assignments)
    return ChainProblem(tuple(assignments), steps, ordered)


def make_chain(rng: random.Random) -> Document:
    """A chain problem with every variable asked directly (`?`), and in two of three some of them step by step (`>`)."""
    problem = make_chain_problem(rng)
    variables = list(problem.steps)
    direct: list[Piece] = []
    for variable in rng.sample(variables, len(variables)):
        direct += [(query(variable), False), (problem.path(variable)[-1], True), (";", False)]
    pieces: list[Piece] = [(problem.given(), False)]
    if rng.random() < 2 / 3:
        worked: list[Piece] = []
        for variable in rng.sample(variables, min(4, len(variables))):
            worked += [(query(variable, " >"), False), (problem.way(variable) + ";", True)]
        direct = worked + direct if rng.random() < 0.5 else direct + worked
    order = "ordered" if problem.ordered else "shuffled"
    return Document.from_pieces(pieces + direct, form=order)


@dataclass(frozen=True, slots=True)
class ArithmeticProblem:
    """`left operator right`, operator one of + - *; both operands are non-negative, and so is the result."""

    left: int
    operator: str
    right: int

    def given(self) -> str:
        """The problem as text, with the colon after which the working starts."""
        return f"{self.left}{self.operator}{self.right}:"

    def held_out(self) -> bool:
        """Whether this very problem belongs to the held-out split, wherever it is drawn."""
        return hashlib.sha256(self.given().encode()).digest()[0] % HELD_OUT_SHARE == 0

    def working(self) -> str:
        """The steps, lowest digit first, and the result: " 7+8=15 4+3+1=8 =85"."""
        steps: list[str] = []
        carry = 0
        if self.operator == "*":
            for digit in reversed(str(self.left)):
                value = int(digit) * self.right + carry
                steps.append(f"{digit}*{self.right}{f'+{carry}' if carry else ''}={value}")
                carry = value // 10
            result = self.left * self.right
        else:
            width = max(len(str(self.left)), len(str(self.right)))
            for a, b in zip(f"{self.left:0{width}}"[::-1], f"{self.right:0{width}}"[::-1], strict=True):
                term = f"{self.operator}{carry}" if carry else ""
                if self.operator == "+":
                    value = int(a) + int(b) + carry
                    carry, top = value // 10, int(a)
                else:
                    top = int(a) + (10 if int(a) - int(b) - carry < 0 else 0)
                    value = top - int(b) - carry
                    carry = int(top >= 10)
                steps.append(f"{top}{self.operator}{b}{term}={value}")
            result = self.left + self.right if self.operator == "+" else self.left - self.right
        return "".join(f" {step}" for step in steps) + f" ={result}"


def make_arithmetic_problem(rng: random.Random, *, held_out: bool) -> ArithmeticProblem:
    """Draws a sum, a difference or a product by one digit, operands of one to three digits, from one split."""
    while True:
        operator = rng.choice("+-*")
        left = rng.randrange(10 ** rng.choice((1, 2, 2, 3)))
        right = rng.randrange(2, 10) if operator == "*" else rng.randrange(10 ** rng.choice((1, 2, 2, 3)))
        if operator == "-" and left < right:
            left, right = right, left
        problem = ArithmeticProblem(left, operator, right)
        if problem.held_out() == held_out:
            return problem


def make_arithmetic(rng: random.Random, *, held_out: bool) -> Document:
    """Four to twelve worked problems, one a line."""
    pieces: list[Piece] = []
    for _ in range(rng.randint(4, 12)):
        problem = make_arithmetic_problem(rng, held_out=held_out)
        pieces += [(problem.given(), False), (problem.working() + "\n", True)]
    return Document.from_pieces(pieces)
