"""The result schema of every probe: estimate, interval, null, p, n, causal effect."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab.metrics.information import holm


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an intervention changed.

    Attributes:
        description: the intervention and what was measured, in one line.
        estimate: size of the change.
        unit: of the estimate.
        interval: (low, high), 95%.
        p_value: of "no change"; None where it was not tested.
        p_corrected: the same, after `corrected`.
    """

    description: str
    estimate: float
    unit: str
    interval: tuple[float, float]
    p_value: float | None = None
    p_corrected: float | None = None

    def is_claimed(self, alpha: float = 0.05) -> bool:
        """Whether the corrected p-value (the raw one where none was corrected) allows the claim."""
        return _allows(self.p_value, self.p_corrected, alpha)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was measured.

    Attributes:
        name: what, such as "block 2: information about the domain"; unique within a study.
        estimate: the figure.
        unit: of the estimate ("nats", "share of questions", ...).
        interval: (low, high), 95%, over the unit that `n` counts.
        null: what would be true were there nothing, in one line.
        null_value: the estimate under the null.
        p_value: of the null; None where nothing was tested.
        p_corrected: Holm's, over everything that was tested together (see `corrected`); a claim needs at most 0.05.
        n: how many independent observations.
        n_unit: what they are ("samples", "questions", ...).
        verdict: one sentence for a reader who knows no statistics.
        causal: what an intervention changed; None where none was made, and the verdict says why.
        layer: index of the block that it is about; None where it is about the model.
    """

    name: str
    estimate: float
    unit: str
    interval: tuple[float, float]
    null: str
    null_value: float
    n: int
    n_unit: str
    verdict: str
    p_value: float | None = None
    p_corrected: float | None = None
    causal: Effect | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("p_value", self.p_value), ("p_corrected", self.p_corrected)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} of {self.name!r} must lie between 0 and 1, got {value}")

    def is_claimed(self, alpha: float = 0.05) -> bool:
        """Whether the corrected p-value (the raw one where none was corrected) allows the claim."""
        return _allows(self.p_value, self.p_corrected, alpha)


def _allows(p_value: float | None, p_corrected: float | None, alpha: float) -> bool:
    p = p_value if p_corrected is None else p_corrected
    return p is not None and p <= alpha


def corrected(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings with `p_corrected` by Holm's method (1979) over all their tests, causal ones included."""
    tests = [each.p_value for each in findings] + [each.causal and each.causal.p_value for each in findings]
    adjusted = iter(holm(np.array([p for p in tests if p is not None], dtype=np.float64)).tolist())
    values = [None if p is None else next(adjusted) for p in tests]
    out = []
    for number, finding in enumerate(findings):
        causal = finding.causal
        if causal is not None:
            causal = dataclasses.replace(causal, p_corrected=values[len(findings) + number])
        out.append(dataclasses.replace(finding, p_corrected=values[number], causal=causal))
    return tuple(out)


def claims_anything(findings: Sequence[Finding], alpha: float = 0.05) -> bool:
    """Whether any test, causal ones included, survives the correction for all of them."""
    return any(
        finding.is_claimed(alpha) or (finding.causal is not None and finding.causal.is_claimed(alpha))
        for finding in corrected(findings)
    )


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study found on one model: what its result.json holds.

    Attributes:
        study, question, claim, null, causal_check: as in `hydra_lab.probing.Study`.
        model: name of the model.
        settings: what the study was run with.
        seeds: of sampling, permutations and redraws.
        findings: with corrected p-values.
        notes: what a reader must know besides: limits, what could not be measured and why.
        figures: names of the figures, in the order in which they should be read.
        tables: further results that no single figure holds, by name; plain lists and numbers.
        seconds: how long it took.
        environment: hardware, versions and commit.
    """

    study: str
    question: str
    claim: str
    null: str
    causal_check: str
    model: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    tables: dict[str, Any] = field(default_factory=dict[str, Any])
    seconds: float = math.nan
    environment: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN and infinities become None."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | Path) -> None:
        """Write a result file.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "StudyResult":
        """Read a result file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no result of a study.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            findings = tuple(_finding(each) for each in values["findings"])
            sequences = {name: tuple(values[name]) for name in ("seeds", "notes", "figures")}
            return cls(**{**values, **sequences, "findings": findings, "seconds": _number(values["seconds"])})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not the result of a study: {error}") from None


def _finding(values: dict[str, Any]) -> Finding:
    causal = values["causal"]
    if causal is not None:
        causal = Effect(**{**causal, **_floats(causal, "estimate"), "interval": _pair(causal["interval"])})
    return Finding(
        **{
            **values,
            **_floats(values, "estimate", "null_value"),
            "interval": _pair(values["interval"]),
            "causal": causal,
        }
    )


def _floats(values: dict[str, Any], *names: str) -> dict[str, float]:
    return {name: _number(values[name]) for name in names}


def _pair(values: Sequence[float | None]) -> tuple[float, float]:
    low, high = values
    return _number(low), _number(high)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
