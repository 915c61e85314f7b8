"""What every page begins with: the question that it answers, how to read it, and the lesson that explains it."""

from pathlib import Path

import streamlit as st

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def introduce(title: str, question: str, reading: str, lesson: str) -> None:
    """Draw a page's heading.

    Args:
        question: that the page answers.
        reading: one sentence of how to read it.
        lesson: stem of the source in notebooks/, such as "05_chunk_experts".
    """
    st.title(title)
    with st.container(horizontal=True, vertical_alignment="top", gap="medium", key="introduction"):
        st.markdown(f"**{question}** {reading}", width="stretch")
        if lesson not in lessons():
            return
        st.page_link(
            "app_pages/lesson.py", label=f"Lesson {lesson[:2]}", icon=":material/school:",
            query_params={"lesson": lesson}, help="Read the lesson that explains this page.",
        )  # fmt: skip


def lessons() -> list[str]:
    """Names of all lessons, in order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
