"""The command that trains: `train`."""

from pathlib import Path
from typing import Annotated

import typer

from hydra_lab.cli.rules import BadInput, print_json, say, without_progress_bars

commands = typer.Typer()

STOPPED = 3
"""Exit code of a run that a signal stopped before its end; --resume goes on."""


@commands.command(epilog="Example: hydra-lab train --preset demo --out runs/demo")
def train(
    out: Annotated[
        Path, typer.Option(help="Directory of the run: checkpoints, log, and at the end the model.")
    ],
    preset: Annotated[
        str, typer.Option(help="What to train: nano, demo, demo-lookups, 29m or 1.6b.")
    ] = "demo",
    corpus: Annotated[Path, typer.Option(help="Training corpus; built there first if it is absent.")] = Path(
        "runs/corpus"
    ),
    without_plays: Annotated[
        bool, typer.Option("--without-plays", help="Build the corpus without Shakespeare: needs no network.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    init_from: Annotated[Path | None, typer.Option(help="Model directory to start from.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of the whole run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the data order and the corpus.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a model by a preset: paths join one after another; a kill loses nothing past the last checkpoint.

    TensorBoard shows the run: tensorboard --logdir OUT. Exit code 3 means stopped by a signal.
    """
    from hydra_lab import training
    from hydra_lab.training.presets import PRESETS

    if preset not in PRESETS:
        raise BadInput(f"no training preset {preset!r}: there are {', '.join(PRESETS)}")
    if device not in ("cpu", "cuda"):
        raise BadInput(f"--device {device!r} is not one of cpu, cuda")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is not a directory")
    if not (corpus / "manifest.json").is_file():
        _build(corpus, seed, plays=not without_plays)
    without_progress_bars()
    result = training.train(
        preset,
        out,
        corpus=corpus,
        resume=resume,
        max_steps=max_steps,
        seed=seed,
        init_from=init_from,
        threads=threads,
        device=device,
    )
    if as_json:
        print_json({"step": result.step, "finished": result.finished, "model": result.model})
    elif result.finished:
        print(f"step {result.step}: the model is in {result.model}")
    else:
        print(f"stopped at step {result.step}; the same command with --resume goes on")
    if not result.finished:
        raise typer.Exit(STOPPED)


def _build(corpus: Path, seed: int, *, plays: bool) -> None:
    from hydra_lab.data.build import build_corpus

    if corpus.exists() and any(corpus.iterdir()):
        raise BadInput(
            f"--corpus {corpus} holds files but no manifest.json: not a corpus, or one that was not finished"
        )
    say(f"building the corpus in {corpus}")
    try:
        build_corpus(corpus, seed, plays=plays, progress=say)
    except LookupError as error:
        raise BadInput(f"{error} (--without-plays builds the corpus without it)") from error
