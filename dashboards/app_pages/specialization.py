"""Specialization: what each expert is for, by domain, token class and text, beside what removing it costs."""

from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.charts import chart, theme
from dashboards.shared.contexts import draw_contexts, known_tokenizer
from dashboards.shared.jobs import Job, find_job, show_job, start_job
from dashboards.shared.page import introduce
from dashboards.shared.results import draw, measured, source
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import (
    CaptureKey,
    OpenCapture,
    choose_block,
    current_capture,
    current_model,
    describe_capture,
    fragment,
    has_group,
    has_raw,
)
from hydra_lab import figures, metrics
from hydra_lab.capture import open_capture
from hydra_lab.data.sample_texts import SAMPLES_FILE, read_sample_texts
from hydra_lab.data.samples import samples_from_texts
from hydra_lab.metrics.arrays import domain_codes
from hydra_lab.probing.experts import cost_of_each_expert, observe_routing
from hydra_lab.widgets.text import token_texts

VIEWS = ("Domains", "Token classes", "Texts of an expert", "Cost of removal")
SAMPLES = 4
"""Held-out texts per domain on which removal is measured."""
MOST_TOKENS = 256
"""Tokens of each of them."""
BATCH_SIZE = 8


@fragment
def show(opened: OpenCapture) -> None:
    view = st.segmented_control("Show", VIEWS, required=True, key=linked("specialization", VIEWS))
    if view == "Domains":
        draw(opened, "routing", "expert_by_domain")
        by_domain = measured(opened, "routing", "expert_by_domain")
        result = metrics.specialization(by_domain)
        chart(figures.specialization(result, path_use=opened.path_use, theme=theme()), "specialization-score")
        show_null(opened)
    elif view == "Token classes":
        show_classes(opened)
    elif view == "Texts of an expert":
        layer = choose_block("Block", opened.layers_of("routing"))
        experts = range(int(opened.capture.attributes["config"]["moe_num_experts"]))
        expert = st.segmented_control(
            "Expert", list(experts), required=True, key=linked("expert", list(experts))
        )
        assert expert is not None
        chunk = int(opened.capture.attributes["config"]["moe_chunk_size"])
        draw_contexts(opened, "expert", layer, expert, after=chunk - 1)
    else:
        show_cost(opened)


def show_null(opened: OpenCapture) -> None:
    """Whether the domains explain more of the choices than shuffled domains do."""
    if not has_raw(opened, "routing", "The test against shuffled domains"):
        return
    tests = null_tests(opened.key, opened.rows)
    st.markdown(
        "**Against the null:** do the domains tell more about the chosen experts than shuffled ones do?"
    )
    st.dataframe(tests, hide_index=True, key="null")
    st.caption(
        "Domains are shuffled over whole samples, whose chunks depend on each other; p is one-sided, "
        "corrected (Holm) over "
        "the blocks. For random routers and the other controls: `hydra-lab probe expert-specialization`."
    )


@st.cache_data(max_entries=8, show_spinner="Testing against shuffled domains …")
def null_tests(key: CaptureKey, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """One row per block."""
    record = metrics.routing_record(open_capture(key[0]), samples=rows, weights=False)
    names, domain_N = domain_codes(record.domains)
    if len(names) < 2:
        raise ValueError(
            f"All samples are of one domain ({record.domains[0]}), and the test compares at least two."
        )
    counts_YNE = np.asarray(record.chosen.sum(axis=2)).astype(np.float64)
    found = [metrics.information_of_groups(counts, domain_N) for counts in counts_YNE]
    corrected = metrics.holm(np.array([each.p_value for each in found]))
    return [
        {
            "block": layer,
            "mutual information, nats": round(each.value, 4),
            "of shuffled domains, mean": round(float(each.null.mean()), 4),
            "beyond it (95%)": f"{each.corrected:.4f} ({each.interval[0]:.4f} to {each.interval[1]:.4f})",
            "p, corrected": round(float(p), 4),
            "samples": each.num_samples,
        }
        for layer, each, p in zip(record.layers, found, corrected, strict=True)
    ]


def show_classes(opened: OpenCapture) -> None:
    tokenizer = known_tokenizer(opened)
    if tokenizer is None:
        return
    if opened.whole is None and not has_raw(opened, "routing", "The choice of experts by token class"):
        return
    special = set(tokenizer.all_special_ids)
    classes = metrics.token_classes(token_texts(tokenizer, range(len(tokenizer))), special)
    routing = source(opened, "routing")
    result = metrics.expert_by_token_class(routing, classes)
    chart(figures.expert_by_token_class(result, path_use=opened.path_use, theme=theme()), "token-classes")


def show_cost(opened: OpenCapture) -> None:
    """The loss by domain without each expert of a block, beside how often the domain chooses it."""
    loaded = current_model()
    if not (loaded.directory / SAMPLES_FILE).is_file():
        st.info(
            f"{loaded.name} brings no sample texts: `hydra-lab probe expert-ablation {loaded.name} --help` says how."
        )
        return
    key = ("expert cost", loaded.weights_hash)
    st.button(
        "Measure", type="primary", key="measure-cost", on_click=start_job,
        args=(key, "Removing the experts", lambda job: measure_cost(job, loaded)),
        help=f"Removes one expert after another, on {SAMPLES} held-out texts per domain.",
    )  # fmt: skip
    job = find_job(key)
    if job is None:
        st.info(
            "Not measured yet, and it takes about a minute. The full study, with its nulls: `hydra-lab probe "
            f"expert-ablation {loaded.name}`."
        )
    elif job.result is None:
        show_job(job)
    else:
        chart(figures.expert_cost(job.result, path_use=opened.path_use, theme=theme()), "expert-cost")
        draw(opened, "routing", "expert_by_domain")


def measure_cost(job: Job, loaded: LoadedModel) -> metrics.ExpertCost:
    """The loss on held-out texts without each expert of each block."""
    texts = {domain: each[:SAMPLES] for domain, each in read_sample_texts(loaded.directory).items()}
    samples = samples_from_texts(texts, loaded.tokenizer, num_tokens=MOST_TOKENS, num_samples=SAMPLES)
    routing = observe_routing(loaded.model, samples, batch_size=BATCH_SIZE).record
    passes, removals = 0, len(routing.layers) * routing.num_experts

    def note(line: str) -> None:
        nonlocal passes
        job.note(passes / removals, line)
        passes += 1

    cost = cost_of_each_expert(loaded.model, samples, routing, batch_size=BATCH_SIZE, progress=note)
    return metrics.expert_cost(cost, routing.layers, samples.domains)


introduce(
    "Specialization",
    "What is each expert for, and does it matter there?",
    "A preference is a correlation; the cost of removing the expert is what says whether the model depends on it.",
    "11_does_it_specialize",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "routing", "moe"):
    show(opened)
