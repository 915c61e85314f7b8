"""Every page, in process: it appears, answers its controls, and says what is missing."""

import json
import shutil
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from hydra_lab import load
from hydra_lab.capture import capture_files, open_capture
from hydra_lab.capture.comparison import compare
from hydra_lab.loading import model_directory
from hydra_lab.training_log import LOG_FILE
from tests.dashboards.conftest import write_model

OF_A_PROMPT = ("prompt", "intervene")
OF_A_CAPTURE = ("routing", "specialization", "workspace", "memory", "state", "attention")
PAGES = ("start", *OF_A_PROMPT, *OF_A_CAPTURE, "compare", "training", "kernels", "lesson")
EMPTY_AT_FIRST = ("intervene", "compare", "training", "lesson")
"""Pages that say how to fill them, or hold text alone."""
OpenApp = Callable[..., AppTest]


def figures(app: AppTest) -> list[Any]:
    """The plotly figures on the page, as plain values."""
    return [json.loads(element.proto.spec) for element in app.get("plotly_chart")]


def notes(app: AppTest) -> list[str]:
    """The texts above the figures."""
    bodies = [str(element.proto.body) for element in app.get("html")]
    return [body for body in bodies if 'class="figure-note"' in body]


def assert_clean(app: AppTest) -> None:
    assert not app.exception and not app.error, [each.value for each in app.error] + list(app.exception)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_appears(open_app: OpenApp, page: str) -> None:
    app = open_app(page)
    assert_clean(app)
    if page != "lesson":
        assert app.title[0].value == ("Hydra lab" if page == "start" else page.capitalize())
    assert bool(figures(app)) != (page in EMPTY_AT_FIRST)
    if page in EMPTY_AT_FIRST:
        assert app.info, "an empty page says how to fill it"


@pytest.mark.parametrize("page", OF_A_CAPTURE)
def test_every_figure_of_a_path_says_how_much_the_path_is_used(open_app: OpenApp, page: str) -> None:
    found = notes(open_app(page))
    assert found
    for note in found:
        assert (
            "update; cutting it everywhere costs" in note or "updates; cutting it everywhere costs" in note
        ), note
        assert any(unit in note for unit in ("sample", "token", "read")), note


VIEWS = {
    "routing": ("show", 9, ()),
    "specialization": ("specialization", 4, ("Cost of removal",)),
    "workspace": ("workspace", 5, ()),
    "memory": ("memory", 5, ("Facts",)),
    "state": ("state", 6, ()),
    "attention": ("attention", 3, ("Probability by kind",)),
}
"""Key of a page's views, how many there are, and those that first want a click or another capture."""


@pytest.mark.parametrize("page", VIEWS)
def test_each_view_draws(open_app: OpenApp, page: str) -> None:
    key, count, waiting = VIEWS[page]
    app = open_app(page, prompt="The king is come to town. " * 4, other="And so is the queen. " * 4)
    views = app.segmented_control(key=key).options
    assert len(views) == count
    for view in views:
        app.segmented_control(key=key).set_value(view).run()
        assert_clean(app)
        assert bool(figures(app)) != (view in waiting or view == "Patch"), view


def test_start_shows_costs_in_the_diagram_and_more_of_the_model(open_app: OpenApp, tmp_path: Path) -> None:
    model = write_model(tmp_path / "known")
    for name in ("training.json", "evaluation.json"):
        shutil.copy(model_directory("demo") / name, model)
    app = open_app("start", model)
    drawn = []
    for measure in app.segmented_control(key="measure").options:
        app.segmented_control(key="measure").set_value(measure).run()
        assert_clean(app)
        drawn.append((any(each.key == "context" for each in app.segmented_control), len(figures(app))))
    assert drawn == [(False, 0), (False, 1), (True, 1), (True, 0)]
    views = app.segmented_control(key="about")
    assert list(views.options) == ["What it can do", "Use of its paths", "Training"]
    assert any("| code | 1.234 |" in each.value for each in app.markdown)
    views.set_value("Training").run()
    assert_clean(app)
    assert len(app.code) == 2 and not figures(app)


def test_a_lesson_keeps_its_solutions_folded(open_app: OpenApp) -> None:
    app = open_app("lesson", lesson="05_chunk_experts")
    assert_clean(app)
    assert [each.label for each in app.expander] == ["Solution"] * 3
    assert all("def " in each.markdown[0].value for each in app.expander)
    assert not any("<details>" in each.value for each in app.markdown)


def test_a_domain_narrows_the_routing(open_app: OpenApp) -> None:
    app = open_app("routing")
    assert "2 samples" in notes(app)[0]
    app.pills(key="domains").set_value(["code"]).run()
    assert_clean(app)
    assert "1 sample" in notes(app)[0]


def test_a_row_of_the_memory_shows_who_reads_it(open_app: OpenApp) -> None:
    app = open_app("memory")
    row = app.number_input(key="row")
    before = figures(app)[-1]
    row.set_value(0 if row.value != 0 else 1).run()
    assert_clean(app)
    assert figures(app)[-1] != before


def test_a_model_without_a_path_says_so(open_app: OpenApp, tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "plain", memory_layers=[], workspace_layers=[], moe_layers=[], attention_every=0
    )
    assert "no memory path" in open_app("memory", model).info[0].value
    assert "no moe path" in open_app("routing", model).info[0].value
    app = open_app("prompt", model)
    assert_clean(app)
    assert list(app.segmented_control(key="details").options) == [
        "Next token",
        "Logit lens",
        "Written by",
        "State",
    ]


def test_a_model_without_sample_texts_names_the_next_step(open_app: OpenApp, tmp_path: Path) -> None:
    model = write_model(tmp_path / "bare", samples=False)
    for page in OF_A_CAPTURE:
        app = open_app(page, model)
        assert not app.exception
        assert "hydra-lab capture" in app.error[0].value
        assert not figures(app)
    assert "hydra-lab info" in open_app("start", model).info[0].value


def test_a_capture_without_its_model(open_app: OpenApp, model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load(model_dir)
    text = tmp_path / "notes.txt"
    text.write_text("The quick brown fox. " * 20)
    run = tmp_path / "run.zarr"
    capture_files(model, tokenizer, [text], run, sequence_length=64, progress=False)
    for page in ("start", "attention", "workspace", "state", "routing"):
        app = open_app(page, run)
        assert_clean(app)
    assert "the cost of cutting it was not measured" in notes(app)[0]
    assert "hydra-lab dashboard MODEL" in open_app("prompt", run).error[0].value
    app = open_app("routing", model_dir, run)
    assert_clean(app)
    assert app.selectbox(key="capture").value == str(run)


def test_two_captures_are_compared(open_app: OpenApp, model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load(model_dir)
    text = tmp_path / "notes.txt"
    text.write_text("The quick brown fox. " * 20)
    paths = [tmp_path / "before.zarr", tmp_path / "after.zarr"]
    for path, changes in zip(paths, ((), ("moe[*].cut()",)), strict=True):
        capture_files(
            model,
            tokenizer,
            [text],
            path,
            sequence_length=64,
            progress=False,
            interventions=changes,
        )
    app = open_app("compare", model_dir, *paths)
    assert_clean(app)
    app.selectbox(key="second").set_value(app.selectbox(key="first").value).run()
    assert "choose two" in app.info[0].value
    app.selectbox(key="second").set_value(str(paths[1])).run()
    assert_clean(app)
    changes = compare(open_capture(paths[0]), open_capture(paths[1]))
    drawn = figures(app)[0]["data"][0]["y"]
    heights = np.frombuffer(b64decode(drawn["bdata"]), np.dtype(drawn["dtype"]))
    assert heights == pytest.approx(changes.loss_change)
    app.segmented_control(key="compare").set_value("Token by token").run()
    assert_clean(app)
    app.segmented_control(key="compare").set_value("Router saturation").run()
    assert_clean(app)
    assert figures(app)


def test_a_run_is_followed_while_it_trains(open_app: OpenApp, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    row = {
        "step": 10, "tokens": 2_000_000, "loss": 3.0, "language_loss": 2.9, "learning_rate": 1e-3,
        "tokens_per_second": 9.0, "loss_code": 2.5, "gate_0_moe": 0.7, "scale_moe": 0.5, "load_0_0": 0.25,
        "load_0_1": 0.75, "memory_use_3": 0.1,
        "memory_gate_3": 0.4, "state_norm_0": 2.0,
    }  # fmt: skip
    log = run / LOG_FILE
    log.write_text("")
    app = open_app("training", run)
    assert not app.exception
    assert "no step yet" in app.error[0].value
    log.write_text(json.dumps(row) + "\n")
    app.run()
    assert_clean(app)
    assert app.metric[0].value == "10"
    assert any("holds back at this step: moe" in each.value for each in app.caption)
    assert len(figures(app)) == 5
    log.write_text(json.dumps(row) + "\n" + json.dumps({**row, "step": 20, "scale_moe": 1.0}) + "\n")
    app.run()
    assert_clean(app)
    assert app.metric[0].value == "20"


def test_what_is_neither_model_nor_capture(open_app: OpenApp, tmp_path: Path) -> None:
    app = open_app("start", tmp_path / "nothing")
    assert not app.exception
    assert "no model" in app.error[0].value


def test_the_sample_capture_is_made_once_and_by_weight(
    open_app: OpenApp, cache_home: Path, model_dir: Path, tmp_path: Path
) -> None:
    open_app("routing")
    made = {path.name for path in (cache_home / "hydra_lab").iterdir()}
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    open_app("routing", copy)
    assert {path.name for path in (cache_home / "hydra_lab").iterdir()} == made
    assert not list((cache_home / "hydra_lab").rglob("building-*"))
