"""The dashboard: `streamlit run dashboards/app.py -- [MODEL|RUN.zarr]...`, or `hydra-lab dashboard`."""

import sys
from pathlib import Path

import streamlit as st

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # Streamlit puts this folder on the path, not the one that holds it
    sys.path.insert(0, ROOT)

from dashboards.shared.charts import style  # noqa: E402
from dashboards.shared.sources import Shown  # noqa: E402
from dashboards.shared.view import choose_view  # noqa: E402

st.set_page_config(page_title="Hydra lab", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
style()
page = st.navigation(
    [
        st.Page("app_pages/start.py", title="Start", icon=":material/home:", default=True),
        st.Page("app_pages/prompt.py", title="Prompt", icon=":material/edit:", url_path="prompt"),
        st.Page("app_pages/routing.py", title="Routing", icon=":material/call_split:", url_path="routing"),
        st.Page("app_pages/memory.py", title="Memory", icon=":material/grid_on:", url_path="memory"),
        st.Page("app_pages/state.py", title="State", icon=":material/timeline:", url_path="state"),
    ]
)
try:
    choose_view(Shown.of_arguments(sys.argv[1:]))
    page.run()
except (ValueError, OSError) as error:  # what a user can mend; the message says how
    st.error(str(error), icon=":material/error:")
