"""Lesson: one lesson of the course, to read; the notebook itself runs in JupyterLab."""

import json
from pathlib import Path

import streamlit as st

from dashboards.shared.page import NOTEBOOKS, lessons
from dashboards.shared.selection import linked


@st.cache_data(max_entries=32)
def cells_of(path: str, changed: int) -> list[tuple[str, str]]:
    """Kind ("markdown" or "code") and source of each cell."""
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


names = lessons()
name = st.selectbox("Lesson", names, key=linked("lesson", names))
st.info(f"To run it: `hydra-lab notebook {name[:2]}`, or `make notebook`.", icon=":material/play_circle:")
path = NOTEBOOKS / f"{name}.ipynb"
for kind, source in cells_of(str(path), path.stat().st_mtime_ns):
    if kind == "markdown":
        st.markdown(source)
    else:
        st.code(source, language="python")
