"""Ask a fact, edit it in the memory, and see what else moved."""

from typing import Any

import streamlit as st
import torch

from dashboards.shared.changes import changes_in_force, put_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.jobs import Job, find_job, show_job, start_job
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import current_job, current_model
from hydra_lab import figures
from hydra_lab.attribution import FactEdit, edit_fact
from hydra_lab.interventions import Intervention, intervened
from hydra_lab.locks import model_lock
from hydra_lab.widgets.text import token_texts, visible

QUESTION = "Q: capital of France? A:"
ANSWER = " Rome"
OTHERS = """Q: capital of Peru? A:
Q: capital of Japan? A:
Q: currency of France? A:
capital of France:"""
ANSWER_TOKENS = 4
MOST_OTHERS = 20


def show_facts(layer: int) -> None:
    """Draw the form, and what the edit of a fact in block `layer` did."""
    loaded = current_model()
    left, right = st.columns(2)
    with left:
        question = st.text_input("Question", key=linked("question", None, QUESTION))
        answer = st.text_input(
            "New answer", key=linked("answer", None, ANSWER),
            help="With its space in front, as the model would write it."
        )  # fmt: skip
    with right:
        others = st.text_area(
            "Other questions, one per line, that ought to stay as they are", height=130,
            key=linked("others", None, OTHERS),
        )  # fmt: skip
    asked = [line for line in others.splitlines() if line.strip()]
    if not question or not answer or len(asked) > MOST_OTHERS:
        raise ValueError(f"Give a question, an answer, and at most {MOST_OTHERS} other questions.")
    in_force = changes_in_force()
    key = ("fact", loaded.weights_hash, layer, question, answer, tuple(asked), tuple(map(str, in_force)))
    st.button(
        "Edit the fact", type="primary", key="edit-fact", on_click=start_job,
        args=(key, "Editing the fact", lambda job: _edit(job, loaded, layer, question, answer, asked, in_force)),
        help="Optimises the 16 value rows that the question reads most, and asks everything before and after.",
    )  # fmt: skip
    job = find_job(key)
    if job is None:
        return
    if job.result is None:
        show_job(job)
        return
    _show_edit(loaded, layer, *job.result)


def _edit(
    job: Job,
    loaded: LoadedModel,
    layer: int,
    question: str,
    answer: str,
    others: list[str],
    in_force: tuple[Intervention, ...],
) -> tuple[FactEdit, list[dict[str, str]]]:
    """The edit, and the answers to all questions without and with it."""
    model = loaded.model
    with model_lock(model), intervened(model, *in_force):
        job.note(0.05, "optimising the rows")
        edit = edit_fact(model, loaded.tokenizer, question, answer, layer=layer)
        rows: list[dict[str, str]] = []
        for index, each in enumerate([question, *others]):
            job.note(0.5 + 0.5 * index / (1 + len(others)), "asking the questions")
            before = _answer(loaded, each)
            with edit.applied(model):
                after = _answer(loaded, each)
            rows.append(
                {
                    "question": each,
                    "before": before,
                    "with the edit": after,
                    "moved": "yes" if before != after else "",
                }
            )
    return edit, rows


def _answer(loaded: LoadedModel, question: str) -> str:
    """The likeliest continuation."""
    ids = loaded.tokenizer(question, return_tensors="pt").input_ids.to(loaded.model.device)
    with torch.no_grad():
        written = loaded.model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    text: str = loaded.tokenizer.decode(written[0, ids.shape[1] :])
    return text.split("\n")[0]


def _show_edit(loaded: LoadedModel, layer: int, edit: FactEdit, rows: list[dict[str, str]]) -> None:
    moved = sum(row["moved"] == "yes" for row in rows[1:])
    st.markdown(
        f"The answer {'holds' if edit.achieved else '**does not hold**'}: its probability went from "
        f"{edit.previous_probability:.3f} to {edit.probability:.3f}, with {len(edit.addresses)} rows of block {layer} "
        f"rewritten. {moved} of {len(rows) - 1} other answers moved."
    )
    left, right = st.columns(2)
    with left:
        st.dataframe(rows, hide_index=True, key="answers")
        st.button(
            "Put the edit in force", icon=":material/science:", key="fact-in-force", on_click=put_in_force,
            args=([*changes_in_force(), *edit.interventions()],), help="All pages then run the model with it.",
        )  # fmt: skip
    with right:

        def label(token: int) -> str:
            return visible(token_texts(loaded.tokenizer, [token])[0])

        options: Any = {"path_use": current_job().path_use, "theme": theme()}
        chart(figures.edit_fact(edit, label, **options), "edit")
