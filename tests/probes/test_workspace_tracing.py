"""The study of the workspace on models that are wired by hand, and against the same changes made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_lab.config import HydraConfig
from hydra_lab.data.samples import Samples
from hydra_lab.loading import load
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Probe, corrected
from probes.workspace_tracing import calibration, measure
from probes.workspace_tracing.analysis import FEWEST_SOLVED, Trace, findings, share_interval, share_of_way
from probes.workspace_tracing.calibration import draw, planted_model, structureless_model
from probes.workspace_tracing.measure import Patch
from probes.workspace_tracing.problems import KINDS, draw_problems
from probes.workspace_tracing.run import STUDY, trace
from probes.workspace_tracing.settings import Settings

SETTINGS = Settings(num_problems=48, most_tokens=64, least_share=0.05, num_resamplings=499, batch_size=7)

Demo = tuple[HydraForCausalLM, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load("demo")


@pytest.fixture(scope="module")
def planted() -> tuple[HydraForCausalLM, int]:
    return planted_model(3)


@pytest.fixture(scope="module")
def traced(planted: tuple[HydraForCausalLM, int]) -> Trace:
    return trace(planted[0], "planted", draw(3), SETTINGS)


def test_the_planted_slot_is_found(planted: tuple[HydraForCausalLM, int], traced: Trace) -> None:
    _, slot = planted
    assert traced.baseline.solved.mean() > 0.9
    assert traced.chosen.tolist() == [slot]
    assert traced.slot_share[0, slot] > 0.9
    assert np.abs(np.delete(traced.slot_share[0], slot)).max() < 0.05
    assert traced.everything is not None
    # The untrained state-space path knows next to nothing of the premise.
    np.testing.assert_allclose(traced.everything.own, traced.way, rtol=0.01)
    solved, held = corrected(findings([traced], least_share=0.05, num_resamplings=499, seed=0))
    assert held.is_claimed() and f"slot {slot} holds the premise" in held.verdict
    assert held.interval[0] > 0.9 and held.causal is not None and held.causal.estimate > 0.3
    assert solved.is_claimed() and "carries the premise" in solved.verdict


def test_what_is_written_and_read_leads_through_the_planted_slot(
    planted: tuple[HydraForCausalLM, int], traced: Trace
) -> None:
    _, slot = planted
    route = (traced.baseline.written * traced.baseline.read).mean(axis=1)[0]
    assert route[slot] > 0.8 and np.delete(route, slot).max() < 0.05
    content = traced.baseline.content[0]
    assert content[:, slot].min() > 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_no_slot_is_said_to_hold_what_attention_carries(seed: int) -> None:
    """Even where a slot holds the premise (odd seeds), nobody reads it."""
    traced = trace(structureless_model(seed), "absent", draw(seed), SETTINGS)
    assert traced.baseline.solved.mean() > 0.9
    solved, held = corrected(findings([traced], least_share=0.05, num_resamplings=499, seed=0))
    assert not held.is_claimed() and "no slot holds the premise" in held.verdict
    assert "does not carry the premise" in solved.verdict
    assert solved.is_claimed()  # the answer does follow the premise


def test_calibration_cases() -> None:
    """A few of each; the counts of the full calibration stand in the README."""
    assert all(calibration.finds_planted(seed) for seed in range(2))
    assert sum(calibration.claims_nothing_there(seed) for seed in range(4)) <= 1


def test_patching_is_what_writing_the_other_content_by_hand_is(
    planted: tuple[HydraForCausalLM, int],
) -> None:
    """One problem, one slot: the slots of the changed run, put in place by a hook of the test's own."""
    model, slot = planted
    problem = draw(3)[0]
    path = model.model.blocks[0].workspace
    seen: list[Tensor] = []
    handle = path.slot_norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model(torch.tensor([problem.changed]))
    handle.remove()

    def put(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        inputs[0][:, :, slot] = seen[0][:, :, slot]
        return inputs

    handle = path.slot_norm.register_forward_pre_hook(put)
    with torch.no_grad():
        logits = model(torch.tensor([problem.tokens])).logits[0, -1]
    handle.remove()
    found = measure.patched(model, draw(3)[:5], [Patch.of({0: [slot]})], "changed", batch_size=5)
    # fp32 logits of size 20, in a batch of other length
    assert found[0, 0] == pytest.approx(
        float(logits[problem.answer] - logits[problem.changed_answer]), abs=1e-3
    )


def test_damage_alone_is_no_premise(traced: Trace) -> None:
    """A patch that halves every answer's lead, whichever premise it comes from."""
    broken = replace(traced.slot[0], own=0.5 * traced.way, other=0.5 * traced.way)
    made = replace(traced, slot=(broken,))
    _, held = corrected(findings([made], least_share=0.05, num_resamplings=499, seed=0))
    assert held.estimate == 0 and not held.is_claimed()


def test_problems_that_are_not_solved_are_not_traced() -> None:
    model = structureless_model(0)
    with torch.no_grad():
        model.get_parameter("model.layers.0.attention.o_proj.weight").zero_()
    traced = trace(model, "unsolved", draw(0), SETTINGS)
    assert traced.baseline.solved.sum() < FEWEST_SOLVED
    solved, held = corrected(findings([traced], least_share=0.05, num_resamplings=499, seed=0))
    assert solved.causal is None and "too few to trace" in solved.verdict
    assert held.p_value is None and "not traced" in held.verdict


def test_shares() -> None:
    way = np.array([2.0, 4.0, 10.0])
    assert share_of_way(0.5 * way, way) == pytest.approx(0.5)
    low, high = share_interval(0.5 * way, way, num_resamplings=99, seed=0)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_problems_differ_in_one_premise_that_a_slot_can_hold(demo: Demo) -> None:
    _, tokenizer = demo
    for kind in KINDS:
        problems = draw_problems(kind, tokenizer, num_problems=6, chunk_size=32, most_tokens=160, seed=0)
        assert len(problems) == 6
        for problem in problems:
            assert len({len(v) for v in (problem.tokens, problem.changed, problem.control)}) == 1
            assert len(problem.tokens) <= 160
            assert not set(problem.premise) & set(problem.other_premise)
            last_chunk = (len(problem.tokens) - 1) // 32
            assert max(problem.premise + problem.other_premise) // 32 < last_chunk
            assert problem.tokens[problem.premise[0]] == problem.answer
            assert problem.changed[problem.premise[0]] == problem.changed_answer


def test_the_study_on_the_shipped_model(demo: Demo) -> None:
    """Small, but whole: three kinds of problems, figures, tables; the model stays as it was."""
    model, tokenizer = demo
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    samples = Samples(np.full((2, 16), 5), np.ones((2, 16), dtype=bool), np.full(2, 16), ("a", "b"))
    probe = Probe(model=model, tokenizer=tokenizer, name="demo", samples=samples)
    settings = {
        "num_problems": 4,
        "most_tokens": 128,
        "least_share": 0.05,
        "num_resamplings": 99,
        "batch_size": 8,
    }
    outcome = STUDY.run(probe, settings)
    assert list(outcome.figures) == ["patched", "content", "route", "lag"]
    assert len({finding.name for finding in outcome.findings}) == len(outcome.findings) == 9
    assert all("traced" in each.verdict or "trace" in each.verdict for each in outcome.findings)
    assert [table["kind"] for table in outcome.tables["slots"]] == list(KINDS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bad_input_gives_one_clear_error(demo: Demo) -> None:
    with pytest.raises(ValueError, match=r"least_share=1\.5 must lie between 0 and 1"):
        replace(SETTINGS, least_share=1.5)
    with pytest.raises(ValueError, match="num_problems=2 must be at least 4"):
        replace(SETTINGS, num_problems=2)
    without = HydraForCausalLM(HydraConfig.from_preset("nano", workspace_layers=[]))
    with pytest.raises(ValueError, match="no block with a workspace"):
        trace(without, "none", draw(0), SETTINGS)
    _, tokenizer = demo
    with pytest.raises(ValueError, match="only 0 of 4 recall problems of at most 64 tokens"):
        draw_problems("recall", tokenizer, num_problems=4, chunk_size=64, most_tokens=64, seed=0)
