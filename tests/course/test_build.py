"""What is generated from a small lesson."""

import json
from pathlib import Path

import nbformat
import pytest

from hydra_lab.course.build import build, solutions_notebook, student_notebook
from hydra_lab.course.execution import executed
from hydra_lab.course.lesson import (
    LessonError,
    exercises,
    read_lesson,
    table,
    with_solution,
    without_solution,
)

SOURCE = """# %% [markdown]
# # 3. Adding
#
# **Goal:** add two
# numbers · **Minutes:** 5 · **Difficulty:** easy

# %% [markdown]
# ## Sums

# %% tags=["predict"]
from hydra_lab.course import check, passed, predict

sums = predict("What is 1 + 1?", ["2", "3 (three)"])

# %%
import plotly.graph_objects as go
from IPython.display import display
import ipywidgets

display(go.Figure(go.Scatter(y=[1, 2])))
display(ipywidgets.VBox([ipywidgets.IntSlider()]))

# %% [markdown]
# ### Exercise 3.1: a sum

# %% tags=["exercise"]
def add(a, b):
    # BEGIN SOLUTION: return the sum, "a + b"
    total = a + b

    return total
    # END SOLUTION

# %% tags=["check"]
check(add(1, 2) == 3, "Is it a sum?")
passed("3.1")

# %% [markdown]
# ## Where this breaks
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "03_adding.py"
    path.write_text(SOURCE)
    return path


def code_of(notebook: nbformat.NotebookNode, tag: str) -> list[str]:
    return [cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_a_lesson_is_read_from_its_first_cell(source):
    lesson = read_lesson(source)
    assert (lesson.number, lesson.title, lesson.goal, lesson.minutes, lesson.difficulty) == (
        3, "Adding", "add two numbers", 5, "easy",
    )  # fmt: skip
    assert [exercise.name for exercise in exercises(lesson)] == ["3.1"]
    assert "| 3 | [Adding](03_adding.ipynb) | add two numbers | 5 | easy |" in table([lesson])


@pytest.mark.parametrize(
    "part, instead, message",
    [
        ("# # 3. Adding", "# Adding", "must begin with"),
        ("# # 3. Adding", "# # 4. Adding", "the title says lesson 4"),
        ("· **Minutes:** 5 ", "", r"needs `\*\*Goal"),
        ("# ### Exercise 3.1: a sum", "# Do it.", "without its own heading"),
        ("# BEGIN SOLUTION: return", "# SOLUTION: return", "has no # BEGIN SOLUTION"),
        ('# %% tags=["check"]', "# %%", "not followed by its check"),
    ],
)
def test_a_lesson_against_the_format_is_refused(source, part, instead, message):
    source.write_text(SOURCE.replace(part, instead))
    with pytest.raises(LessonError, match=rf"03_adding\.py: .*{message}"):
        exercises(read_lesson(source))


def test_the_student_gets_the_task_and_the_folded_solution_below_the_check(source):
    notebook = student_notebook(read_lesson(source))
    (code,) = code_of(notebook, "exercise")
    assert (
        code == 'def add(a, b):\n    raise NotImplementedError("exercise 3.1: return the sum, \\"a + b\\"")'
    )
    sources = [cell.source for cell in notebook.cells]
    below = sources[sources.index(code_of(notebook, "check")[0]) + 1]
    assert below.startswith("<details>\n<summary>Solution</summary>\n\n```python\ndef add(a, b):\n    total")
    assert "SOLUTION" not in below


def test_the_solutions_are_folded_and_run(source):
    notebook = solutions_notebook(read_lesson(source))
    folded = [
        cell.source for cell in notebook.cells if cell.metadata.get("jupyter") == {"source_hidden": True}
    ]
    assert folded == ["def add(a, b):\n    total = a + b\n\n    return total"]
    namespace: dict = {}
    exec(folded[0], namespace)
    assert namespace["add"](1, 2) == 3


def test_a_value_is_an_exercise_too():
    code = "shape = (\n    2,\n)\n# BEGIN SOLUTION: the product\nproduct = 6\n# END SOLUTION"
    assert without_solution(code, "1.1").endswith(')\nraise NotImplementedError("exercise 1.1: the product")')
    assert with_solution(code).endswith(")\nproduct = 6")


def test_cells_keep_their_names_when_another_one_changes(source):
    before = student_notebook(read_lesson(source))
    source.write_text(SOURCE.replace("## Sums", "## More sums"))
    after = student_notebook(read_lesson(source))
    changed = [a.source for a, b in zip(after.cells, before.cells, strict=True) if a.id != b.id]
    assert changed == ["## More sums"]


def test_the_slides_follow_the_headings(source):
    slides = [cell.metadata.slideshow.slide_type for cell in student_notebook(read_lesson(source)).cells]
    assert slides == ["slide", "slide", "subslide", "-", "subslide", "-", "-", "notes", "slide"]


def test_building_twice_writes_the_same_bytes_and_the_table(source):
    readme = source.with_name("README.md")
    readme.write_text("# Lessons\n<!-- lessons -->\nold\n<!-- end of lessons -->\nThe end.\n")
    first = {path: path.read_bytes() for path in build(source.parent)}
    assert {path: path.read_bytes() for path in build(source.parent)} == first
    assert [path.relative_to(source.parent).as_posix() for path in first] == [
        "03_adding.ipynb", "solutions/03_adding.ipynb", "README.md",
    ]  # fmt: skip
    assert "(03_adding.ipynb)" in readme.read_text() and "old" not in readme.read_text()
    assert readme.read_text().endswith("<!-- end of lessons -->\nThe end.\n")
    notebook = json.loads((source.parent / "03_adding.ipynb").read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "jupytext" not in notebook["metadata"], "saving the notebook would overwrite its source"


@pytest.mark.notebook
def test_an_executed_lesson_shows_pictures_and_no_dead_control(source):
    notebook = executed(student_notebook(read_lesson(source)))
    outputs = [output.data for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [sorted(data) for data in outputs] == [
        ["text/plain"],
        ["application/vnd.plotly.v1+json", "image/png"],
        ["text/plain"],
    ]
    assert outputs[0]["text/plain"].startswith("Predict: What is 1 + 1?")
    assert outputs[2]["text/plain"] == "Run this cell to use its controls."
