"""A lesson as its py:percent source says it: heading, cells, exercises and their solutions."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jupytext
from nbformat import NotebookNode

TITLE = re.compile(r"# (\d+)\. (.+)")
GOAL = re.compile(r"\*\*Goal:\*\* (.+?) · \*\*Minutes:\*\* (\d+) · \*\*Difficulty:\*\* (easy|medium|hard)")
EXERCISE = re.compile(r"^### Exercise (\d+\.\d+): (.+)$", re.MULTILINE)
SOLUTION = re.compile(
    r"^(?P<indent>[ \t]*)# BEGIN SOLUTION: (?P<task>.+)\n(?P<body>(?:.*\n)*?)[ \t]*# END SOLUTION[ \t]*$",
    re.MULTILINE,
)


class LessonError(ValueError):
    """A lesson's source does not follow the format; the message names the file and what is missing."""


@dataclass(frozen=True)
class Lesson:
    """One lesson.

    Attributes:
        source: its py:percent file, `NN_name.py`.
        number, title, goal, minutes, difficulty: from its first cell; difficulty is easy, medium or hard.
        notebook: the source as jupytext reads it, solutions and all.
    """

    source: Path
    number: int
    title: str
    goal: str
    minutes: int
    difficulty: str
    notebook: NotebookNode

    @property
    def name(self) -> str:
        """`NN_name`, the stem of all its files."""
        return self.source.stem


def read_lesson(source: str | Path) -> Lesson:
    """Read one lesson.

    Raises:
        LessonError: the first cell lacks its title or its line of goal, minutes and difficulty, or its number is
            not that of the file's name.
    """
    source = Path(source)
    notebook = jupytext.read(source)
    first = notebook.cells[0].source if notebook.cells else ""
    title = TITLE.match(first)
    if title is None:
        raise LessonError(f"{source.name}: the first cell must begin with `# N. Title`")
    goal = GOAL.search(" ".join(first.split()))
    if goal is None:
        raise LessonError(
            f"{source.name}: the first cell needs `**Goal:** ... · **Minutes:** 20 · **Difficulty:** easy|medium|hard`"
        )
    if source.name[:2] != f"{int(title[1]):02d}":
        raise LessonError(f"{source.name}: the title says lesson {title[1]}")
    return Lesson(source, int(title[1]), title[2].strip(), goal[1], int(goal[2]), goal[3], notebook)


def find_lessons(directory: str | Path) -> list[Lesson]:
    """The lessons of a directory, by number."""
    return [read_lesson(source) for source in sorted(Path(directory).glob("[0-9][0-9]_*.py"))]


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell is tagged `predict`, `exercise` or `check`."""
    return tag in cell.metadata.get("tags", [])


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson.

    Attributes:
        name: "3.2" for the second one of lesson 3.
        cell, check: indices of its two cells in the lesson's source.
    """

    name: str
    cell: int
    check: int


def exercises(lesson: Lesson) -> list[Exercise]:
    """The exercises of a lesson, in its order.

    Raises:
        LessonError: a heading `### Exercise N.k: title`, the solution's marks or the check cell is missing.
    """
    found: list[Exercise] = []
    heading: str | None = None
    cells = lesson.notebook.cells
    for index, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            headings = EXERCISE.findall(cell.source)
            heading = headings[-1][0] if headings else heading
        elif has_tag(cell, "exercise"):
            if heading is None:
                raise LessonError(
                    f"{lesson.source.name}: cell {index} is an exercise without its own heading"
                )
            if not SOLUTION.search(cell.source):
                raise LessonError(
                    f"{lesson.source.name}: exercise {heading} has no # BEGIN SOLUTION: <what to write>"
                )
            if index + 1 == len(cells) or not has_tag(cells[index + 1], "check"):
                raise LessonError(
                    f"{lesson.source.name}: exercise {heading} is not followed by its check cell"
                )
            found.append(Exercise(heading, index, index + 1))
            heading = None
    return found


def without_solution(code: str, exercise: str) -> str:
    """An exercise's code as a student gets it: each solution is a `raise NotImplementedError` that says what to
    write."""

    def task(match: re.Match[str]) -> str:
        message = f"exercise {exercise}: {match['task'].strip()}"
        quoted = message.replace("\\", "\\\\").replace('"', '\\"')
        return f'{match["indent"]}raise NotImplementedError("{quoted}")'

    return SOLUTION.sub(task, code)


def with_solution(code: str) -> str:
    """An exercise's code solved, without the marks around the solution."""
    return SOLUTION.sub(lambda match: match["body"].removesuffix("\n"), code)


def table(lessons: Iterable[Lesson]) -> str:
    """The lessons as a Markdown table."""
    rows = ["| | lesson | you will be able to | minutes | difficulty |", "|---|---|---|---|---|"]
    for lesson in lessons:
        goal = lesson.goal.replace("|", "\\|")
        link = f"[{lesson.title}]({lesson.name}.ipynb)"
        rows.append(f"| {lesson.number} | {link} | {goal} | {lesson.minutes} | {lesson.difficulty} |")
    return "\n".join(rows)
