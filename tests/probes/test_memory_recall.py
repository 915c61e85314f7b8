"""The study of the memory on models whose memory is written by hand, and against the same changes made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hydra_lab.data.samples import Samples
from hydra_lab.loading import load
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Probe, corrected
from probes.memory_recall import calibration, measure
from probes.memory_recall.analysis import Evidence, findings
from probes.memory_recall.calibration import LAYER, hand_built
from probes.memory_recall.questions import FORMS, Question, editable_facts, world_questions
from probes.memory_recall.run import STUDY, gather
from probes.memory_recall.settings import Settings

SETTINGS = Settings(
    num_questions=24,
    num_notes=2,
    num_deleted=8,
    num_addresses=1,
    num_edited=0,
    num_resamplings=499,
    batch_size=5,
)

Demo = tuple[HydraForCausalLM, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load("demo")


@pytest.fixture(scope="module")
def planted() -> tuple[HydraForCausalLM, list[Question], list[int]]:
    return hand_built(0, planted=True)


@pytest.fixture(scope="module")
def evidence(planted: tuple[HydraForCausalLM, list[Question], list[int]]) -> Evidence:
    return gather(planted[0], planted[1], SETTINGS)


def test_answers_are_what_the_model_says(
    planted: tuple[HydraForCausalLM, list[Question], list[int]],
) -> None:
    model, questions, _ = planted
    found = measure.answers(model, questions, "holding", batch_size=5)
    for index in (0, 7):
        prompt = torch.tensor([questions[index].prompt("holding")])
        with torch.no_grad():
            expected = model(prompt).logits[0, -1].double().log_softmax(dim=-1)
        ids = [question.answer[0] for question in questions]
        # fp32, summed in another order in a batch of other length
        np.testing.assert_allclose(found.log_probability[index], expected[ids].numpy(), atol=1e-4)
        assert found.right[index] == (int(expected.argmax()) == questions[index].answer[0])
        assert found.hits[index].sum() == (int(expected.argmax()) in ids)


def test_the_planted_memory_is_found(evidence: Evidence) -> None:
    assert evidence.whole["closed"].right.mean() > 0.9
    assert evidence.without["closed"].right.mean() < 0.2
    found = {each.name: each for each in corrected(findings(evidence, num_resamplings=499, seed=0))}
    cost = found["closed book: cost of cutting the memory"]
    assert cost.is_claimed() and cost.estimate > 1.0 and "speaks for the right answer" in cost.verdict
    accuracy = found["closed book: accuracy"].causal
    assert accuracy is not None and accuracy.p_corrected is not None and accuracy.p_corrected < 0.05


def test_the_address_of_every_fact_is_named_and_masked(
    planted: tuple[HydraForCausalLM, list[Question], list[int]], evidence: Evidence
) -> None:
    model, questions, addresses = planted
    deletion = evidence.deletion
    assert deletion.addresses[LAYER][:, 0].tolist() == addresses[:8]
    values = model.get_parameter(f"model.layers.{LAYER}.memory.values")
    kept = values.detach().clone()
    with torch.no_grad():
        values[addresses[3]] = 0.0  # a masked row adds nothing, as a row of zeros does
        by_hand = measure.answers(model, questions[:8], "closed", batch_size=8)
        values.copy_(kept)
    intact = measure.answers(model, questions[:8], "closed", batch_size=8)
    expected = np.diagonal(intact.log_probability - by_hand.log_probability)
    np.testing.assert_allclose(deletion.drop[3], expected, atol=1e-4)
    np.testing.assert_array_equal(deletion.right[3], by_hand.right)
    assert deletion.drop[3, 3] > 1.0 > np.abs(np.delete(deletion.drop[3], 3)).max()


def test_what_a_question_reads(planted: tuple[HydraForCausalLM, list[Question], list[int]]) -> None:
    """Each of its two tokens hands out beta over one head; the planted address gets nearly all of the second's."""
    model, questions, addresses = planted
    mass = measure.read_mass(model, questions[:3], batch_size=2)[LAYER]
    closed = measure.answers(model, questions[:3], "closed", batch_size=2)
    np.testing.assert_allclose(mass.sum(axis=1), 2 * closed.beta_asked[0], rtol=1e-5)
    for row, address in enumerate(addresses[:3]):
        assert mass[row, address] > 0.8 * closed.beta_answer[0, row]


def test_calibration_cases() -> None:
    """A few of each; the counts of the full calibration stand in the README."""
    assert all(calibration.finds_planted(seed) for seed in range(2))
    assert sum(calibration.claims_nothing_there(seed) for seed in range(3)) <= 1


def test_beta_is_not_claimed_to_know_what_it_does_not(evidence: Evidence) -> None:
    """Notes with the answer exchanged for notes without it, for every second question."""
    whole = dict(evidence.whole)
    one, other = whole["lacking"], whole["holding"]
    swap = np.arange(24) % 2 == 0
    for field in ("beta_asked", "beta_answer"):
        first, second = getattr(one, field), getattr(other, field)
        one = replace(one, **{field: np.where(swap, second, first)})
        other = replace(other, **{field: np.where(swap, first, second)})
    shuffled = replace(evidence, whole={**whole, "lacking": one, "holding": other})
    for made, is_there in ((evidence, True), (shuffled, False)):
        found = {each.name: each for each in corrected(findings(made, num_resamplings=499, seed=0))}
        beta = found[f"block {LAYER}: beta over the question, notes without the answer less notes with it"]
        assert beta.is_claimed() is is_there
        untested = found[f"block {LAYER}: beta over the question, closed book less open book"]
        assert untested.p_value is None and "Not tested" in untested.verdict


def test_answers_that_are_certain_either_way_are_no_evidence() -> None:
    """The cut moves the logits of other answers only; the right one has probability 1 with and without the memory."""
    size = 20
    rng = np.random.default_rng(0)
    whole = np.where(np.eye(size, dtype=bool), -1e-9, -12.0 + rng.normal(size=(size, size)))
    without = np.where(np.eye(size, dtype=bool), -1e-9, whole + 0.3)
    made = {
        name: measure.Answers(
            np.ones(size, dtype=bool),
            np.eye(size, dtype=bool),
            values,
            np.zeros((1, size)),
            np.zeros((1, size)),
        )
        for name, values in (("whole", whole), ("without", without))
    }
    nothing = np.zeros((2, 2))
    deletion = measure.Deletion(
        {0: np.zeros((2, 1), dtype=np.int64)}, nothing, nothing, np.ones((2, 2), dtype=bool)
    )
    evidence = Evidence(
        (0,),
        np.zeros(size, dtype=np.int64),
        dict.fromkeys(FORMS, made["whole"]),
        dict.fromkeys(FORMS, made["without"]),
        deletion,
    )
    found = {each.name: each for each in findings(evidence, num_resamplings=499, seed=0)}
    assert not found["open book: cost of cutting the memory"].is_claimed()


def test_the_study_on_the_shipped_model(demo: Demo) -> None:
    """Small, but whole: questions of the world, figures, tables; the model stays as it was."""
    model, tokenizer = demo
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    samples = Samples(np.full((2, 16), 5), np.ones((2, 16), dtype=bool), np.full(2, 16), ("a", "b"))
    probe = Probe(model=model, tokenizer=tokenizer, name="demo", samples=samples)
    settings = {
        "num_questions": 6,
        "num_notes": 2,
        "num_deleted": 2,
        "num_addresses": 4,
        "num_edited": 2,
        "num_resamplings": 99,
        "batch_size": 8,
    }
    outcome = STUDY.run(probe, settings)
    assert list(outcome.figures) == ["accuracy", "beta", "deletion"]
    assert len({finding.name for finding in outcome.findings}) == len(outcome.findings) == 11
    assert all(finding.verdict for finding in outcome.findings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_notes_differ_in_one_note_of_which_one_holds_the_answer(demo: Demo) -> None:
    _, tokenizer = demo
    for question in world_questions(tokenizer, num_questions=12, num_notes=3, seed=1):
        lacking, holding = (
            str(tokenizer.decode(list(notes))).splitlines() for notes in (question.lacking, question.holding)
        )
        assert len(lacking) == len(holding) == 3
        changed = [number for number in range(3) if lacking[number] != holding[number]]
        assert len(changed) == 1
        answer = str(tokenizer.decode(list(question.answer))).strip()
        assert holding[changed[0]].endswith(f"is {answer}.")
        assert not any(line.endswith(f"is {answer}.") for line in lacking)


def test_edits_ask_another_phrasing(demo: Demo) -> None:
    _, tokenizer = demo
    for fact in editable_facts(tokenizer, num_facts=6, seed=0):
        assert fact.prompt.startswith("Q: ")
        assert not str(tokenizer.decode(list(fact.rephrased.asked))).startswith("Q: ")
        assert str(tokenizer.decode(list(fact.rephrased.answer))) == fact.new_answer


def test_bad_input_gives_one_clear_error(demo: Demo) -> None:
    with pytest.raises(ValueError, match=r"num_deleted=30 must be at most num_questions=24"):
        replace(SETTINGS, num_deleted=30)
    with pytest.raises(ValueError, match="num_edited=1 must be 0 or at least 2"):
        replace(SETTINGS, num_edited=1)
    with pytest.raises(ValueError, match="num_addresses=70 must be at most 64"):
        model, questions, _ = hand_built(0, planted=True)
        gather(model, questions, replace(SETTINGS, num_addresses=70))
    _, tokenizer = demo
    with pytest.raises(ValueError, match=r"num_questions=1000000 must be at most \d+"):
        world_questions(tokenizer, num_questions=1_000_000, num_notes=2, seed=0)
    from hydra_lab.config import HydraConfig

    without = HydraForCausalLM(HydraConfig.from_preset("nano", memory_layers=[]))
    with pytest.raises(ValueError, match="no block with a memory"):
        gather(without, questions, SETTINGS)


def test_study_declares_itself() -> None:
    assert STUDY.name == "memory-recall" and STUDY.needs == ("memory",)
    assert STUDY.config == Path(measure.__file__).with_name("config.toml")
