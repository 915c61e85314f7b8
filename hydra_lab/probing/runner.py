"""Find the studies of a checkout, put them to a model, and write down what they found."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hydra_lab import figures
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.samples import Samples, samples_from_corpus, samples_from_texts
from hydra_lab.loading import load, model_directory
from hydra_lab.probing.combine import combine
from hydra_lab.probing.findings import StudyResult, corrected
from hydra_lab.probing.settings import read_settings
from hydra_lab.probing.study import Calibration, Outcome, Probe, Study

NUM_TOKENS = 512
"""Tokens per sample for a study whose config.toml has no `num_tokens`."""

SAMPLES_PER_DOMAIN = 12
"""Most samples per domain for a study whose config.toml has no `samples_per_domain`."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A study that was run.

    Attributes:
        result: what result.json holds.
        figures: by name, in the order of `result.figures`; those of the first seed.
    """

    result: StudyResult
    figures: dict[str, go.Figure]


def study_names(root: Path) -> list[str]:
    """Names of the studies in `root`/probes, as the command line writes them."""
    return sorted(run.parent.name.replace("_", "-") for run in root.glob("probes/*/run.py"))


def find_study(root: Path, name: str) -> Study:
    """The study `name` ("expert-specialization") of the checkout `root`.

    Raises:
        ValueError: there is no such study, or its run.py holds no `STUDY` of that name.
    """
    study = _attribute(root, name, "run", "STUDY")
    if not isinstance(study, Study) or study.name != name:
        raise ValueError(f"probes/{name.replace('-', '_')}/run.py holds no STUDY named {name!r}")
    return study


def find_calibration(root: Path, name: str) -> Calibration:
    """The calibration of the study `name` of the checkout `root`.

    Raises:
        ValueError: there is no such study, or it has no calibration.
    """
    calibration = _attribute(root, name, "calibration", "CALIBRATION")
    if not isinstance(calibration, Calibration):
        raise ValueError(f"probes/{name.replace('-', '_')}/calibration.py holds no CALIBRATION")
    return calibration


def _attribute(root: Path, name: str, module: str, attribute: str) -> Any:
    folder = name.replace("-", "_")
    if name not in study_names(root):
        raise ValueError(f"no study {name!r}: there are {', '.join(study_names(root)) or 'none'}")
    if not (root / "probes" / folder / f"{module}.py").is_file():
        raise ValueError(f"the study {name!r} has no {module}.py")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # the studies are no part of the package
    return getattr(import_module(f"probes.{folder}.{module}"), attribute, None)


def missing_paths(study: Study, model: Any) -> tuple[str, ...]:
    """The paths that `study` needs and `model` lacks."""
    return tuple(path for path in study.needs if not model.config.layers_with(path))


def read_samples(
    name: str, tokenizer: Any, settings: Mapping[str, Any], corpus: Path | None = None
) -> Samples:
    """Held-out rows for a study: the texts that came with the model, or those of a training corpus.

    Args:
        name: of the model, or its directory.
        settings: of the study; `num_tokens` and `samples_per_domain`, where it has them, say how rows are cut.
        corpus: directory that `build_corpus` wrote.

    Raises:
        ValueError: no text came with the model and no corpus is given.
    """
    size = {
        "num_tokens": settings.get("num_tokens", NUM_TOKENS),
        "num_samples": settings.get("samples_per_domain", SAMPLES_PER_DOMAIN),
    }
    if corpus is not None:
        return samples_from_corpus(corpus, **size)
    directory = model_directory(name)
    texts = read_sample_texts(directory)
    if not texts:
        raise ValueError(f"{directory} has no samples.jsonl; give held-out text with --corpus")
    return samples_from_texts(texts, tokenizer, **size)


def run_study(
    study: Study,
    probe: Probe,
    settings: dict[str, Any],
    *,
    num_seeds: int = 1,
    environment: dict[str, Any] | None = None,
) -> StudyRun:
    """Put `study` to a model under `num_seeds` seeds, from `probe.seed` on; p-values corrected over the study.

    Raises:
        ValueError: the model or the samples do not fit the study.
    """
    missing = missing_paths(study, probe.model)
    if missing:
        raise ValueError(
            f"{study.name} needs a model with {' and '.join(missing)}, and {probe.name} has none"
        )
    if num_seeds < 1:
        raise ValueError(f"the number of seeds must be at least 1, got {num_seeds}")
    started = time.perf_counter()
    seeds = tuple(range(probe.seed, probe.seed + num_seeds))
    outcomes: list[Outcome] = []
    for seed in seeds:
        if num_seeds > 1:
            probe.progress(f"seed {seed}")
        outcomes.append(study.run(dataclasses.replace(probe, seed=seed), dict(settings)))
    findings = corrected(combine([outcome.findings for outcome in outcomes]))
    tables = dict(outcomes[0].tables)
    if num_seeds > 1:
        tables["by_seed"] = _by_seed(seeds, outcomes)
    result = StudyResult(
        study=study.name,
        question=study.question,
        claim=study.claim,
        null=study.null,
        causal_check=study.causal_check,
        model=probe.name,
        settings=dict(settings),
        seeds=seeds,
        findings=findings,
        notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
        figures=tuple(outcomes[0].figures),
        tables=tables,
        seconds=time.perf_counter() - started,
        environment=environment or {},
    )
    return StudyRun(result=result, figures=dict(outcomes[0].figures))


def _by_seed(seeds: Sequence[int], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Raw estimate and p-value of every finding and causal effect, by seed."""
    return {
        str(seed): {
            finding.name: {
                "estimate": finding.estimate,
                "p_value": finding.p_value,
                "causal_estimate": finding.causal and finding.causal.estimate,
                "causal_p_value": finding.causal and finding.causal.p_value,
            }
            for finding in outcome.findings
        }
        for seed, outcome in zip(seeds, outcomes, strict=True)
    }


def write_run(run: StudyRun, directory: Path, *, progress: Callable[[str], None]) -> None:
    """Write result.json and figures/ (HTML, and PNG where there is a browser to draw them) into `directory`.

    Raises:
        OSError: they cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run.result.save(directory / "result.json")
    if not run.figures:
        return
    figures.write_html(run.figures, directory / "figures")
    try:
        progress("images")
        figures.write_png(run.figures, directory / "figures")
    except figures.NoBrowserError as error:
        progress(f"NO PNG FILES WRITTEN: {error}. The HTML figures are complete.")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What `run_studies` did.

    Attributes:
        runs: of the studies that were run; p-values corrected over each study.
        skipped: study -> why it does not apply to the model.
        failed: study -> the error that ended it.
    """

    runs: tuple[StudyRun, ...]
    skipped: dict[str, str]
    failed: dict[str, str]


def run_studies(
    root: Path,
    names: Sequence[str],
    model_name: str,
    *,
    overrides: Mapping[str, str] | None = None,
    corpus: Path | None = None,
    seed: int = 0,
    num_seeds: int = 1,
    environment: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _line: None,
    finished: Callable[[StudyRun], None] = lambda _run: None,
) -> Runs:
    """Put several studies to one model.

    Args:
        names: of the studies.
        overrides: settings; each goes to every study that has it.
        finished: called after each study, so that nothing is lost where a later one fails.

    Raises:
        ValueError: there is no such model or study, or no study has a setting.
    """
    studies = {name: find_study(root, name) for name in names}
    settings = _settings_of(studies, overrides or {})
    model, tokenizer = load(model_name)
    runs: list[StudyRun] = []
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, study in studies.items():
        missing = missing_paths(study, model)
        if missing:
            skipped[name] = f"the model has no block with {' and '.join(missing)}"
            progress(f"{name}: skipped, {skipped[name]}")
            continue
        started = time.perf_counter()

        def say(line: str, name: str = name, started: float = started) -> None:
            progress(f"{name} [{time.perf_counter() - started:.0f} s] {line}")

        try:
            samples = read_samples(model_name, tokenizer, settings[name], corpus)
            probe = Probe(
                model=model, tokenizer=tokenizer, name=model_name, samples=samples, seed=seed, progress=say
            )
            run = run_study(study, probe, settings[name], num_seeds=num_seeds, environment=environment)
        except ValueError as error:  # the others are still worth having; the caller learns of this one
            failed[name] = str(error)
            say(f"FAILED: {error}")
            continue
        finished(run)
        runs.append(run)
    return Runs(runs=tuple(runs), skipped=skipped, failed=failed)


def _settings_of(studies: Mapping[str, Study], overrides: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings of each study; an override reaches those that have the setting."""
    defaults = {name: read_settings(study.config) for name, study in studies.items()}
    unknown = [name for name in overrides if not any(name in each for each in defaults.values())]
    if unknown:
        known = sorted({name for each in defaults.values() for name in each})
        raise ValueError(f"no study has a setting {unknown[0]!r}; there are {', '.join(known)}")
    return {
        name: read_settings(
            study.config, {key: value for key, value in overrides.items() if key in defaults[name]}
        )
        for name, study in studies.items()
    }


def corrected_together(runs: Sequence[StudyRun]) -> tuple[StudyRun, ...]:
    """The same runs with p-values corrected over the tests of all of them."""
    findings = iter(corrected([finding for run in runs for finding in run.result.findings]))
    return tuple(
        dataclasses.replace(
            run,
            result=dataclasses.replace(
                run.result, findings=tuple(next(findings) for _ in run.result.findings)
            ),
        )
        for run in runs
    )
