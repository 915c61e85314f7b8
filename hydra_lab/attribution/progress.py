"""A progress bar on standard error, or a caller's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = bool | Callable[[int, int], None]
"""True for a bar, False for none, or a function that receives how many steps are done and how many there are."""


@contextmanager
def counting(label: str, total: int, progress: Report) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of steps that were just done."""
    done = 0
    if callable(progress):
        told = progress

        def tell(steps: int) -> None:
            nonlocal done
            done += steps
            told(done, total)

        yield tell
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)
