"""What is picked on one page is shown on the next, and stands in the address."""

from collections.abc import Callable
from pathlib import Path

from streamlit.testing.v1 import AppTest

OpenApp = Callable[..., AppTest]


def test_a_block_picked_on_one_page_is_shown_on_the_next(open_app: OpenApp) -> None:
    app = open_app("state")
    chosen = app.segmented_control(key="block").options[-1]
    app.segmented_control(key="block").set_value(int(chosen)).run()
    assert app.query_params["block"] == str(chosen)
    app.switch_page("app_pages/memory.py").run()
    app.switch_page("app_pages/state.py").run()
    assert app.segmented_control(key="block").value == int(chosen)
    assert app.query_params["block"] == str(chosen)


def test_a_row_survives_pages_that_do_not_show_it(open_app: OpenApp) -> None:
    app = open_app("memory", row="7")
    assert app.number_input(key="row").value == 7
    app.switch_page("app_pages/start.py").run()
    assert app.query_params["row"] == "7", "the address lost it"
    app.switch_page("app_pages/memory.py").run()
    assert app.number_input(key="row").value == 7


def test_what_is_out_of_range_gives_way(open_app: OpenApp) -> None:
    app = open_app("memory", row="99999999")
    assert not app.exception and not app.error
    assert app.number_input(key="row").value == app.number_input(key="row").max
    app = open_app("routing", show="no such view", domains="nobody")
    assert not app.exception and not app.error
    assert app.segmented_control(key="show").value == "Load"
    assert app.pills(key="domains").value == []


def test_another_model_is_opened_from_the_sidebar(open_app: OpenApp, tmp_path: Path) -> None:
    from tests.dashboards.conftest import write_model

    other = write_model(tmp_path / "other")
    app = open_app("start")
    app.text_input(key="to_open").set_value(str(tmp_path / "nothing")).run()
    assert not app.exception and "no model" in app.error[0].value
    app.text_input(key="to_open").set_value(str(other)).run()
    assert not app.exception and not app.error
    assert app.selectbox(key="model").value == str(other)
    assert app.query_params["open"] == str(other)
