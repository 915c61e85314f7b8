"""What takes long on a page: generation, the cost of removing experts, the loss by domain, the edit of a fact, jobs."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from dashboards.shared.generation import Writer
from dashboards.shared.jobs import Job
from dashboards.shared.sources import LoadedModel
from hydra_lab import load
from hydra_lab.bench.kernels import KernelsPlan, measure_kernels
from hydra_lab.interventions import intervened, parse

OpenApp = Callable[..., AppTest]


def click_and_wait(app: AppTest, key: str, job: str) -> None:
    """Click a button that starts a job, and wait for its end."""
    app.button(key=key).click().run()
    for thread in threading.enumerate():
        if thread.name == job:
            thread.join()
    app.run()
    assert not app.exception and not app.error, [each.value for each in app.error] + list(app.exception)


def test_the_cost_of_removing_experts(open_app: OpenApp) -> None:
    app = open_app("specialization", specialization="Cost of removal")
    click_and_wait(app, "measure-cost", "Removing the experts")
    assert len(app.get("plotly_chart")) == 2


def test_the_loss_by_domain_with_an_intervention(open_app: OpenApp) -> None:
    app = open_app("intervene", intervene="ssm[*].cut()", intervention="Loss by domain")
    click_and_wait(app, "measure-loss", "Loss by domain")
    assert len(app.get("plotly_chart")) == 1


def test_a_fact_is_edited_and_put_in_force(open_app: OpenApp) -> None:
    app = open_app("memory", memory="Facts", question="The king is", answer=" X", others="The queen is")
    click_and_wait(app, "edit-fact", "Editing the fact")
    assert "1 other answers moved" in app.markdown[-1].value or "0 of 1 other" in "".join(
        m.value for m in app.markdown
    )
    app.button(key="fact-in-force").click().run()
    assert any("memory[" in each.value and "edit" in each.value for each in app.sidebar.markdown)


def test_a_composed_change_is_put_in_force(open_app: OpenApp) -> None:
    app = open_app("intervene")
    app.selectbox(key="path").set_value("moe").run()
    app.selectbox(key="action").set_value("ablate").run()
    app.text_input(key="argument_expert").set_value("99").run()
    app.button(key="add-change").click().run()
    assert "99" in app.error[0].value
    app.text_input(key="argument_expert").set_value("1").run()
    app.button(key="add-change").click().run()
    assert not app.error
    assert app.query_params["intervene"] == "moe[0].ablate(expert=1)"
    app.text_input(key="typed_change").set_value("memory[*].cut()").run()
    assert app.query_params["intervene"] == "moe[0].ablate(expert=1); memory[*].cut()"


def test_the_operations_of_this_machine_are_checked(open_app: OpenApp) -> None:
    app = open_app("kernels")
    click_and_wait(app, "check-operations", "Operations against their reference")
    table = app.dataframe[0].value
    assert {"ssd", "sparse_attention", "chunk_moe"} <= set(table["operation"])
    assert all(float(error) < 1e-5 for error in table["output"])


def test_results_of_this_machine_come_first(
    open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = KernelsPlan(
        preset="nano", length=64, attention_lengths=(), path_lengths=(), rounds=1, least_seconds=0.0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    result = measure_kernels(plan, lambda _what: None)
    result.save(tmp_path / "build" / "bench" / "capture-cpu.json")
    monkeypatch.chdir(tmp_path)
    app = open_app("kernels")
    assert app.selectbox(key="result").value == "capture-cpu", "also under the name of a result that ships"
    assert any("Largest error against the reference" in each.value for each in app.markdown)


def test_what_is_written_is_what_generate_writes(model_dir: Path) -> None:
    model: Any
    model, tokenizer = load(model_dir)
    loaded = LoadedModel("tiny", model_dir, model, tokenizer)
    ids = tuple(tokenizer("The king is come")["input_ids"])
    for text in ("", "ssm[*].scale(factor=0.5)"):
        changes = parse(text) if text else ()
        writer = Writer(loaded, ids, changes, num_tokens=12, temperature=0.0, seed=0)
        pieces = list(writer)
        with torch.no_grad(), intervened(model, *changes):
            expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert writer.ids == expected[0, len(ids) :].tolist()
        assert len(pieces) == len(writer.ids)


def test_sampling_follows_its_seed(model_dir: Path) -> None:
    model, tokenizer = load(model_dir)
    loaded = LoadedModel("tiny", model_dir, model, tokenizer)
    written = []
    for seed in (1, 1, 2):
        writer = Writer(loaded, (5, 6, 7), (), num_tokens=20, temperature=2.0, seed=seed)
        list(writer)
        written.append(writer.ids)
    assert written[0] == written[1] != written[2]


def test_a_job_is_cancelled_at_its_next_note() -> None:
    go_on = threading.Event()

    def work(job: Job) -> int:
        job.note(0.5, "half")
        go_on.wait(10)
        job.note(0.6, "more")
        return 1

    job = Job("work", work)
    job.cancel()
    go_on.set()
    job.thread.join()
    assert job.cancelled and job.result is None and not job.error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_that_fails_says_why() -> None:
    def refuse(job: Job) -> None:
        raise ValueError("no such thing")

    job = Job("work", refuse)
    job.thread.join()
    assert job.error == "no such thing" and not job.running
