"""The dashboard: `streamlit run dashboards/app.py -- [MODEL|RUN.zarr]...`, or `hydra-lab dashboard`."""

import sys
from pathlib import Path
from typing import Any

import streamlit as st

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # Streamlit puts this folder on the path, not the one that holds it
    sys.path.insert(0, ROOT)

from dashboards.shared.changes import show_changes  # noqa: E402
from dashboards.shared.charts import style  # noqa: E402
from dashboards.shared.selection import read_address, write_address  # noqa: E402
from dashboards.shared.sources import Shown, loaded_model  # noqa: E402
from dashboards.shared.view import choose_view  # noqa: E402

# Under each heading: file in app_pages/ (and path in the address), title, icon.
PAGES = {
    "": [("start", "Start", "home")],
    "One prompt": [("prompt", "Prompt", "edit"), ("intervene", "Intervene", "science")],
    "Its decisions": [
        ("routing", "Routing", "call_split"),
        ("specialization", "Specialization", "target"),
        ("workspace", "Workspace", "view_week"),
        ("memory", "Memory", "grid_on"),
        ("state", "State", "timeline"),
        ("attention", "Attention", "visibility"),
    ],
    "Beyond one model": [
        ("compare", "Compare", "compare_arrows"),
        ("training", "Training", "trending_up"),
        ("kernels", "Kernels", "speed"),
    ],
}


def page_of(name: str, title: str, icon: str) -> Any:
    start = name == "start"
    return st.Page(
        f"app_pages/{name}.py", title=title, icon=f":material/{icon}:", default=start, url_path=None if start else name
    )  # fmt: skip


def main() -> None:
    st.set_page_config(
        page_title="Hydra lab", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide"
    )
    style()
    pages = {heading: [page_of(*page) for page in group] for heading, group in PAGES.items()}
    pages[""].append(st.Page("app_pages/lesson.py", title="Lesson", url_path="lesson", visibility="hidden"))
    page = st.navigation(pages, expanded=True)
    read_address(page.url_path)
    try:
        view = choose_view(Shown.of_arguments(sys.argv[1:]))
        with st.sidebar:
            show_changes(None if view.model is None else loaded_model(view.model).model.config)
        page.run()
    except (ValueError, OSError) as error:  # what a user can mend; the message says how
        st.error(str(error), icon=":material/error:")
    finally:
        write_address()


main()
