"""Intervene: compose interventions, and see the untouched and the changed model side by side."""

import dataclasses
from typing import Any

import numpy as np
import streamlit as st

from dashboards.shared.changes import changes_in_force, put_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.colouring import choose_signal, choose_token, draw_tokens
from dashboards.shared.components import load_plotly_when_idle
from dashboards.shared.generation import Writer
from dashboards.shared.jobs import Job, find_job, show_job, start_job
from dashboards.shared.page import introduce
from dashboards.shared.prompt import ask_for_prompt, encode, trace
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import current_model, fragment
from hydra_lab.capture.path_use import sample_losses
from hydra_lab.data.sample_texts import SAMPLES_FILE, read_sample_texts
from hydra_lab.data.samples import samples_from_texts
from hydra_lab.figures import text as text_figures
from hydra_lab.figures.loss import loss_difference
from hydra_lab.interventions import EditValue, Intervention, PatchState, intervened, parse
from hydra_lab.interventions.text import ACTIONS, ACTIONS_OF_ANY_PATH
from hydra_lab.locks import model_lock
from hydra_lab.widgets.text import token_texts, visible

PATH_ORDER = ("moe", "memory", "workspace", "attention", "ssm")
MADE_ELSEWHERE = (PatchState, EditValue)
"""Changes whose arguments are whole arrays: the pages State and Memory make them."""
VIEWS = ("Tokens", "Generation", "Loss by domain")
SAMPLES, SAMPLE_TOKENS = 8, 256
"""Held-out texts per domain, and tokens of each, on which the loss is measured."""
MOST_WRITTEN = 200


@fragment
def compose(loaded: LoadedModel) -> None:
    """A form for one change, and a field for any text of the vocabulary."""
    config = loaded.model.config
    paths = [path for path in PATH_ORDER if config.layers_with(path)]
    columns = st.columns(3)
    with columns[0]:
        path = st.selectbox("Path", paths, key=linked("path", paths))
    with columns[1]:
        blocks = [*map(str, config.layers_with(path)), "*"]
        block = st.selectbox(
            "Block", blocks, key=linked("changed_block", blocks),
            format_func=lambda each: "every block" if each == "*" else each
        )  # fmt: skip
    with columns[2]:
        kinds = {
            kind.action: kind for kind in (*ACTIONS[path], *ACTIONS_OF_ANY_PATH) if kind not in MADE_ELSEWHERE
        }
        action = st.selectbox("Change", list(kinds), key=linked("action", list(kinds)))
    given: dict[str, str] = {}
    defaults = kinds[action].argument_defaults()
    for place, (name, default) in zip(st.columns(3), defaults.items(), strict=False):
        with place:
            hint = "a value" if default is dataclasses.MISSING else str(default)
            given[name] = st.text_input(name, key=linked(f"argument_{name}", None, ""), placeholder=hint)
    arguments = ", ".join(f"{name}={value}" for name, value in given.items() if value.strip())
    text = f"{path}[{block}].{action}({arguments})"
    st.caption(f"`{text}`: {(kinds[action].__doc__ or '').strip().splitlines()[0]}")
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    with left:
        st.button("Add it", type="primary", key="add-change", on_click=_add_composed, args=(loaded, text))
    with right:
        st.text_input(
            "Or as text", key="typed_change", placeholder="moe[0].ablate(expert=2); memory[*].cut()",
            on_change=_add_typed, args=(loaded,),
            help="Enter adds it. `python -m pydoc hydra_lab.interventions` lists the vocabulary.",
        )  # fmt: skip
    if problem := st.session_state.pop("change problem", None):
        st.error(problem, icon=":material/error:")


def _add_composed(loaded: LoadedModel, text: str) -> None:
    _add(loaded, text)


def _add_typed(loaded: LoadedModel) -> None:
    text = st.session_state["typed_change"]
    if text.strip() and _add(loaded, text):
        st.session_state["typed_change"] = ""


def _add(loaded: LoadedModel, text: str) -> bool:
    """Put `text` in force beside the others; whether it could be."""
    try:
        changes = parse(text)
        for change in changes:
            change.blocks_in(loaded.model.config)
    except (ValueError, TypeError) as error:
        st.session_state["change problem"] = str(error)
        return False
    put_in_force([*changes_in_force(), *changes])
    return True


@fragment
def show(loaded: LoadedModel, ids: tuple[int, ...], changes: tuple[Intervention, ...]) -> None:
    view = st.segmented_control("Show", VIEWS, required=True, key=linked("intervention", VIEWS))
    if view == "Tokens":
        show_tokens(loaded, ids, changes)
    elif view == "Generation":
        show_generation(loaded, ids, changes)
    else:
        show_loss(loaded, changes)


def show_tokens(loaded: LoadedModel, ids: tuple[int, ...], changes: tuple[Intervention, ...]) -> None:
    runs = {"Untouched": trace(loaded, ids), "With the interventions": trace(loaded, ids, changes)}
    untouched, changed = runs.values()
    with st.container(horizontal=True, gap="medium"):
        if len(ids) > 1:
            st.metric("loss, nats per token", f"{untouched.mean_loss:.3f}", width="content")
            st.metric(
                "loss with the interventions", f"{changed.mean_loss:.3f}", width="content",
                delta=f"{changed.mean_loss - untouched.mean_loss:+.3f}", delta_color="inverse",
            )  # fmt: skip
        st.metric(
            "shift of the predictions, nats", f"{changed.divergence.mean():.3f}", width="content",
            help="Mean over tokens of the KL divergence from the untouched next-token distribution to the changed one.",
        )  # fmt: skip
    left, right = st.columns(2)
    with left:
        signal = choose_signal(loaded.model.config, changed=True, first="shift of the prediction")
    with right:
        position = choose_token(len(ids))
    texts = token_texts(loaded.tokenizer, ids)
    largest = max(float(run.probability[position, 0]) for run in runs.values())
    traces = list(runs.values())
    for index, (column, (title, run)) in enumerate(zip(st.columns(2), runs.items(), strict=True)):
        with column:
            st.markdown(f"**{title}**")
            draw_tokens(traces, index, texts, signal, position, f"tokens-{index}")
            result = run.next_tokens(position, ids)
            labels = [visible(each) for each in token_texts(loaded.tokenizer, result.tokens.tolist())]
            chart(text_figures.next_tokens(result, labels, largest=largest, theme=theme()), f"next-{title}")


def show_generation(loaded: LoadedModel, ids: tuple[int, ...], changes: tuple[Intervention, ...]) -> None:
    columns = st.columns(3)
    with columns[0]:
        count = st.number_input(
            "Tokens to write", 1, MOST_WRITTEN, step=1, key=linked("written", range(1, MOST_WRITTEN + 1), 40)
        )
    with columns[1]:
        temperature = st.slider(
            "Temperature", 0.0, 2.0, step=0.1, key="temperature", help="0 takes the likeliest token each time."
        )  # fmt: skip
    with columns[2]:
        seed = st.number_input("Seed", 0, 9999, step=1, key=linked("seed", range(10000), 0))
    if not st.button("Write both", type="primary", key="write"):
        return
    for column, (title, each) in zip(
        st.columns(2), {"Untouched": (), "With the interventions": changes}.items(), strict=True
    ):
        with column:
            st.markdown(f"**{title}**")
            writer = Writer(
                loaded, ids, each, num_tokens=int(count), temperature=temperature, seed=int(seed)
            )  # fmt: skip
            place, written = st.empty(), ""
            for piece in writer:
                written += piece
                place.code(written, language=None, wrap_lines=True)
            if not written:
                place.caption("The model ended the text at once.")


def show_loss(loaded: LoadedModel, changes: tuple[Intervention, ...]) -> None:
    if not (loaded.directory / SAMPLES_FILE).is_file():
        st.info(
            f"{loaded.name} brings no sample texts: capture files with and without the interventions "
            f"(`hydra-lab capture "
            "... --intervene TEXT`) and open both on the page Compare."
        )
        return
    key = ("loss by domain", loaded.weights_hash, tuple(map(str, changes)))
    st.button(
        "Measure", type="primary", key="measure-loss", on_click=start_job,
        args=(key, "Loss by domain", lambda job: measure_loss(job, loaded, changes)),
        help=f"On {SAMPLES} held-out texts per domain, without and with the interventions.",
    )  # fmt: skip
    job = find_job(key)
    if job is not None and job.result is not None:
        names, difference = job.result
        chart(loss_difference(names, difference, theme=theme()), "loss-difference")
    elif job is not None:
        show_job(job)


def measure_loss(
    job: Job, loaded: LoadedModel, changes: tuple[Intervention, ...]
) -> tuple[list[str], list[Any]]:
    """Domains, and for each the difference of the loss of every sample, nats per token."""
    texts = read_sample_texts(loaded.directory)
    differences: list[Any] = []
    for index, (domain, each) in enumerate(texts.items()):
        job.note(index / len(texts), domain)
        samples = samples_from_texts(
            {domain: each[:SAMPLES]}, loaded.tokenizer, num_tokens=SAMPLE_TOKENS, num_samples=SAMPLES
        )
        before = sample_losses(loaded.model, samples)
        with model_lock(loaded.model), intervened(loaded.model, *changes):
            after = sample_losses(loaded.model, samples)
        differences.append((after - before)[~np.isnan(before)])
    return list(texts), differences


introduce(
    "Intervene",
    "What does the model do when you overwrite what it decides?",
    "What you add holds on every page until you remove it in the sidebar; both runs read the same prompt.",
    "10_ablate_force_patch",
)
loaded = current_model()
text = ask_for_prompt(loaded, height=90)
ids = encode(loaded.tokenizer, text)
compose(loaded)
in_force = changes_in_force()
if in_force:
    show(loaded, ids, in_force)
else:
    st.info("Nothing is changed yet: add a change above, for example “ablate” with expert 2.")
    load_plotly_when_idle()
