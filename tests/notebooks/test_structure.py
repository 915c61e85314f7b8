"""Every lesson has what a lesson needs, and its notebooks are what its source says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from hydra_lab.course.build import DIRECTORY, TABLE, solutions_notebook, student_notebook
from hydra_lab.course.lesson import Lesson, exercises, find_lessons, has_tag, table

LESSONS = find_lessons(DIRECTORY)
IDS = [lesson.name for lesson in LESSONS]
TOUR_BYTES = 1_500_000
every_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=IDS)

SHOWS_SOMETHING = re.compile(
    r"figures\.\w+\(|go\.Figure\(|make_subplots\(|widgets\.\w+\(|TokenStrip\(|interact"
)
SOURCE = re.compile(r"arxiv\.org/abs|arXiv[: ]\d{4}\.\d{5}|[Ee]quation \(?\d|[Ss]ection \d|§ ?\d")
LIBRARY = re.compile(r"^(?:from|import) hydra_lab(?!\.course\b)", re.MULTILINE)


def code(lesson: Lesson) -> str:
    return "\n".join(cell.source for cell in lesson.notebook.cells if cell.cell_type == "code")


def prose(lesson: Lesson) -> str:
    return "\n".join(cell.source for cell in lesson.notebook.cells if cell.cell_type == "markdown")


def test_the_numbers_run_from_the_tour_on_without_a_gap() -> None:
    assert IDS[0] == "00_tour"
    assert [lesson.number for lesson in LESSONS] == list(range(15))
    assert len({lesson.title for lesson in LESSONS}) == len(LESSONS)


@every_lesson
def test_a_prediction_is_made_before_the_measurement_and_revealed_after_it(lesson: Lesson) -> None:
    predictions = [
        (index, match)
        for index, cell in enumerate(lesson.notebook.cells)
        if has_tag(cell, "predict")
        for match in re.findall(r"^(\w+) = predict\(", cell.source, re.MULTILINE)
    ]
    assert predictions, "no cell tagged predict has `name = predict(...)`"
    for index, name in predictions:
        later = [cell.source for cell in lesson.notebook.cells[index + 1 :] if cell.cell_type == "code"]
        assert any(f"{name}.reveal(" in source for source in later), f"{name} is never revealed"
        assert f"{name}.reveal(" not in later[0] or len(later[0].splitlines()) > 1, (
            "nothing is measured in between"
        )


@every_lesson
def test_there_are_two_to_four_exercises_each_with_its_checks(lesson: Lesson) -> None:
    found = exercises(lesson)
    assert [exercise.name for exercise in found] == [f"{lesson.number}.{k + 1}" for k in range(len(found))]
    assert 2 <= len(found) <= 4
    cells = lesson.notebook.cells
    assert sum(has_tag(cell, "exercise") for cell in cells) == len(found)
    assert sum(has_tag(cell, "check") for cell in cells) == len(found)
    for exercise in found:
        checks = cells[exercise.check].source
        assert re.search(r"\bcheck(_close)?\(", checks), f"exercise {exercise.name} checks nothing"
        assert checks.rstrip().endswith(f'passed("{exercise.name}")'), (
            f"exercise {exercise.name} never passes"
        )


@every_lesson
def test_it_says_where_this_breaks_and_what_comes_next(lesson: Lesson) -> None:
    headings = re.findall(r"^## (.+)$", prose(lesson), re.MULTILINE)
    assert headings[-2:] == ["Where this breaks", "Next"]


@every_lesson
def test_it_shows_something_names_its_source_and_uses_the_library(lesson: Lesson) -> None:
    assert SHOWS_SOMETHING.search(code(lesson)), "neither a figure nor a widget"
    assert SOURCE.search(prose(lesson)), "no paper, section or equation is named"
    assert LIBRARY.search(code(lesson)), "nothing of hydra_lab is imported"


def _without_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _read(path: Path) -> nbformat.NotebookNode:
    assert path.is_file(), "write it with `make notebooks`"
    return nbformat.read(path, as_version=4)


@every_lesson
def test_the_notebooks_are_what_the_source_says(lesson: Lesson) -> None:
    student = _read(lesson.source.with_suffix(".ipynb"))
    if lesson.number == 0:
        student = _without_outputs(student)
    assert student == student_notebook(lesson), "write it anew with `make notebooks`"
    solutions = _read(lesson.source.parent / "solutions" / f"{lesson.name}.ipynb")
    assert solutions == solutions_notebook(lesson), "write it anew with `make notebooks`"


def test_no_notebook_is_left_over() -> None:
    stems = {path.stem for folder in (DIRECTORY, DIRECTORY / "solutions") for path in folder.glob("*.ipynb")}
    assert stems == set(IDS)


def test_a_code_host_shows_the_tour_with_its_figures() -> None:
    path = DIRECTORY / "00_tour.ipynb"
    assert path.stat().st_size < TOUR_BYTES
    outputs = [
        output.get("data", {})
        for cell in _read(path).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    drawn = [data for data in outputs if "application/vnd.plotly.v1+json" in data]
    assert len(drawn) >= 2
    assert all("image/png" in data for data in drawn)


def test_the_readme_lists_the_lessons() -> None:
    listed = TABLE.search((DIRECTORY / "README.md").read_text())
    assert listed is not None
    assert listed[0] == table(LESSONS) + "\n", "write it anew with `make notebooks`"


def test_the_readme_s_recipe_removes_the_solutions_and_nothing_else(tmp_path: Path) -> None:
    [recipe] = re.findall(
        r"`(jupyter nbconvert .*RegexRemove.*)`", (DIRECTORY / "README.md").read_text("utf-8")
    )
    command = shlex.split(recipe.replace("handout", str(tmp_path)))
    subprocess.run([sys.executable, "-m", *command], cwd=DIRECTORY.parent, check=True, capture_output=True)
    source = nbformat.read(DIRECTORY.parent / command[-1], as_version=4)
    handout = nbformat.read(tmp_path / Path(command[-1]).name, as_version=4)
    kept = [cell.source for cell in source.cells if not cell.source.startswith("<details>")]
    assert [cell.source for cell in handout.cells] == kept and 2 <= len(source.cells) - len(kept) <= 4
