"""The lessons run: solved from top to bottom in time, and as a student gets them up to the exercises."""

import time

import pytest

from hydra_lab.course.build import DIRECTORY, solutions_notebook, student_notebook
from hydra_lab.course.execution import run
from hydra_lab.course.lesson import Lesson, exercises, find_lessons, has_tag

LESSONS = find_lessons(DIRECTORY)
SECONDS = 90
"""What a lesson may take beside another one on two cores."""
UNSOLVED = {"NotImplementedError", "NotYet", "NameError"}

every_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long experiments at their small size, on one thread, in the kernel that inherits this environment."""
    monkeypatch.setenv("HYDRA_LAB_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@every_lesson
def test_the_solutions_run(lesson: Lesson) -> None:
    started = time.monotonic()
    run(solutions_notebook(lesson), seconds=SECONDS)
    seconds = time.monotonic() - started
    print(f"{lesson.name}: {seconds:.0f} s")
    assert seconds < SECONDS


@every_lesson
def test_a_student_is_stopped_by_every_exercise_and_by_nothing_else(lesson: Lesson) -> None:
    notebook = run(student_notebook(lesson), seconds=SECONDS, allow_errors=True)
    failed: dict[int, str] = {}
    number = -1
    for index, cell in enumerate(notebook.cells):
        number += has_tag(cell, "exercise")
        for output in cell.get("outputs", []):
            if output.output_type != "error":
                continue
            assert has_tag(cell, "exercise") or has_tag(cell, "check"), (
                f"cell {index} is no exercise and failed: {output.ename}: {output.evalue}\n{cell.source}"
            )
            assert output.ename in UNSOLVED, f"cell {index}: {output.ename}: {output.evalue}"
            failed[number] = output.ename
    names = [exercise.name for exercise in exercises(lesson)]
    solved = [name for index, name in enumerate(names) if index not in failed]
    assert not solved, f"these exercises pass unsolved: {solved}"
