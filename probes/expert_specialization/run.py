"""Which expert prefers which domain and token class, and does it matter? See README.md.

python probes/expert_specialization/run.py demo --out DIR
hydra-lab probe expert-specialization demo --out DIR
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script: the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import PreTrainedTokenizerBase

from hydra_lab import figures
from hydra_lab.capture.path_use import path_use_of_samples, scored_tokens
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.samples import Samples, samples_from_corpus, samples_from_texts
from hydra_lab.loading import load, model_directory
from hydra_lab.modeling import HydraForCausalLM
from probes.expert_specialization import analysis, drawings, measure, report
from probes.expert_specialization.settings import Settings, load_settings

_FEWEST_SAMPLES = 4  # per domain: two that measure preference and two that measure cost


def run_study(
    model: HydraForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    out: str | Path,
    settings: Settings,
    *,
    name: str = "",
    progress: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Run the study and write result.json, report.html and figures/ into `out`.

    Args:
        samples: held-out rows of at least two domains, at least four of each.
        name: of the model, for the report.
        progress: receives a line as each step begins, and whether PNG files were written.

    Returns:
        what result.json holds.

    Raises:
        ValueError: the model has no experts, or there are too few samples.
    """
    out = Path(out)
    if not model.config.layers_with("moe"):
        raise ValueError("this model has no block with experts, so there is nothing to study")
    samples = samples.take(np.flatnonzero(scored_tokens(samples) > 0))
    _check_enough(samples)
    batch_size, seed = settings.batch_size, settings.seed
    resampling = {"num_resamplings": settings.num_resamplings, "seed": seed}
    preferring_rows, costing_rows = _halves(samples)
    costing = samples.take(costing_rows)
    classes = measure.token_classes(tokenizer)

    progress(f"routing of {len(samples)} samples")
    observation = measure.observe(model, samples, classes, batch_size=batch_size)
    progress("tests of dependence")
    association = analysis.associate(observation, **resampling)
    random = []
    for number in range(settings.num_controls):
        progress(f"random router {number + 1} of {settings.num_controls}")
        other = measure.with_random_routers(model, seed + number)
        random.append(measure.observe(other, samples, classes, batch_size=batch_size))
    controls = analysis.control(random, **resampling)
    increase = measure.ablate(
        model,
        costing,
        measure.observe(model, costing, classes, batch_size=batch_size),
        batch_size=batch_size,
        progress=progress,
    )
    progress("comparison with the ablations")
    causation = analysis.compare_with_ablation(
        measure.observe(model, samples.take(preferring_rows), classes, batch_size=batch_size),
        increase,
        costing.domains,
        **resampling,
    )
    use = path_use_of_samples(model, costing, batch_size=batch_size, progress=progress)
    verdicts = analysis.verdicts(association, controls, causation, use, alpha=settings.alpha)

    out.mkdir(parents=True, exist_ok=True)
    found = report.result(name, settings, association, controls, causation, use, verdicts)
    report.write_json(found, out / "result.json")
    drawn = drawings.draw(association, controls, causation, use, alpha=settings.alpha)
    html_paths = figures.write_html(drawn, out / "figures")
    try:
        progress("images")
        png_paths = figures.write_png(drawn, out / "figures")
    except figures.NoBrowserError as error:
        png_paths = {}
        progress(f"NO PNG FILES WRITTEN: {error}. The HTML figures are complete.")
    report.write_report(found, html_paths, png_paths, out / "report.html")
    return found


def _check_enough(samples: Samples) -> None:
    counts = {domain: samples.domains.count(domain) for domain in dict.fromkeys(samples.domains)}
    few = {domain: count for domain, count in counts.items() if count < _FEWEST_SAMPLES}
    if len(counts) < 2:
        raise ValueError(
            f"the samples are of one domain ({', '.join(counts)}); the study compares at least two"
        )
    if few:
        told = ", ".join(f"{domain} {count}" for domain, count in few.items())
        raise ValueError(f"too few samples ({told}): each domain needs at least {_FEWEST_SAMPLES}")


def _halves(samples: Samples) -> tuple[list[int], list[int]]:
    """Every domain's samples by turns: those that measure preference, those that measure cost."""
    halves: tuple[list[int], list[int]] = ([], [])
    seen: dict[str, int] = {}
    for row, domain in enumerate(samples.domains):
        halves[seen.get(domain, 0) % 2].append(row)
        seen[domain] = seen.get(domain, 0) + 1
    return halves


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the study; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="hydra-lab probe expert-specialization",
        description="Which expert prefers which domain and token class, and does it matter?",
        epilog="Example: hydra-lab probe expert-specialization demo --out results",
    )
    parser.add_argument("model", help="`demo`, or a directory with a config.json")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for result.json, report.html and figures/"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        help="held-out text of this training corpus instead of the samples that came with the model",
    )
    parser.add_argument("--samples", type=int, dest="samples_per_domain", help="most samples per domain")
    parser.add_argument("--tokens", type=int, dest="num_tokens", help="tokens per sample")
    parser.add_argument("--resamplings", type=int, dest="num_resamplings", help="permutations and redraws")
    parser.add_argument("--controls", type=int, dest="num_controls", help="random routers to compare with")
    parser.add_argument("--seed", type=int)
    options = vars(parser.parse_args(arguments))
    name, out, corpus = options.pop("model"), options.pop("out"), options.pop("corpus")
    try:
        settings = load_settings(**options)
        directory = model_directory(name)
        model, tokenizer = load(name)
        size = {"num_tokens": settings.num_tokens, "num_samples": settings.samples_per_domain}
        if corpus is not None:
            samples = samples_from_corpus(corpus, **size)
        else:
            texts = read_sample_texts(directory)
            if not texts:
                raise ValueError(f"{directory} has no samples.jsonl; give held-out text with --corpus")
            samples = samples_from_texts(texts, tokenizer, **size)
        found = run_study(
            model,
            tokenizer,
            samples,
            out,
            settings,
            name=name,
            progress=lambda line: print(line, file=sys.stderr),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for block in found["blocks"]:
        print(f"block {block['block']}: {block['verdict']}")
    print(f"report: {out / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
