"""What every test shares: one thread, fixed hypothesis profiles, and marks by folder."""

import os

# Set before torch is imported: two test processes with several threads each would fight over two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# The tests use no network; without this a mistyped model name would wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

TESTS = Path(__file__).resolve().parent
MARKS = {"kernels": "kernel", "notebooks": "notebook", "dashboards": "dashboard", "browser": "browser"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# No deadline: a first call pays for imports and lazy initialisation. Same examples every run: a failure in CI is a
# failure here. `pytest --hypothesis-profile=search` looks for new ones.
_SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("repeatable", _SHARED, derandomize=True, max_examples=50)
settings.register_profile("search", _SHARED, max_examples=500)
settings.load_profile("repeatable")


def find_chromium() -> str | None:
    """Path of a Chromium of this system, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium."""
    path = find_chromium()
    assert path is not None  # browser tests are skipped without one
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder; skip browser tests, with the reason, where there is no Chromium."""
    no_browser = pytest.mark.skip(reason=f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    missing = find_chromium() is None
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        mark = MARKS.get(item.path.relative_to(TESTS).parts[0])
        if mark is not None:
            item.add_marker(getattr(pytest.mark, mark))
        if mark == "browser" and missing:
            item.add_marker(no_browser)
