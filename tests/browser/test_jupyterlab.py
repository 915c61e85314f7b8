"""A student opens the tour in JupyterLab, runs all of it, uses a control and sees what it does; solved lessons run."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import ROOT
from tests.browser.pictures import SCREENSHOTS

START_SECONDS = 120
PATIENCE_MS = 150_000  # for a busy machine; an idle one needs a minute for all of it
SOLVED = ("05_chunk_experts", "07_product_keys")
OUTPUTS = {
    "figure": ("application/vnd.plotly.v1+json", ".jp-OutputArea .js-plotly-plot .main-svg"),
    "widget": ("image/svg+xml", ".jp-OutputArea .hydra-widget"),
}
"""What a notebook shows: its MIME type, and how it is drawn."""
SCROLL_TO_FIRST = """async (mime) => {
    const { content } = window.jupyterapp.shell.currentWidget;
    const shows = ({ model }) => model.type === 'code' && model.outputs.toJSON().some(({ data }) => data?.[mime]);
    await content.scrollToItem(content.widgets.findIndex(shows), 'start');
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address, with its token, of LESSON, alone in its workspace, in a JupyterLab on copies of the lessons."""
    folder = tmp_path_factory.mktemp("lessons")
    shutil.copy(ROOT / "notebooks" / "00_tour.ipynb", folder)
    for lesson in SOLVED:
        shutil.copy(ROOT / "notebooks" / "solutions" / f"{lesson}.ipynb", folder)
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log_path = home / "log.txt"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", str(folder / "00_tour.ipynb"), "--no-browser", "--allow-root",
                "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
                "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                "--expose-app-in-browser",
            ],
            env=os.environ
            | {
                "JUPYTER_CONFIG_DIR": str(home / "config"),
                "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
                "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
                "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
                "IPYTHONDIR": str(home / "ipython"),
                "PYTHONPATH": str(ROOT),
                "HYDRA_LAB_QUICK": "1",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield _address(process, log_path)
    finally:
        # The server shuts its kernels down before it goes.
        process.terminate()
        process.wait(timeout=30)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"(http://127\.0\.0\.1:\d+/lab)\S*(\?token=\w+)", log.read_text()):
            return f"{found[1]}/workspaces/LESSON/tree/LESSON.ipynb{found[2]}"
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not come up:\n{log.read_text()}")


def photograph(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / f"jupyterlab-{name}.png")


def test_a_student_runs_the_tour_and_draws_a_text_of_their_own(lab: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(lab.replace("LESSON", "00_tour"))
        notebook = page.locator(".jp-Notebook").first
        expect(notebook.get_by_role("heading", name="0. A tour of Hydra")).to_be_visible(timeout=PATIENCE_MS)
        photograph(page, "opened")
        assert run_every_cell(page) == [["check"], ["check"]]

        buttons = notebook.locator(".widget-radio-box label")
        buttons.first.scroll_into_view_if_needed()
        expect(buttons.first).to_be_visible()
        assert notebook.locator(".widget-radio-box input:checked").count() == 0, (
            "a prediction was made already"
        )
        buttons.filter(has_text="partly").click()
        photograph(page, "prediction")
        reveal = notebook.locator(".jp-CodeCell", has_text="same_experts.reveal(")
        reveal.locator(".jp-InputArea-editor").click()
        page.keyboard.press("Control+Enter")
        expect(reveal.locator(".jp-OutputArea")).to_contain_text("The answer is: partly")
        expect(reveal.locator(".jp-OutputArea")).to_contain_text("Right.")

        draw = notebook.locator(".jp-CodeCell", has_text="own_text = ipywidgets.Textarea(")
        draw.scroll_into_view_if_needed()
        before = draw.locator(".js-plotly-plot").last.inner_text()
        draw.get_by_role("button", name="code").click()
        page.wait_for_function(
            "([plot, before]) => plot.innerText !== before",
            arg=[draw.locator(".js-plotly-plot").last.element_handle(), before],
        )
        photograph(page, "light")
        turn_dark(page)
        photograph(page, "dark")
        assert errors == []
    finally:
        page.close()


@pytest.mark.parametrize("lesson", SOLVED)
def test_a_solved_lesson_shows_its_figures_in_both_themes(lab: str, browser: Browser, lesson: str) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 2400})
    page.set_default_timeout(PATIENCE_MS)
    try:
        page.goto(lab.replace("LESSON", lesson))
        expect(page.locator(".jp-Notebook .jp-Cell").first).to_be_visible(timeout=PATIENCE_MS)
        assert run_every_cell(page) == []
        for theme in ("light", "dark"):
            if theme == "dark":
                turn_dark(page)
            for name, (mime, shown) in OUTPUTS.items():
                page.evaluate(SCROLL_TO_FIRST, mime)
                expect(page.locator(shown).filter(visible=True).first).to_be_visible(timeout=PATIENCE_MS)
                photograph(page, f"{lesson}-{theme}-{name}")
    finally:
        page.close()


def turn_dark(page: Page) -> None:
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")


def run_every_cell(page: Page) -> list[list[str]]:
    """Run cell after cell, past those that fail; the tags of those that did."""
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
        timeout=PATIENCE_MS,
    )
    return page.evaluate(
        """async () => {
            const panel = window.jupyterapp.shell.currentWidget;
            const failed = [];
            for (const cell of panel.content.widgets) {
                if (cell.model.type !== 'code') continue;
                panel.content.activeCellIndex = panel.content.widgets.indexOf(cell);
                await window.jupyterapp.commands.execute('notebook:run-cell');
                const outputs = cell.model.outputs;
                for (let i = 0; i < outputs.length; i++)
                    if (outputs.get(i).type === 'error') failed.push(cell.model.getMetadata('tags') ?? []);
            }
            return failed;
        }"""
    )
