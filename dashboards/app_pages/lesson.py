"""Lesson: one lesson of the course, to read; the notebook itself runs in JupyterLab."""

import json
import re
from pathlib import Path

import streamlit as st

from dashboards.shared.page import NOTEBOOKS, lessons
from dashboards.shared.selection import linked

FOLDED = re.compile(r"<details>\s*<summary>(.*?)</summary>(.*)</details>\s*", re.DOTALL)
LINK_TO_FILE = re.compile(r"\[([^\]]+)\]\((?!https?://)[^)]*\)")
"""A link beside the notebook, which leads nowhere from this page."""


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
    if folded := FOLDED.fullmatch(source):
        with st.expander(folded[1]):
            st.markdown(folded[2])
    elif kind == "markdown":
        st.markdown(LINK_TO_FILE.sub(r"\1", source))
    else:
        st.code(source, language="python")
