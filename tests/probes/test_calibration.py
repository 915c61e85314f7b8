"""The calibration in small: every study against a few models with planted structure and some without.

The whole one is `hydra-lab probe calibrate`; its result file is committed.
"""

from pathlib import Path

import pytest
from scipy.stats import binom

from hydra_lab.probing.calibrate import LEAST_POWER, LEVEL, read_calibrations
from hydra_lab.probing.runner import find_calibration, study_names

ROOT = Path(__file__).resolve().parents[2]
STUDIES = study_names(ROOT)
NUM_PLANTED = 8
NUM_ABSENT = 20

CHANCE_OF_FAILURE = 1e-3 / (2 * len(STUDIES))
"""Of one test below, for a study that just keeps what it states: all of them together fail in fewer than 1 of 1000."""


@pytest.mark.parametrize("name", STUDIES)
def test_planted_structure_is_found(name: str) -> None:
    least = int(binom.ppf(CHANCE_OF_FAILURE, NUM_PLANTED, LEAST_POWER))
    assert least >= 1
    found = sum(find_calibration(ROOT, name).finds_planted(seed) for seed in range(NUM_PLANTED))
    assert found >= least, f"{found} of {NUM_PLANTED}"


@pytest.mark.parametrize("name", STUDIES)
def test_absent_structure_is_not_claimed(name: str) -> None:
    most = int(binom.isf(CHANCE_OF_FAILURE, NUM_ABSENT, LEVEL))
    claimed = sum(find_calibration(ROOT, name).claims_nothing_there(seed) for seed in range(NUM_ABSENT))
    assert claimed <= most, f"{claimed} of {NUM_ABSENT}"


def test_what_ships_has_passed_its_calibration() -> None:
    records = read_calibrations()
    assert set(records) == set(STUDIES), "run hydra-lab probe calibrate"
    for name, record in records.items():
        assert record.passed, name
        assert record.num_planted >= 200 and record.num_absent >= 200, name
