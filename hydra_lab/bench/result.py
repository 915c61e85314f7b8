"""A measurement as it is kept: rows of figures, the ratios that were asked for, and how it was made."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A figure that was to be reached.

    Attributes:
        measure: what is measured.
        goal: what was to be reached, in words.
        value, low, high: the figure and its 95% interval; all the same where it has none.
        reached: whether the figure (not its interval) is at least as good as the goal.
    """

    measure: str
    goal: str
    value: float
    low: float
    high: float
    reached: bool


@dataclass(frozen=True)
class BenchResult:
    """What one bench found.

    Attributes:
        bench: `throughput`, `kernels` or `capture`.
        environment: hardware, versions and commit (`describe_environment`).
        settings: sizes, dtype, seed, rounds.
        rows: one measurement each, flat.
        findings: what follows from several rows, by name.
        goals: figures that were to be reached, as far as this run measures them.
        skipped: what was not measured, and why.
    """

    bench: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    findings: dict[str, Any] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write a result file.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "BenchResult":
        """Read a result file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no result file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "goals": [Goal(**goal) for goal in values["goals"]]})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a bench result: {error}") from None
