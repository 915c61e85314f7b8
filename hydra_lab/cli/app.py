"""The commands, assembled."""

from typing import Annotated

import typer

import hydra_lab
from hydra_lab.cli import bench, lab, model, probe, training
from hydra_lab.cli.rules import Commands

app = typer.Typer(
    name="hydra-lab",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Example: hydra-lab generate demo 'Q: capital of France? A:'",
)


def _show_version(value: bool) -> None:
    if value:
        print(f"hydra-lab {hydra_lab.__version__}")
        raise typer.Exit


@app.callback()
def hydra(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop."),
    ] = False,
) -> None:
    """Train, read and overwrite a Hydra language model."""


for _commands in (model.commands, training.commands, lab.commands, probe.commands, bench.commands):
    app.add_typer(_commands)


def main() -> None:
    """Entry point of the `hydra-lab` program."""
    app()
