"""Put every study to models whose truth is known, many times, and count how often it is right.

Power: in how many of the models with planted structure the study finds it. False-positive rate: in how many of the
structureless ones it claims anything. Both with Clopper and Pearson's exact 95% interval (1934).
"""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hydra_lab.probing.runner import find_calibration

RESULT_FILE = Path(__file__).with_name("calibration.json")
"""The committed calibration of the studies that ship."""

LEVEL = 0.05
"""False-positive rate that the studies state."""

LEAST_POWER = 0.9

Kind = Literal["planted", "absent"]

_SAVE_EVERY = 5.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How many of `n` cases something was claimed in.

    Attributes:
        count: cases with a claim.
        n: cases, of seeds 0 to n - 1.
        interval: (low, high) of the rate, 95%, Clopper and Pearson.
    """

    count: int
    n: int
    interval: tuple[float, float]

    @property
    def estimate(self) -> float:
        """Share of the cases."""
        return self.count / self.n


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """How one study did on models whose truth is known.

    Attributes:
        study: its name.
        planted, absent, sample_size: as in `hydra_lab.probing.Calibration`.
        source: digest of the study's files and of the planted models, to tell whether they have changed since.
        missed: seeds of the planted cases that it did not find.
        false_claims: seeds of the structureless cases in which it claimed something.
        power, false_positive_rate: None before the first case.
        seconds_per_case: on one core.
        environment: hardware, versions and commit of the last run.
    """

    study: str
    planted: str
    absent: str
    sample_size: str
    source: str
    missed: tuple[int, ...] = ()
    false_claims: tuple[int, ...] = ()
    num_planted: int = 0
    num_absent: int = 0
    seconds_per_case: float = 0.0
    environment: dict[str, Any]

    @property
    def power(self) -> Rate | None:
        return _rate(self.num_planted - len(self.missed), self.num_planted)

    @property
    def false_positive_rate(self) -> Rate | None:
        return _rate(len(self.false_claims), self.num_absent)

    @property
    def passed(self) -> bool:
        """Power of at least `LEAST_POWER`, and a false-positive rate that is not significantly above `LEVEL`."""
        power, rate = self.power, self.false_positive_rate
        if power is None or rate is None:
            return False
        return power.estimate >= LEAST_POWER and rate.interval[0] <= LEVEL

    def to_dict(self) -> dict[str, Any]:
        """For JSON; with the rates, which `from_dict` leaves out."""
        rates = {
            name: rate and {"estimate": rate.estimate, "interval": list(rate.interval), "n": rate.n}
            for name, rate in (("power", self.power), ("false_positive_rate", self.false_positive_rate))
        }
        return {**asdict(self), **rates, "passed": self.passed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CalibrationRecord":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        missing = set(cls.__dataclass_fields__) - set(known)
        if missing:
            raise ValueError(f"a calibration record lacks {', '.join(sorted(missing))}")
        seeds = {name: tuple(known[name]) for name in ("missed", "false_claims")}
        return cls(**{**known, **seeds})


def clopper_pearson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate of which `count` of `n` were seen (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, n - count + 1)) if count > 0 else 0.0
    high = float(beta.ppf(1 - tail, count + 1, n - count)) if count < n else 1.0
    return low, high


def _rate(count: int, n: int) -> Rate | None:
    return Rate(count=count, n=n, interval=clopper_pearson(count, n)) if n else None


def read_calibrations(path: Path = RESULT_FILE) -> dict[str, CalibrationRecord]:
    """Records by study; empty where there is no file.

    Raises:
        ValueError: the file is no calibration.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["studies"]
        return {name: CalibrationRecord.from_dict(record) for name, record in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a calibration: {error}") from None


def write_calibrations(records: dict[str, CalibrationRecord], path: Path = RESULT_FILE) -> None:
    """Write the records, whole or not at all."""
    values = {
        "level": LEVEL,
        "least_power": LEAST_POWER,
        "interval": "Clopper and Pearson, 95%",
        "studies": {name: record.to_dict() for name, record in sorted(records.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def source_digest(root: Path, name: str) -> str:
    """Digest of a study's code and settings, and of the planted models."""
    folder = root / "probes" / name.replace("-", "_")
    digest = hashlib.sha256()
    for file in sorted(
        [*folder.glob("*.py"), *folder.glob("*.toml"), Path(__file__).with_name("planted.py")]
    ):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def calibrate(
    root: Path,
    names: Sequence[str],
    *,
    num_planted: int = 200,
    num_absent: int = 200,
    workers: int = 1,
    path: Path = RESULT_FILE,
    environment: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> dict[str, CalibrationRecord]:
    """Calibrate studies in worker processes, and keep the records in `path` meanwhile.

    A record that is there goes on where it stopped; one of another version of the study starts anew.

    Args:
        root: the checkout.
        names: of the studies.
        num_planted, num_absent: cases of each kind, seeds from 0.
        environment: hardware, versions and commit, for the records.

    Returns:
        the records of `names`.

    Raises:
        ValueError: a study has no calibration, or a number is too small.
    """
    if min(num_planted, num_absent, workers) < 1:
        raise ValueError(
            f"a calibration needs at least one case of each kind and one worker, got {num_planted} planted, "
            f"{num_absent} absent and {workers} workers"
        )
    calibrations = {name: find_calibration(root, name) for name in names}
    records = read_calibrations(path)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        for name, calibration in calibrations.items():
            source = source_digest(root, name)
            record = records.get(name)
            if record is not None and record.source != source:
                progress(f"{name}: the study has changed since it was calibrated; it starts anew")
            if record is None or record.source != source:
                record = CalibrationRecord(
                    study=name,
                    planted=calibration.planted,
                    absent=calibration.absent,
                    sample_size=calibration.sample_size,
                    source=source,
                    environment=environment or {},
                )
            if record.num_planted < num_planted or record.num_absent < num_absent:
                record = replace(record, environment=environment or {})
            kinds: tuple[tuple[Kind, int], ...] = (("planted", num_planted), ("absent", num_absent))
            for kind, wanted in kinds:
                record = _extend(pool, root, record, kind, wanted, records, path, progress)
            records[name] = record
            write_calibrations(records, path)
            progress(describe(record))
    return {name: records[name] for name in names}


def _extend(
    pool: ProcessPoolExecutor,
    root: Path,
    record: CalibrationRecord,
    kind: Kind,
    wanted: int,
    records: dict[str, CalibrationRecord],
    path: Path,
    progress: Callable[[str], None],
) -> CalibrationRecord:
    done = record.num_planted if kind == "planted" else record.num_absent
    cases = [(str(root), record.study, kind, seed) for seed in range(done, wanted)]
    last_saved = time.monotonic()
    for (_, _, _, seed), (claimed, seconds) in zip(cases, pool.map(_run_case, cases), strict=True):
        record = _with_case(record, kind, seed, claimed, seconds)
        if time.monotonic() - last_saved > _SAVE_EVERY:
            records[record.study] = record
            write_calibrations(records, path)
            progress(f"{record.study}: {kind} {seed + 1} of {wanted}, {record.seconds_per_case:.2f} s a case")
            last_saved = time.monotonic()
    return record


def _with_case(
    record: CalibrationRecord, kind: Kind, seed: int, claimed: bool, seconds: float
) -> CalibrationRecord:
    cases = record.num_planted + record.num_absent
    changes: dict[str, Any] = {
        "seconds_per_case": (record.seconds_per_case * cases + seconds) / (cases + 1),
        f"num_{kind}": (record.num_planted if kind == "planted" else record.num_absent) + 1,
    }
    if kind == "planted" and not claimed:
        changes["missed"] = (*record.missed, seed)
    if kind == "absent" and claimed:
        changes["false_claims"] = (*record.false_claims, seed)
    return replace(record, **changes)


def _start_worker() -> None:
    """One thread per process: several threads each would fight over the cores."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


def _run_case(case: tuple[str, str, Kind, int]) -> tuple[bool, float]:
    """Whether something is claimed in the case, and the seconds that it took."""
    root, name, kind, seed = case
    calibration = find_calibration(Path(root), name)
    started = time.perf_counter()
    judge = calibration.finds_planted if kind == "planted" else calibration.claims_nothing_there
    return bool(judge(seed)), time.perf_counter() - started


def describe(record: CalibrationRecord) -> str:
    """One line: power, false-positive rate, and whether the study passed."""
    power, rate = record.power, record.false_positive_rate
    if power is None or rate is None:
        return f"{record.study}: not calibrated"
    return (
        f"{record.study}: power {_percent(power)} ({power.count} of {power.n}), "
        f"false-positive rate {_percent(rate)} ({rate.count} of {rate.n}): "
        f"{'passed' if record.passed else 'FAILED'}"
    )


def _percent(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.estimate:.1f}%, interval {100 * low:.1f} to {100 * high:.1f}%"
