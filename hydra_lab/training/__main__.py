"""`python -m hydra_lab.training --preset demo --corpus DIR --out DIR`: train without the rest of the command
line."""

import argparse
import sys
from pathlib import Path

import transformers

from hydra_lab.training.presets import PRESETS
from hydra_lab.training.run import train


def main(arguments: list[str] | None = None) -> int:
    """Run `train` with options from the command line; 0 when the run is finished, 3 when a signal stopped
    it."""
    parser = argparse.ArgumentParser(prog="python -m hydra_lab.training", description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--corpus", type=Path, required=True, help="corpus directory")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument(
        "--max-steps", type=int, help="steps of the whole run; fewer on a resume make the decay begin at once"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init-from", type=Path, help="model directory to start from")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # one per saved file; the run's own bar is enough
    try:
        result = train(**vars(options))
    except ValueError as error:
        parser.error(str(error))
    ending = f"model in {result.model}" if result.finished else "stopped; go on with --resume"
    print(f"step {result.step}: {ending}")
    return 0 if result.finished else 3


if __name__ == "__main__":
    sys.exit(main())
