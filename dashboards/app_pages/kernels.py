"""Kernels: which backend runs, and how fast and right it was measured to be, here and on the reference GPU."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from dashboards.shared.charts import chart, theme
from dashboards.shared.jobs import Job, find_job, show_job, start_job
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import current_model, current_view, fragment
from hydra_lab.bench.agreement import LENGTH, measure_agreement
from hydra_lab.bench.plots import plot_result
from hydra_lab.bench.result import BenchResult
from hydra_lab.capture.engine import backends_of
from hydra_lab.ops.backend import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "hydra_lab" / "bench" / "results"
GPU_REPORT = ROOT / "GPU.md"
OWN_RESULTS = Path("build") / "bench"
"""Where the results of this machine are looked for."""


def show_backends(loaded: LoadedModel) -> None:
    """The backend of every operation of the model, and how near it comes to the reference on this machine."""
    model = loaded.model
    device = next(model.parameters()).device
    st.markdown(f"**{loaded.name}** runs on `{device}` with: `{backends_of(model)}`.")
    st.caption("Another backend: `hydra_lab.ops.use_backend`, or `ops_backend` in the model's configuration.")
    key = ("agreement", loaded.directory, str(device))
    job = find_job(key)
    if job is not None and job.result is not None:
        show_agreement(job.result, LENGTH, f"this machine ({device})")
        return
    if job is not None:
        show_job(job)
    if job is None or not job.running:
        st.button("Check them against the reference", on_click=start_job, args=(
            key, "Operations against their reference", lambda job: check(loaded, device, job)
        ), key="check-operations")  # fmt: skip


def check(loaded: LoadedModel, device: torch.device, job: Job) -> list[dict[str, Any]]:
    """Every operation's backends against the reference at the sizes of the model, fp32."""
    found: list[dict[str, Any]] = []
    for each in measure_agreement(loaded.model.config, device=device, dtype=torch.float32):
        found.append(asdict(each))
        job.note(len({row["operation"] for row in found}) / len(PACKAGES), each.operation)
    return found


def show_agreement(rows: list[dict[str, Any]], length: int, where: str) -> None:
    st.markdown(f"**Largest error against the reference**, {length} tokens, on {where}")
    st.dataframe(
        [
            {
                "operation": row["operation"],
                "backend": row["backend"],
                "output": f"{row['output']:.1e}",
                "gradients": "no gradient" if row["gradient"] is None else f"{row['gradient']:.1e}",
            }
            for row in rows
        ],
        hide_index=True,
        key=f"agreement-{where}",
    )
    st.caption("Over the largest value of the reference's tensor, in the same precision.")


def show_gpu() -> None:
    """What the project knows of its kernels on a GPU."""
    if not GPU_REPORT.is_file():
        return
    with st.expander("On the reference GPU: what is verified, and what waits"):
        st.markdown(re.sub("^#+ ", "##### ", GPU_REPORT.read_text(encoding="utf-8"), flags=re.MULTILINE))


@fragment
def show_results() -> None:
    files = {path.stem: path for folder in (RESULTS, OWN_RESULTS) for path in sorted(folder.glob("*.json"))}
    names = sorted(
        files, key=lambda each: (files[each].parent != OWN_RESULTS, not each.startswith("kernels"), each)
    )
    st.caption(
        "To measure this machine: `hydra-lab bench kernels --rounds 3 --out build/bench/kernels-here.json`; this page "
        "reads it when the dashboard was started in the same directory."
    )
    name = st.selectbox("Result file", names, key=linked("result", names))
    result = BenchResult.read(files[name])
    environment = result.environment
    versions = {key: value for key, value in environment["versions"].items() if value is not None}
    where = f"{environment['device']} ({environment['hardware']['cpu']})"
    st.caption(
        f"`bench {result.bench}` on {where}, commit {(environment['commit'] or 'none')[:10]}; "
        + ", ".join(f"{key} {value}" for key, value in versions.items())
    )
    chart(plot_result(result, theme()), f"bench-{name}")
    if result.goals:
        st.markdown("**Goals of this run** (95% interval)")
        st.dataframe(
            [
                {
                    "measure": goal.measure,
                    "goal": goal.goal,
                    "measured": f"{goal.value:.3g} ({goal.low:.3g} to {goal.high:.3g})",
                    "reached": "yes" if goal.reached else "missed",
                }
                for goal in result.goals
            ],
            hide_index=True,
            key="goals",
        )
    if "agreement" in result.findings:
        show_agreement(result.findings["agreement"], result.findings["agreement_length"], where)
    if result.skipped:
        with st.expander(f"Not measured: {len(result.skipped)}"):
            st.dataframe(
                [{"what": what, "why": why} for what, why in result.skipped.items()],
                hide_index=True,
                key="skipped",
            )


introduce(
    "Kernels",
    "Which backend computes each operation, how right and how fast is it?",
    "Ratios within one run are what to compare; absolute times belong to the machine that they were taken on.",
    "12_triton_kernel",
)
if current_view().model is not None:
    show_backends(current_model())
show_gpu()
show_results()
