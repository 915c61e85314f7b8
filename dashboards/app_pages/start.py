"""Start: what is loaded, where its parameters and compute sit, and which of its paths it uses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.components import block_diagram, load_plotly_when_idle
from dashboards.shared.page import introduce
from dashboards.shared.prompt import describe_prompt, prompt_ids, trace
from dashboards.shared.sample_capture import show_sample_job
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import current_job, current_model, current_view, fragment
from hydra_lab.accounting import flops_per_token, parameter_table, state_bytes
from hydra_lab.capture import open_capture
from hydra_lab.figures.accounting import flops, parameters
from hydra_lab.figures.path_use import path_use
from hydra_lab.figures.theme import quantity
from hydra_lab.metrics import captured_path_use
from hydra_lab.widgets import block_diagram_payload, cost_diagram_payload

PAGE_OF_PATH = {
    "ssm": "state", "attention": "attention", "moe": "routing", "workspace": "workspace", "memory": "memory",
}  # fmt: skip
UPDATE, PARAMETERS, COMPUTE, STATE = "share of the update", "parameters", "FLOPs per token", "bytes of state"
MEASURES = (UPDATE, PARAMETERS, COMPUTE, STATE)
CONTEXTS = (1024, 8192, 65536)
WHAT_PATHS_DO = {
    "ssm": "a state of fixed size, carried from token to token (Mamba-2)",
    "attention": "the recent window, the first block and a few selected earlier blocks",
    "moe": "experts, chosen once for each chunk of tokens",
    "workspace": "slots that every chunk writes and later tokens read",
    "memory": "a table of learned values, read by product keys",
}


def show_model(loaded: LoadedModel) -> None:
    config = loaded.model.config
    table = parameter_table(config)
    st.markdown(
        f"**{loaded.name}** is a Hydra language model of **{quantity(table.total, '')}** parameters, of which "
        f"**{quantity(table.active, '')}** are active for one token: **{config.num_hidden_layers}** blocks of width "
        f"**{config.hidden_size}**, and a vocabulary of **{config.vocab_size:,}** tokens. It was read from "
        f"`{loaded.directory}`."
    )


@fragment
def show_blocks(loaded: LoadedModel) -> None:
    """The block diagram: each path's share of its block's update on the prompt, or what it costs; a click goes to the
    path's page."""
    config = loaded.model.config
    measure = st.segmented_control(
        "Show of every path", MEASURES, required=True, key=linked("measure", MEASURES)
    )
    figure = None
    if measure == UPDATE:
        ids = prompt_ids(loaded)
        describe_prompt(loaded, ids)
        use = captured_path_use(trace(loaded, ids, changes_in_force()).capture)
        payload = block_diagram_payload(
            use.layers, use.paths, use.share, gates=gates_of(loaded.model), theme=theme()
        )
    elif measure == PARAMETERS:
        table = parameter_table(config)
        payload = cost_diagram_payload(table, theme=theme())
        figure = parameters(table, theme=theme())
    else:
        context = st.segmented_control(
            "Context", CONTEXTS, required=True, format_func="{:,} tokens".format, key=linked("context", CONTEXTS),
        )  # fmt: skip
        assert context is not None
        if measure == COMPUTE:
            table = flops_per_token(config, context)
            payload = cost_diagram_payload(table, theme=theme())
            figure = flops(table, theme=theme())
        else:
            st.caption("What decoding keeps of one sequence, in fp32.")
            payload = cost_diagram_payload(state_bytes(config, context), theme=theme())
    st.caption("Click a path to open its page.")
    if chosen := block_diagram(payload, "blocks"):
        layer, path = chosen
        st.switch_page(f"app_pages/{PAGE_OF_PATH[path]}.py", query_params={"block": str(layer)})
    for path, page in PAGE_OF_PATH.items():
        if blocks := config.layers_with(path):
            where = f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"
            st.page_link(f"app_pages/{page}.py", label=f"**{path}**, {where}: {WHAT_PATHS_DO[path]}")
    if figure is not None:
        chart(figure, "costs")


def gates_of(model: Any) -> dict[tuple[int, str], float]:
    """Gate g of every block and path."""
    return {
        (index, path): block.gates[path].item()
        for index, block in enumerate(model.model.layers)
        for path in block.paths
    }


@fragment
def show_more(loaded: LoadedModel) -> None:
    """What is known of the model beyond its diagram, one view at a time."""
    training, evaluation = (_read(loaded.directory / name) for name in ("training.json", "evaluation.json"))
    views: dict[str, Callable[[], None]] = {}
    if evaluation is not None:
        views["What it can do"] = lambda: show_abilities(evaluation)
    views["Use of its paths"] = show_path_use
    if training is not None:
        views["Training"] = lambda: show_training(training)
    view = st.segmented_control(
        "More of the model", list(views), required=True, key=linked("about", list(views))
    )
    assert view is not None
    views[view]()


def show_path_use() -> None:
    job = current_job()
    if job.running:
        show_sample_job(job)
    if job.path_use is not None:
        figure = path_use(job.path_use, theme=theme())
        chart(figure, "path-use")
    elif not job.has_texts:
        st.info(
            f"Path use is not known for {job.loaded.name}: measure it with `hydra-lab info {job.loaded.name} "
            "--text FILE --record`."
        )
    elif job.error:
        show_sample_job(job)


def show_training(training: Any) -> None:
    """How the model was made, run by run."""
    for run in (*training["earlier"], training):
        st.markdown(f"{run['steps']:,} steps on {run['tokens'] / 1e6:,.1f} M tokens, seed {run['seed']}:")
        st.code(run["command"], language="bash", wrap_lines=True)


def show_abilities(evaluation: Any) -> None:
    """What the model can do on held-out text."""
    left, right = st.columns(2)
    left.markdown(
        _table(
            ("domain", "bits per byte", "bytes"),
            [
                (row["domain"], f"{row['bits_per_byte']:.3f}", f"{row['num_bytes']:,}")
                for row in evaluation["domains"]
            ],
        )
    )
    right.markdown(
        _table(
            ("questions", "right", "chance", "n"),
            [
                (
                    f"{row['task']}: {row['group']}", f"{row['accuracy']:.1%}", f"{row['chance']:.1%}",
                    f"{row['num_questions']:,}",
                )
                for row in evaluation["answers"]
            ],
        )
    )  # fmt: skip


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, which a page draws without loading Streamlit's script for tables."""
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


introduce(
    "Hydra lab",
    "What is loaded, and where do its parameters, its compute and its updates sit?",
    "Look at how much a path is used before you believe a picture of its decisions.",
    "01_residual_stream",
)
view = current_view()
if view.model is not None:
    loaded = current_model()
    show_model(loaded)
    show_blocks(loaded)
    show_more(loaded)
    current_job()  # begins now what the next pages show
if view.shown.captures:
    st.subheader("Captures")
    opened = [open_capture(path) for path in view.shown.captures]
    st.markdown(
        _table(
            ("capture", "made by", "tokens", "samples", "holds", "complete"),
            [
                (
                    f"`{each.path}`", each.attributes["model_name"] or "a model without a name",
                    f"{each.num_tokens:,}", f"{each.num_samples:,}", ", ".join(each.groups),
                    "yes" if each.complete else "no",
                )
                for each in opened
            ],
        )
    )  # fmt: skip
load_plotly_when_idle()
