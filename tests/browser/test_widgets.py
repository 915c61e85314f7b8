"""Each widget in a bare page: hover, keys, click, and the selection that goes out."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from hydra_lab.metrics.routing import RoutingMap
from hydra_lab.widgets import BlockDiagram, RoutingLanes, TokenStrip, module_text, style_text
from hydra_lab.widgets.base import Widget

_EXPERTS = np.arange(60).reshape(2, 30, 1) % 4
WIDGETS: dict[str, tuple[str, Widget, Any, Any]] = {
    "token strip": (
        "token_strip",
        TokenStrip(["</script>", "<b>x", "שלום"] + ["🙂\0"] * 4093, np.arange(4096), label="loss, nats", chunk_size=32),
        0,
        1,
    ),
    "block diagram": (
        "scene",
        BlockDiagram([0, 1, 2], ["ssm", "moe"], [[0.9, 0.1], [0.99, 0.01], [1, np.nan]]),
        [0, "ssm"],
        [1, "ssm"],
    ),
    "routing lanes": (
        "scene",
        RoutingLanes(RoutingMap((0, 2), _EXPERTS, np.ones(_EXPERTS.shape), 4, 16, 480), ["<b>"] * 30),
        [0, 0],
        [0, 1],
    ),
}  # fmt: skip


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    yield page
    page.close()


def mount(phone: Page, module: str, widget: Any) -> None:
    """Draw the widget with the JavaScript of the dashboard."""
    phone.set_content(f"<style>{style_text()}</style><div id=host></div>")
    phone.evaluate(
        """async ([text, data]) => {
          const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
          const { default: mount } = await import(url);
          window.sent = [];
          const setStateValue = (name, value) => window.sent.push([name, value]);
          window.mount = (data) => mount({ data, parentElement: document.getElementById("host"), setStateValue });
          window.mount(data);
        }""",
        [module_text(module, "streamlit"), widget.payload],
    )


@pytest.mark.parametrize("name", WIDGETS)
def test_hover_keys_and_click(phone: Page, name: str) -> None:
    module, widget, first, second = WIDGETS[name]
    problems: list[str] = []
    phone.on("pageerror", lambda error: problems.append(str(error)))
    mount(phone, module, widget)
    items, tip = phone.locator("[data-item]"), phone.locator(".hydra-tip")
    items.first.hover()
    assert tip.is_visible()
    items.first.click()
    phone.keyboard.press("ArrowRight")
    assert phone.evaluate("document.activeElement === document.querySelectorAll('[data-item]')[1]")
    assert tip.is_visible(), "focus shows no details"
    phone.keyboard.press("Enter")
    assert phone.evaluate("window.sent") == [["selected", first], ["selected", second]]
    assert phone.locator('[aria-pressed="true"]').count() == 1
    phone.evaluate("data => window.mount(data)", widget.payload | {"selected": first})
    assert items.first.get_attribute("aria-pressed") == "true"
    assert phone.locator(".hydra-widget").count() == 1, "a new selection draws the widget again"
    assert phone.locator("#host b b, #host script").count() == 0, "a token became markup"
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390, "the page scrolls sideways"
    assert problems == []


def test_an_inner_path_of_the_diagram_is_not_covered_by_an_outer_one(phone: Page) -> None:
    module, widget, _, _ = WIDGETS["block diagram"]
    mount(phone, module, widget)
    place = """name => {
      const text = [...document.querySelectorAll('text')].find((each) => each.textContent.startsWith(name));
      const box = text.getBoundingClientRect();
      const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      return hit.closest('[data-item]').textContent;
    }"""
    for path in ("ssm", "moe"):
        assert phone.evaluate(place, path).strip().startswith(path)
