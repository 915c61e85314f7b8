"""Commands of the lab: `capture`, `dashboard` and `notebook`."""

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
)

commands = typer.Typer()


@commands.command(
    epilog="Example: hydra-lab capture demo notes.txt articles.jsonl --out run.zarr --workers 2",
)
def capture(
    model: Annotated[str, typer.Argument(help="`demo`, or a directory with a config.json.")],
    files: Annotated[
        list[Path], typer.Argument(help="Text, JSONL with text and domain, or a directory per domain.")
    ],
    out: Annotated[Path, typer.Option(help="Capture to write, by custom NAME.zarr.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass; changes no result.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 512,
    signals: Annotated[
        list[str] | None,
        typer.Option(
            "--signal",
            "--signals",
            help="Group of decisions to keep, `mass` among them for where attention went, or `summary` for the running "
            "summary of all; may be repeated. (default: all but mass, and the summary)",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Run on this many processes; changes no result.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on the Dask cluster there, tcp://host:port.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a forward pass. (default: a fair share)")
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")] = None,
    intervene: Intervene = None,
    intervene_file: InterveneFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last committed batch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Record every decision of a model on files of text, as xarray groups in a Zarr directory."""
    require("xarray", "zarr")
    if workers is not None or scheduler is not None:
        require("dask", "distributed")
    from hydra_lab.capture import capture_files
    from hydra_lab.capture.sources import find_sources

    if out.exists() and not resume:
        raise BadInput(f"{out} exists already; --resume goes on with it, another --out starts anew")
    find_sources(files)  # a mistyped name should not have to wait for the model
    changes = interventions(intervene, intervene_file)
    loaded, tokenizer = load_model(model)
    result = capture_files(
        loaded,
        tokenizer,
        files,
        out,
        batch_size=batch_size,
        sequence_length=sequence_length,
        signals=signals or None,
        interventions=changes,
        workers=workers,
        scheduler=scheduler,
        threads=threads,
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
        "interventions": [str(change) for change in changes],
    }
    if as_json:
        print_json(summary)
    else:
        print(
            f"{out}: {summary['tokens']:,} tokens in {summary['samples']:,} samples, {', '.join(result.groups)}"
        )


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


@commands.command(epilog="Example: hydra-lab notebook 05 --no-browser")
def notebook(
    lesson: Annotated[
        str, typer.Argument(help="A lesson by number (05, 5) or name (05_chunk_experts); 0 is the tour.")
    ] = "0",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 8888.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Open the guided tour, or another lesson, in JupyterLab on 127.0.0.1."""
    require("jupyterlab", "ipykernel", "ipywidgets", "plotly")
    folder = checkout("notebooks")
    opened = _find_lesson(folder, lesson)
    options = ["--ServerApp.ip=127.0.0.1", f"--LabApp.default_url=/lab/tree/{opened.name}"]
    if port is not None:
        options.append(f"--ServerApp.port={port}")
    if not browser:
        options.append("--no-browser")
    if os.geteuid() == 0:
        options.append("--allow-root")  # as in a container; it listens on this machine only and wants a token
    _prefer_own_kernel()
    become("jupyterlab", str(opened), *options)


def _prefer_own_kernel() -> None:
    """Make the kernel `python3` this environment's, though the user may have installed another one of that name.

    Jupyter looks along JUPYTER_PATH first, and starts a kernel whose command is `python` with its own interpreter.
    """
    own = str(Path(sys.prefix) / "share" / "jupyter")
    others = [each for each in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if each not in ("", own)]
    os.environ["JUPYTER_PATH"] = os.pathsep.join([own, *others])


def _find_lesson(folder: Path, lesson: str) -> Path:
    """The student's notebook of a lesson.

    Raises:
        BadInput: there is no such lesson, or more than one.
    """
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if lesson.isdecimal():
        found = [path for path in notebooks if int(path.name[:2]) == int(lesson)]
    else:
        found = [path for path in notebooks if lesson.removesuffix(".ipynb") in (path.stem, path.stem[3:])]
    if len(found) != 1:
        raise BadInput(
            f"there is no lesson {lesson!r}; there are {', '.join(path.stem for path in notebooks)}"
        )
    return found[0]


def become(module: str, *arguments: str) -> None:
    """Replace this process by `python -m module`, so that signals reach the server itself."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
