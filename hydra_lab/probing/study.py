"""What a study is, what it is given, what it hands back, and how it is calibrated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing.findings import Finding


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a study is given.

    Attributes:
        model: in evaluation mode; a study leaves it as it was.
        tokenizer: of the model.
        name: of the model, for the report.
        samples: held-out rows of several domains.
        seed: of everything that is drawn.
        progress: receives a line as each step begins.
    """

    model: HydraForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    samples: Samples
    seed: int = 0
    progress: Callable[[str], None] = lambda _line: None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a study hands back.

    Attributes:
        findings: with raw p-values; the runner corrects them over everything that was tested.
        figures: plotly figures by name, in the order in which they should be read.
        notes: what a reader must know besides: limits, what could not be measured and why.
        tables: further results, plain lists and numbers by name.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    tables: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question about a model: `STUDY` in `probes/<folder>/run.py`.

    Attributes:
        name: as the command line writes it: the folder with hyphens.
        question, claim, null, causal_check: one sentence each, for the report.
        run: measures; receives what it is given and the settings.
        config: config.toml of the study, the defaults of its settings. `num_tokens` and `samples_per_domain`, where it
            has them, also say how the samples are cut.
        needs: paths that a model must have to be studied ("moe", ...).
    """

    name: str
    question: str
    claim: str
    null: str
    causal_check: str
    run: Callable[[Probe, dict[str, Any]], Outcome]
    config: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A study put to models whose truth is known: `CALIBRATION` in `probes/<folder>/calibration.py`.

    Both functions make a model (or data) from the seed, run the study's own code on it at the stated sample size, and
    say what it claims at its stated 5%.

    Attributes:
        planted: what is planted, in one sentence.
        absent: what the structureless cases are, in one sentence.
        sample_size: of one case, in words.
        finds_planted: seed -> whether the planted effect is claimed (and named right).
        claims_nothing_there: seed -> whether anything at all is claimed where nothing is.
    """

    planted: str
    absent: str
    sample_size: str
    finds_planted: Callable[[int], bool]
    claims_nothing_there: Callable[[int], bool]
