"""The `probe` command: put research questions to a model, and calibrate the studies that ask them."""

from pathlib import Path
from typing import Annotated

import typer

from hydra_lab.cli.rules import OUR_ERROR, BadInput, checkout, require, say, without_progress_bars

commands = typer.Typer()


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
        say(f"failed the calibration: {', '.join(failed)}")
        raise typer.Exit(OUR_ERROR)
