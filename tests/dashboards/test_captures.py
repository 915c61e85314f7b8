"""Captures of each kind: with raw arrays and a summary, with the summary alone, and with raw arrays alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from streamlit.testing.v1 import AppTest

from hydra_lab import load
from hydra_lab.capture import Capture, capture_files
from hydra_lab.capture.layout import SIGNALS
from tests.dashboards.conftest import TEXTS
from tests.dashboards.test_pages import assert_clean, figures, notes

OpenApp = Callable[..., AppTest]
SHOWS = {
    "routing": ("Load", "Domains", "Position", "Pairs", "Switching"),
    "state": ("By domain",),
    "workspace": ("Reads", "Writes", "Read after write"),
    "attention": ("Selected blocks",),
    "memory": (None,),
}
KINDS = {"both": None, "summary": ["summary"], "raw": list(SIGNALS)}


@pytest.fixture(scope="module")
def captures(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A capture of each kind, of the same texts, whose lengths differ."""
    folder = tmp_path_factory.mktemp("captures")
    for domain, text in TEXTS.items():
        (folder / domain).mkdir()
        (folder / domain / "text.txt").write_text(text)
    model, tokenizer = load(model_dir)
    for kind, signals in KINDS.items():
        capture_files(
            model, tokenizer, [folder / domain for domain in TEXTS], folder / f"{kind}.zarr", sequence_length=64,
            signals=signals, progress=False,
        )  # fmt: skip
    return {kind: folder / f"{kind}.zarr" for kind in KINDS}


KEYS = {"routing": "show"}
"""Key of a page's views, where it is not the page's name."""


def shown(app: AppTest, page: str) -> dict[str | None, list[object]]:
    """The figures of each view of a page."""
    found: dict[str | None, list[object]] = {}
    for show in SHOWS[page]:
        if show is not None:
            app.segmented_control(key=KEYS.get(page, page)).set_value(show).run()
        assert_clean(app)
        found[show] = figures(app)
        assert found[show], show
    return found


@pytest.mark.parametrize("page", SHOWS)
def test_a_summary_alone_draws_what_a_full_capture_draws(
    open_app: OpenApp, captures: dict[str, Path], model_dir: Path, page: str
) -> None:
    both = shown(open_app(page, model_dir, captures["both"]), page)
    summary = shown(open_app(page, model_dir, captures["summary"]), page)
    assert summary == both
    raw = shown(open_app(page, model_dir, captures["raw"]), page)
    assert raw.keys() == both.keys()


@pytest.mark.parametrize("page", SHOWS)
def test_no_raw_array_is_read_where_there_is_a_summary(
    open_app: OpenApp, captures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    fresh = shutil.copytree(captures["both"], tmp_path / "fresh.zarr")  # of which nothing is in a cache
    read: set[str] = set()
    original = Capture.__getitem__

    def note(capture: Capture, group: str) -> xr.Dataset:
        read.add(group)
        return original(capture, group)

    monkeypatch.setattr(Capture, "__getitem__", note)
    shown(open_app(page, fresh), page)
    assert read <= ({"tokens"} if page == "memory" else set())  # which shows the text of a few samples


def test_what_needs_raw_arrays_names_the_command(open_app: OpenApp, captures: dict[str, Path]) -> None:
    app = open_app("routing", captures["summary"])
    assert not app.info
    app.pills(key="domains").set_value(["code"]).run()
    assert_clean(app)
    assert not figures(app)
    (line,) = [each.value for each in app.info]
    folder = captures["summary"].parent
    assert line.startswith("A choice of domains needs the raw arrays of routing") and "\n" not in line
    files = f"{folder}/code/text.txt {folder}/prose/text.txt"
    assert f"{files} --out NEW.zarr --sequence-length 64" in line
    assert line.endswith("--signal summary --signal routing`")
    app = open_app("memory", captures["summary"])
    (line,) = [each.value for each in app.info]
    assert "keeps the summary alone" in line and line.endswith("--signal summary --signal memory`")


def test_a_domain_is_read_from_the_raw_arrays(open_app: OpenApp, captures: dict[str, Path]) -> None:
    app = open_app("routing", captures["both"])
    whole = notes(app)[0]
    app.pills(key="domains").set_value(["code"]).run()
    assert_clean(app)
    assert figures(app) and notes(app)[0] != whole and not app.info


def test_the_tokens_that_read_a_row_are_counted_on_demand(
    open_app: OpenApp, captures: dict[str, Path], model_dir: Path
) -> None:
    app = open_app("memory", model_dir, captures["both"])
    before = figures(app)
    app.toggle(key="count").set_value(True).run()
    assert_clean(app)
    assert figures(app)[:-1] == before
    assert figures(app)[-1] == figures(open_app("memory", model_dir, captures["raw"]))[-1]
