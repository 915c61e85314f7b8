"""Commands of the lab: `capture`, `probe`, `dashboard` and `notebook`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hydra_lab.cli.rules import (
    BadInput,
    Intervene,
    InterveneFile,
    checkout,
    interventions,
    load_model,
    print_json,
    require,
    without_progress_bars,
)

commands = typer.Typer()

TOUR = "00_tour.ipynb"


@commands.command(
    epilog="Example: hydra-lab capture demo notes.txt articles.jsonl --out run.zarr",
)
def capture(
    model: Annotated[str, typer.Argument(help="`demo`, or a directory with a config.json.")],
    files: Annotated[
        list[Path], typer.Argument(help="Text, JSONL with text and domain, or a directory per domain.")
    ],
    out: Annotated[Path, typer.Option(help="Capture to write, by custom NAME.zarr.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass; changes no result.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 512,
    signal: Annotated[
        list[str] | None, typer.Option(help="Group of decisions to keep; may be repeated. (default: all)")
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")] = None,
    intervene: Intervene = None,
    intervene_file: InterveneFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last committed batch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Record every decision of a model on files of text, as xarray groups in a Zarr directory."""
    require("xarray", "zarr")
    from hydra_lab.capture import capture_files
    from hydra_lab.capture.sources import find_sources
    from hydra_lab.interventions import intervened

    if out.exists() and not resume:
        raise BadInput(f"{out} exists already; --resume goes on with it, another --out starts anew")
    find_sources(files)  # a mistyped name should not have to wait for the model
    changes = interventions(intervene, intervene_file)
    loaded, tokenizer = load_model(model)
    with intervened(loaded, *changes):
        result = capture_files(
            loaded,
            tokenizer,
            files,
            out,
            batch_size=batch_size,
            sequence_length=sequence_length,
            signals=signal or None,
            resume=resume,
            limit_tokens=limit_tokens,
            progress=not as_json,
        )
    summary = {
        "capture": str(out),
        "samples": int(result.attributes["committed"]),
        "tokens": int(result.attributes["num_tokens"]),
        "groups": list(result.groups),
        "domains": list(result.attributes["domains"]),
    }
    if as_json:
        print_json(summary)
    else:
        print(
            f"{out}: {summary['tokens']:,} tokens in {summary['samples']:,} samples, {', '.join(result.groups)}"
        )


def studies() -> list[str]:
    """Names of the probes of this checkout, as the command line writes them."""
    return sorted(run.parent.name.replace("_", "-") for run in checkout("probes").glob("*/run.py"))


@commands.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: hydra-lab probe expert-specialization demo --out results",
)
def probe(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="A folder of probes/, such as expert-specialization.")],
    model: Annotated[str, typer.Argument(help="`demo`, or a directory with a config.json.")],
    out: Annotated[Path, typer.Option(help="Directory for result.json, the figures and the report.")],
) -> None:
    """Put one research question to a model. Further options go to the study: see its README."""
    from importlib import import_module

    from hydra_lab.loading import model_directory

    if study not in studies():
        raise BadInput(f"no study {study!r}: there are {', '.join(studies())}")
    model_directory(model)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is not a directory")
    root = str(checkout("probes").parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    without_progress_bars()
    run = import_module(f"probes.{study.replace('-', '_')}.run")
    raise typer.Exit(run.main([model, "--out", str(out), *context.args]))


@commands.command(epilog="Example: hydra-lab dashboard demo run.zarr --port 8600")
def dashboard(
    shown: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL|RUN.zarr]...", help="What to show. (default: demo)")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 8501.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Open the dashboard on 127.0.0.1."""
    require("streamlit", "plotly", "zarr")
    app = checkout("dashboards") / "app.py"
    for each in shown or []:
        _check_shown(each)
    options = ["--server.address", "127.0.0.1", "--browser.gatherUsageStats", "false"]
    options += ["--server.headless", "false" if browser else "true"]
    if port is not None:
        options += ["--server.port", str(port)]
    become("streamlit", "run", str(app), *options, "--", *(shown or []))


def _check_shown(name: str) -> None:
    from hydra_lab.loading import model_directory

    if (Path(name) / "zarr.json").is_file():
        return
    try:
        model_directory(name)
    except ValueError:
        raise BadInput(f"{name!r} is neither a model nor a capture (a directory with a zarr.json)") from None


@commands.command(epilog="Example: hydra-lab notebook --no-browser")
def notebook(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 8888.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Open the guided tour in JupyterLab, on 127.0.0.1."""
    require("jupyterlab", "ipywidgets", "plotly")
    options = ["--ServerApp.ip=127.0.0.1"]
    if port is not None:
        options.append(f"--ServerApp.port={port}")
    if not browser:
        options.append("--no-browser")
    if os.geteuid() == 0:
        options.append("--allow-root")  # as in a container; it listens on this machine only and wants a token
    become("jupyterlab", str(checkout("notebooks") / TOUR), *options)


def become(module: str, *arguments: str) -> None:
    """Replace this process by `python -m module`, so that signals reach the server itself."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
