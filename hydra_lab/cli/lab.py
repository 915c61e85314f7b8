"""Commands of the lab: `capture`, `probe`, `dashboard` and `notebook`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hydra_lab.cli.rules import (
    BadInput,
    checkout,
    load_model,
    print_json,
    require,
    say,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last committed batch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Record every decision of a model on files of text, as xarray groups in a Zarr directory."""
    require("xarray", "zarr")
    from hydra_lab.capture import capture_files
    from hydra_lab.capture.sources import find_sources

    if out.exists() and not resume:
        raise BadInput(f"{out} exists already; --resume goes on with it, another --out starts anew")
    find_sources(files)  # a mistyped name should not have to wait for the model
    loaded, tokenizer = load_model(model)
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


@commands.command(
    epilog="Example: hydra-lab probe expert-specialization demo --out results --set num_controls=3",
)
def probe(
    study: Annotated[
        str, typer.Argument(help="A folder of probes/ (expert-specialization); or all, list or calibrate.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="`demo`, or a directory with a config.json; for calibrate, the studies (all)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for result.json, the figures and the report.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Held-out text of this training corpus instead of the model's own samples."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to run and combine.")] = 1,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the study; may be repeated."),
    ] = None,
    cases: Annotated[
        int, typer.Option(min=1, help="calibrate: models with planted structure, and as many without.")
    ] = 200,
    workers: Annotated[int, typer.Option(min=1, help="calibrate: worker processes.")] = 1,
) -> None:
    """Put research questions to a model, and report what can be claimed.

    `list` names the studies; `calibrate` puts them to small models whose truth is known and records how often they are
    right, in the file that every report quotes (or in --out DIR/calibration.json).
    """
    root = checkout("probes").parent
    if study == "list":
        _list_studies(root)
    elif study == "calibrate":
        _calibrate(root, model or "all", out, cases, workers)
    else:
        _run_studies(root, study, model, out, corpus, seed, seeds, setting or [])


def _list_studies(root: Path) -> None:
    from hydra_lab.probing import runner

    for name in runner.study_names(root):
        print(f"{name}: {runner.find_study(root, name).question}")


def _chosen_studies(root: Path, name: str) -> list[str]:
    from hydra_lab.probing import runner

    names = runner.study_names(root)
    if name != "all" and name not in names:
        raise BadInput(f"no study {name!r}: there are {', '.join(names)}; or all, list, calibrate")
    return names if name == "all" else [name]


def _run_studies(
    root: Path,
    study: str,
    model: str | None,
    out: Path | None,
    corpus: Path | None,
    seed: int,
    num_seeds: int,
    words: list[str],
) -> None:
    require("plotly", "sklearn")
    import torch

    from hydra_lab.bench.environment import describe_environment
    from hydra_lab.loading import model_directory
    from hydra_lab.probing import calibrate, report, runner
    from hydra_lab.probing.settings import parse_overrides

    names = _chosen_studies(root, study)
    if model is None or out is None:
        raise BadInput(f"a model and --out are needed: hydra-lab probe {study} demo --out DIR")
    model_directory(model)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is not a directory")
    overrides = parse_overrides(words)
    without_progress_bars()
    calibrations = calibrate.read_calibrations()
    outdated = [
        name
        for name, record in calibrations.items()
        if name in names and record.source != calibrate.source_digest(root, name)
    ]

    def finished(run: runner.StudyRun) -> None:
        folder = out / run.result.study
        runner.write_run(run, folder, progress=lambda line: say(f"{run.result.study}: {line}"))
        report.write_report(folder / "report.html", [run], calibrations=calibrations, outdated=outdated)
        print(f"{run.result.study}: {report.verdict_in_a_sentence(run.result)}", flush=True)

    done = runner.run_studies(
        root,
        names,
        model,
        overrides=overrides,
        corpus=corpus,
        seed=seed,
        num_seeds=num_seeds,
        environment=describe_environment(torch.device("cpu")),
        progress=say,
        finished=finished,
    )
    if study != "all":
        reasons = done.skipped | done.failed
        if reasons:
            raise BadInput(f"{study}: {reasons[study]}")
        print(f"report: {out / study / 'report.html'}")
        return
    if done.runs:
        report.write_report(
            out / "report.html",
            done.runs,
            calibrations=calibrations,
            skipped=done.skipped,
            failed=done.failed,
            outdated=outdated,
            figures_at={run.result.study: f"{run.result.study}/figures" for run in done.runs},
        )
        print(f"report: {out / 'report.html'}")
    if done.failed:
        raise BadInput("; ".join(f"{name}: {reason}" for name, reason in done.failed.items()))


def _calibrate(root: Path, study: str, out: Path | None, cases: int, workers: int) -> None:
    require("plotly", "sklearn")
    import torch

    from hydra_lab.bench.environment import describe_environment
    from hydra_lab.probing import calibrate

    path = calibrate.RESULT_FILE if out is None else out / calibrate.RESULT_FILE.name
    records = calibrate.calibrate(
        root,
        _chosen_studies(root, study),
        num_planted=cases,
        num_absent=cases,
        workers=workers,
        path=path,
        environment=describe_environment(torch.device("cpu")),
        progress=say,
    )
    for record in records.values():
        print(calibrate.describe(record))
    print(f"kept in {path}")
    failed = [name for name, record in records.items() if not record.passed]
    if failed:
        raise BadInput(f"failed the calibration: {', '.join(failed)}")


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
