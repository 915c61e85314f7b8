"""The real server over the shipped model, and a headless Chromium in front of it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from hydra_lab import load
from hydra_lab.capture import capture_files

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a dashboard on the model `demo` (or on HYDRA_TEST_MODEL), with an empty cache."""
    app = ROOT / "dashboards" / "app.py"
    with streamlit_server(
        app, tmp_path_factory.mktemp("server"), os.environ.get("HYDRA_TEST_MODEL", "demo")
    ) as address:
        yield address


@contextmanager
def streamlit_server(app: Path, folder: Path, *arguments: str) -> Iterator[str]:
    """Address of a Streamlit server that runs in `folder`, with its cache and its log there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log.txt").open("w+")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "streamlit", "run", str(app), "--server.address", "127.0.0.1",
            "--server.port", str(port), "--server.headless", "true",
            "--browser.gatherUsageStats", "false", "--", *arguments,
        ],
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(address, process, log.name)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


@pytest.fixture(scope="session")
def two_captures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same short text through the demo as it is, and without its memory."""
    folder = tmp_path_factory.mktemp("captures")
    text = folder / "notes.txt"
    text.write_text("Q: capital of Peru? A: Lima\nQ: currency of Japan? A: JPY\n" * 20)
    model, tokenizer = load("demo")
    for name, changes in (("before", ()), ("after", ("memory[*].cut()",))):
        capture_files(
            model, tokenizer, [text], folder / f"{name}.zarr", interventions=changes, progress=False
        )
    return folder / "before.zarr", folder / "after.zarr"


def _wait_until_up(address: str, process: "subprocess.Popen[bytes]", log: str) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=2).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"the dashboard did not come up:\n{Path(log).read_text()}")


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    """The system's Chromium."""
    with sync_playwright() as playwright:
        # No sandbox: in a container root may not make one.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
