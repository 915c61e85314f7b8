"""Write the notebooks of the lessons from their py:percent sources: `python -m hydra_lab.course.build [DIRECTORY]`.

From `NN_name.py` come `NN_name.ipynb`, the student's, and `solutions/NN_name.ipynb`. Neither has outputs, except the
tour, lesson 0, which is executed so that a code host shows its figures.
"""

import argparse
import hashlib
import re
from collections import Counter
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

from hydra_lab.course.lesson import (
    Lesson,
    exercises,
    find_lessons,
    has_tag,
    table,
    with_solution,
    without_solution,
)

DIRECTORY = Path(__file__).resolve().parents[2] / "notebooks"
TABLE = re.compile(r"(?<=<!-- lessons -->\n).*?(?=<!-- end of lessons -->)", re.DOTALL)
"""Where the README holds the table that is written from the sources."""


def student_notebook(lesson: Lesson) -> NotebookNode:
    """The notebook with the exercises open, and the solution folded in a cell below each check."""
    open_cells = {exercise.cell: exercise for exercise in exercises(lesson)}
    checked = {exercise.check: exercise for exercise in open_cells.values()}
    cells = []
    for index, cell in enumerate(lesson.notebook.cells):
        code = cell.source
        if index in open_cells:
            code = without_solution(code, open_cells[index].name)
        cells.append(_cell(cell, code))
        if index in checked:
            solved = with_solution(lesson.notebook.cells[checked[index].cell].source)
            cells.append(_markdown(_folded(solved), slide="notes"))
    return _notebook(cells)


def solutions_notebook(lesson: Lesson) -> NotebookNode:
    """The notebook with the exercises solved and their cells folded."""
    solved = {exercise.cell for exercise in exercises(lesson)}
    cells = []
    for index, source in enumerate(lesson.notebook.cells):
        cell = _cell(source, with_solution(source.source) if index in solved else source.source)
        if index in solved:
            cell.metadata["jupyter"] = {"source_hidden": True}
        cells.append(cell)
    return _notebook(cells)


def _folded(code: str) -> str:
    return f"<details>\n<summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"


def _slide(cell: NotebookNode) -> str:
    """Where a cell stands in the slides: a section begins a slide; a subsection, a prediction or an exercise one
    below it; all else continues."""
    if cell.cell_type == "markdown":
        if cell.source.startswith(("# ", "## ")):
            return "slide"
        return "subslide" if cell.source.startswith("###") else "-"
    return "subslide" if has_tag(cell, "predict") else "-"


def _cell(cell: NotebookNode, source: str) -> NotebookNode:
    if cell.cell_type == "markdown":
        return _markdown(source, slide=_slide(cell))
    metadata: dict[str, object] = {"slideshow": {"slide_type": _slide(cell)}}
    if tags := cell.metadata.get("tags"):
        metadata["tags"] = list(tags)
    return v4.new_code_cell(source, metadata=metadata)


def _markdown(source: str, *, slide: str) -> NotebookNode:
    return v4.new_markdown_cell(source, metadata={"slideshow": {"slide_type": slide}})


def _notebook(cells: list[NotebookNode]) -> NotebookNode:
    """A notebook whose cells are named after their content, so that an edit changes no other cell's name."""
    seen: Counter[str] = Counter()
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell["id"] = f"{digest}-{seen[digest]}" if seen[digest] else digest
        seen[digest] += 1
    metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(notebook)
    return notebook


def build(directory: str | Path = DIRECTORY, *, execute_tour: bool = True) -> list[Path]:
    """Write both notebooks of every lesson in `directory`, and the table in its README.

    Args:
        execute_tour: without it the tour's notebook has no outputs either.

    Returns:
        The files written.

    Raises:
        LessonError: a source does not follow the format.
    """
    directory = Path(directory)
    (directory / "solutions").mkdir(exist_ok=True)
    lessons = find_lessons(directory)
    written = []
    for lesson in lessons:
        student = student_notebook(lesson)
        if lesson.number == 0 and execute_tour:
            from hydra_lab.course.execution import executed

            student = executed(student)
        for notebook, folder in ((student, directory), (solutions_notebook(lesson), directory / "solutions")):
            path = folder / f"{lesson.name}.ipynb"
            nbformat.write(notebook, path)
            written.append(path)
    readme = directory / "README.md"
    if readme.is_file():
        readme.write_text(TABLE.sub(lambda _: table(lessons) + "\n", readme.read_text()))
        written.append(readme)
    return written


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m hydra_lab.course.build", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY, help="default: notebooks/")
    parser.add_argument("--no-execution", action="store_true", help="leave the tour without outputs")
    arguments = parser.parse_args()
    for path in build(arguments.directory, execute_tour=not arguments.no_execution):
        print(path)


if __name__ == "__main__":
    main()
