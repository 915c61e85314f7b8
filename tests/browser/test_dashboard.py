"""A visitor opens every page, by day and by night, at a desk and on a phone, types a prompt and ablates an expert."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import pictures

NAMES = (
    "prompt", "intervene", "routing", "specialization", "workspace", "memory", "state", "attention", "compare",
    "training", "kernels", "lesson",
)  # fmt: skip
PAGES = {"start": "/"} | {name: f"/{name}" for name in NAMES}
SIZES = {"desk": (1440, 900), "phone": (390, 844)}
PATIENCE_MS = 120_000  # the first start captures the sample texts, perhaps on a busy machine

ERROR_BOXES = "[data-testid=stException], [data-testid=stAlertContentError]"
QUIET = """() => {
    const app = document.querySelector('[data-testid=stApp]');
    const busy = '[data-testid=stSpinner], [data-testid=stProgress], [data-testid=stSkeleton], [data-stale=true]';
    return app?.dataset.testScriptState === 'notRunning' && document.querySelector('h1')
        && !document.querySelector(busy)
        && [...document.querySelectorAll('.stPlotlyChart')].every((chart) => chart.querySelector('.main-svg'));
}"""
"""The page's script has ended, and every figure is drawn."""

QUIET_OR_BROKEN = f"() => document.querySelector('{ERROR_BOXES}') || ({QUIET})()"
MOST_DIFFERENT = 0.1
"""Share of a page's small picture that may look different from the one that is kept."""


class Visitor:
    """A browser tab that notes what goes wrong.

    Attributes:
        problems: script errors, and requests that leave this machine.
    """

    def __init__(self, page: Page, server: str) -> None:
        self.page, self.server = page, server
        page.set_default_timeout(PATIENCE_MS)
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._note_request)

    def _note_request(self, request: object) -> None:
        url = str(getattr(request, "url", ""))
        if not url.startswith((self.server, self.server.replace("http", "ws"), "data:", "blob:")):
            self.problems.append(f"asked for {url}")

    def open(self, path: str) -> None:
        self.page.goto(self.server + path)
        expect(self.page.locator("h1")).to_be_visible(timeout=PATIENCE_MS)
        self.settle()

    def settle(self) -> None:
        """Wait until the page is drawn, and fail on any error box."""
        self.page.wait_for_timeout(300)
        self.page.wait_for_function(QUIET_OR_BROKEN, timeout=PATIENCE_MS)
        assert self.page.locator(ERROR_BOXES).all_text_contents() == []
        assert self.problems == []

    def choose(self, label: str, option: str) -> None:
        """Choose an option of a select box."""
        self.page.get_by_label(label, exact=False).first.click()
        self.page.keyboard.type(option)  # a long list draws only what is in view
        self.page.get_by_role("option", name=option, exact=True).click()
        self.settle()

    def photograph(self, name: str) -> Path:
        """Keep a picture of the whole page."""
        pictures.SCREENSHOTS.mkdir(exist_ok=True)
        size = self.page.viewport_size
        assert size is not None
        height = self.page.evaluate(
            "document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight"
        )
        self.page.set_viewport_size({"width": size["width"], "height": max(size["height"], height + 40)})
        self.page.wait_for_timeout(500)
        path = pictures.SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        self.page.set_viewport_size(size)
        return path


@pytest.fixture
def visitor(browser: Browser, server: str) -> Iterator[Visitor]:
    """A visitor at a desk, in the light."""
    page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
    yield Visitor(page, server)
    page.close()


@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("size", SIZES)
def test_every_page_is_drawn_and_looks_as_before(
    browser: Browser, server: str, two_captures: tuple[Path, Path], size: str, scheme: str
) -> None:
    """`python -m tests.browser.pictures` keeps what this run photographed as what the pages look like."""
    width, height = SIZES[size]
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
    )
    visitor = Visitor(page, server)
    changed: dict[str, float] = {}
    for name, path in PAGES.items():
        opened = f"?{urlencode({'open': two_captures}, doseq=True)}" if name == "compare" else ""
        visitor.open(path + opened)
        background = page.evaluate(
            "getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor"
        )
        assert background == ("rgb(14, 17, 23)" if scheme == "dark" else "rgb(255, 255, 255)")
        papers = page.evaluate(
            "[...document.querySelectorAll('.main-svg')].map((svg) => svg.style.background)"
        )
        assert {paper for paper in papers if paper} <= {background}, "the figures' theme is not the page's"
        assert len(papers) > 0 or name in ("start", "intervene", "lesson")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        seen = pictures.small(visitor.photograph(f"{name}-{size}-{scheme}"))
        kept = pictures.KEPT / f"{name}-{size}-{scheme}.png"
        if kept.is_file():  # pages whose picture nobody has kept yet are drawn, not compared
            changed[name] = pictures.difference(seen, pictures.small(kept))
    page.close()
    print({name: round(share, 3) for name, share in changed.items()})
    assert not {name: share for name, share in changed.items() if share > MOST_DIFFERENT}


def test_a_picture_without_its_figure_is_grossly_different(visitor: Visitor) -> None:
    visitor.open("/attention")
    whole = pictures.small(visitor.photograph("attention-whole"))
    assert pictures.difference(whole, pictures.small(visitor.photograph("attention-again"))) < 0.01
    visitor.page.evaluate("document.querySelector('.stPlotlyChart').style.visibility = 'hidden'")
    assert pictures.difference(whole, pictures.small(visitor.photograph("attention-bare"))) > MOST_DIFFERENT


def test_a_prompt_is_typed_and_an_expert_ablated(visitor: Visitor) -> None:
    visitor.open("/prompt")
    box = visitor.page.get_by_role("textbox", name="Prompt", exact=True)
    box.fill("The king is come to town.\n12+5: 2+5=7 1=1 =17\n" * 4)
    box.press("Control+Enter")
    expect(visitor.page.locator(".hydra-tokens")).to_contain_text("The king", timeout=PATIENCE_MS)
    visitor.settle()
    assert visitor.page.locator(".hydra-tokens").count() == 1
    first = re.findall(r"\d+", visitor.page.locator(".hydra-mark").first.inner_text())[0]
    visitor.page.get_by_role("link", name="Intervene", exact=True).click()
    expect(visitor.page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value(
        re.compile("The king"), timeout=PATIENCE_MS
    )
    typed = visitor.page.get_by_role("textbox", name="Or as text")
    typed.fill(f"moe[0].ablate(expert={first})")
    typed.press("Enter")
    expect(visitor.page.locator(".hydra-tokens")).to_have_count(2, timeout=PATIENCE_MS)
    visitor.choose("Colour the tokens by", "experts, block 0")
    marks = visitor.page.locator(".hydra-tokens").nth(1).locator(".hydra-mark")
    expect(marks.first).not_to_contain_text(first, timeout=PATIENCE_MS)
    visitor.photograph("intervene-ablated")
    expect(visitor.page).to_have_url(re.compile("intervene=moe"), timeout=PATIENCE_MS)
    visitor.page.get_by_role("link", name="Prompt", exact=True).click()
    expect(visitor.page.locator(".hydra-tokens")).to_have_count(2, timeout=PATIENCE_MS)
    visitor.page.get_by_role("button", name="Remove", exact=True).click()
    expect(visitor.page.locator(".hydra-tokens")).to_have_count(1, timeout=PATIENCE_MS)
    expect(visitor.page).not_to_have_url(re.compile("intervene"), timeout=PATIENCE_MS)
    for details in ("Logit lens", "Written by", "Routing", "Memory", "Workspace", "State"):
        visitor.page.get_by_role("radio", name=details, exact=True).click()
        visitor.settle()
        visitor.photograph(f"prompt-{details.lower().replace(' ', '-')}")


def test_the_model_writes_on_and_its_text_becomes_the_prompt(visitor: Visitor) -> None:
    visitor.open("/prompt?prompt=def+read_lines(path):&written=5")
    visitor.page.get_by_role("button", name="Write on").click()
    keep = visitor.page.get_by_role("button", name="Put it behind the prompt")
    expect(keep).to_be_visible(timeout=PATIENCE_MS)
    keep.click()
    expect(visitor.page.get_by_role("textbox", name="Prompt", exact=True)).not_to_have_value(
        "def read_lines(path):", timeout=PATIENCE_MS
    )
    visitor.settle()


def test_a_token_that_is_clicked_is_picked_on_the_next_page_and_in_the_link(visitor: Visitor) -> None:
    visitor.open("/prompt")
    visitor.page.locator(".hydra-token").nth(7).click()
    expect(visitor.page.get_by_label("Look at token")).to_have_value("7", timeout=PATIENCE_MS)
    expect(visitor.page).to_have_url(re.compile("token=7"), timeout=PATIENCE_MS)
    visitor.page.get_by_role("link", name="Routing", exact=True).click()
    visitor.page.get_by_role("radio", name="Your prompt", exact=True).click()
    expect(visitor.page.get_by_text("Picked: token 7")).to_be_visible(timeout=PATIENCE_MS)
    visitor.settle()
    link = visitor.page.url
    visitor.page.goto("about:blank")
    visitor.page.goto(link)
    expect(visitor.page.get_by_text("Picked: token 7")).to_be_visible(timeout=PATIENCE_MS)


def test_a_path_of_the_diagram_opens_its_page(visitor: Visitor) -> None:
    visitor.open("/")
    visitor.page.locator(".hydra-widget text", has_text="attention").last.click()
    expect(visitor.page.get_by_role("heading", level=1)).to_have_text("Attention", timeout=PATIENCE_MS)
    visitor.settle()
    expect(visitor.page).to_have_url(re.compile("block=5"), timeout=PATIENCE_MS)


def test_start_loads_the_script_for_figures_before_one_is_drawn(visitor: Visitor) -> None:
    visitor.open("/")
    expect(visitor.page.locator(".stPlotlyChart")).to_have_count(0)
    visitor.page.wait_for_function(
        "() => performance.getEntriesByType('resource').some(({ name }) => name.includes('PlotlyChart'))",
        timeout=PATIENCE_MS,
    )


@pytest.mark.parametrize(
    ("page", "key", "view"),
    [
        ("start", "measure", "parameters"),
        ("routing", "show", "Flow"), ("routing", "show", "Pairs"), ("routing", "show", "Margin"),
        ("specialization", "specialization", "Token classes"),
        ("specialization", "specialization", "Texts of an expert"),
        ("workspace", "workspace", "Writes"), ("workspace", "workspace", "Your prompt"),
        ("memory", "memory", "Dead rows"),
        ("state", "state", "Half-lives"), ("state", "state", "As attention"), ("attention", "attention", "Your prompt"),
    ],
)  # fmt: skip
def test_a_view_is_drawn_from_its_link(visitor: Visitor, page: str, key: str, view: str) -> None:
    visitor.open(f"/{page}?{key}={view}")
    expect(visitor.page.get_by_role("radio", name=view, exact=True)).to_be_checked()
    visitor.photograph(f"{page}-{view.lower().replace(' ', '-')}")


def test_five_visitors_at_once_get_their_own_answers(browser: Browser, server: str) -> None:
    """Each with another intervention; the shift that a visitor sees is that of the same link opened alone."""
    links = [f"/intervene?intervene=moe[0].ablate(expert={expert})" for expert in range(5)]

    def shift(visitor: Visitor) -> str:
        metric = visitor.page.locator("[data-testid=stMetric]", has_text="shift of the predictions")
        expect(metric).to_be_visible(timeout=PATIENCE_MS)
        return metric.locator("[data-testid=stMetricValue]").inner_text()

    visitors = [Visitor(browser.new_page(), server) for _ in links]
    for visitor, link in zip(visitors, links, strict=True):
        visitor.page.goto(server + link, wait_until="commit")
    together = []
    for visitor in visitors:
        together.append(shift(visitor))
        visitor.settle()
        visitor.page.close()
    alone = []
    for link in links:
        visitor = Visitor(browser.new_page(), server)
        visitor.page.goto(server + link)
        alone.append(shift(visitor))
        visitor.page.close()
    assert together == alone and len(set(together)) > 1


@pytest.mark.parametrize(
    "text",
    ["nul \0 byte", "שלום עולם\u202e", "🙂👩‍🚀 emoji", "<script>alert(1)</script>"],
    ids=["nul", "rtl", "emoji", "markup"],
)  # fmt: skip
def test_odd_text_is_drawn(visitor: Visitor, text: str) -> None:
    visitor.open("/prompt")
    box = visitor.page.get_by_role("textbox", name="Prompt", exact=True)
    box.fill(text)
    box.press("Control+Enter")
    visitor.settle()
    assert visitor.page.locator(".hydra-token").count() > 0


def test_a_prompt_of_a_megabyte_gets_one_message(visitor: Visitor) -> None:
    visitor.open("/prompt")
    visitor.page.get_by_role("textbox", name="Prompt", exact=True).fill("word " * 220_000)
    visitor.page.get_by_role("textbox", name="Prompt", exact=True).press("Control+Enter")
    boxes = visitor.page.locator(ERROR_BOXES)
    expect(boxes).to_have_count(1, timeout=PATIENCE_MS)
    expect(boxes).to_contain_text("shorten it")


def test_a_model_that_cannot_be_loaded_gets_one_message(visitor: Visitor) -> None:
    visitor.open("/")
    field = visitor.page.get_by_role("textbox", name="Open another")
    field.fill("/no/such/model")
    field.press("Enter")
    boxes = visitor.page.locator(ERROR_BOXES)
    expect(boxes).to_have_count(1, timeout=PATIENCE_MS)
    expect(boxes).to_contain_text("no model")


def test_an_empty_prompt_gets_one_message(visitor: Visitor) -> None:
    visitor.open("/prompt")
    box = visitor.page.get_by_role("textbox", name="Prompt", exact=True)
    box.fill("")
    box.press("Control+Enter")
    boxes = visitor.page.locator(ERROR_BOXES)
    expect(boxes).to_have_count(1, timeout=PATIENCE_MS)
    expect(boxes).to_contain_text("The prompt is empty")


def test_a_file_that_is_not_text_gets_one_message(visitor: Visitor) -> None:
    visitor.open("/prompt")
    visitor.page.get_by_role("button", name="From a file").click()
    visitor.page.locator("input[type=file]").set_input_files(
        {"name": "notes.bin", "mimeType": "application/octet-stream", "buffer": b"abc\xff\xfe"}
    )
    visitor.page.get_by_role("button", name="Use it").click()
    boxes = visitor.page.locator(ERROR_BOXES)
    expect(boxes).to_have_count(1, timeout=PATIENCE_MS)
    expect(boxes).to_contain_text("notes.bin is not UTF-8 text")
