"""What a lesson shows besides figures: text, the library's own source, and how much time it may take."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def show_bundle(bundle: Mapping[str, Any]) -> None:
    """Display one output in several media types; its "text/plain" is printed where there is no notebook."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        print(bundle["text/plain"])
    else:
        display(dict(bundle), raw=True)


def show_text(markdown: str, plain: str) -> None:
    """Display Markdown in a notebook, its plain form elsewhere."""
    show_bundle({"text/markdown": markdown, "text/plain": plain})


def show_source(shown: Any) -> None:
    """Show the source of a function, class or module as it stands in the library, highlighted, and where that is.

    Raises:
        TypeError: for what has no Python source (a builtin, a number).
    """
    shown = inspect.unwrap(shown) if callable(shown) else shown
    source = inspect.getsource(shown).rstrip()
    first_line = 1 if inspect.ismodule(shown) else inspect.getsourcelines(shown)[1]
    place = f"{_within_project(inspect.getsourcefile(shown) or '')}, line {first_line}"
    show_text(f"`{place}`\n\n````python\n{source}\n````", f"# {place}\n{source}")


def _within_project(file: str) -> str:
    """The path from the package's parent on; the whole of it for another library's file."""
    project = Path(__file__).resolve().parents[2]
    path = Path(file).resolve()
    return path.relative_to(project).as_posix() if path.is_relative_to(project) else path.as_posix()


def quick() -> bool:
    """Whether a lesson should do its long experiments at a small size (the environment's HYDRA_LAB_QUICK=1)."""
    return os.environ.get("HYDRA_LAB_QUICK", "") not in ("", "0")
