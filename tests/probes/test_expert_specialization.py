"""The study on data and models whose answer is known: planted structure is found, absent structure is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hydra_lab import metrics
from hydra_lab.config import HydraConfig
from hydra_lab.data.samples import Samples
from hydra_lab.data.tokenizer import train_tokenizer
from hydra_lab.modeling import HydraForCausalLM
from probes.expert_specialization import analysis, measure, run
from probes.expert_specialization.settings import Settings, load_settings

CLASSES = ("word", "digit")


def observation(
    rng: np.random.Generator, *, domain: float, token: float, num_samples: int = 16
) -> analysis.Observation:
    """Two domains, 3 experts, 8 chunks of 4 tokens. `domain` and `token`: chance that the expert follows
    them.

    Without both, every sample has a taste of its own, so that its chunks resemble each other.
    """
    code = np.arange(num_samples) % 2
    taste = rng.dirichlet(np.full(3, 0.4), size=num_samples)
    first = np.stack([rng.choice(3, size=8, p=each) for each in taste])
    first = np.where(rng.random(first.shape) < domain, code[:, None], first)
    experts = np.stack([first, (first + 1) % 3], axis=-1)
    classes = rng.integers(2, size=(num_samples, 32))
    heavy = np.where(rng.random(classes.shape) < token, classes, rng.integers(2, size=classes.shape))
    weights = np.stack([np.where(heavy == 0, 0.9, 0.1), np.where(heavy == 0, 0.1, 0.9)], axis=-1)
    record = metrics.RoutingRecord(
        (0,), experts[None], 3, 4, np.full(num_samples, 32), tuple("ab"[c] for c in code), weights[None]
    )
    return analysis.Observation(record, classes, CLASSES)


def test_planted_structure_is_found() -> None:
    rng = np.random.default_rng(0)
    found = analysis.associate(observation(rng, domain=0.7, token=0.8), num_resamplings=199, seed=0)
    assert found.domain_holm[0] <= 0.05 and found.class_holm[0] <= 0.05
    assert found.domain_share[0, 0].argmax() == 0 and found.domain_share[0, 1].argmax() == 1
    best = analysis.clearest(found.domain_share, found.domain_adjusted, found.domains, (0,), alpha=0.05)
    assert {(each.name, each.expert) for each in best} == {("a", 0), ("b", 1)}
    low, high = found.domain_tests[0].interval
    assert 0.1 < low <= found.domain_tests[0].corrected <= high


def test_one_kind_of_structure_is_not_taken_for_the_other() -> None:
    rng = np.random.default_rng(1)
    found = analysis.associate(observation(rng, domain=0.8, token=0.0), num_resamplings=199, seed=0)
    assert found.domain_holm[0] <= 0.05 < found.class_holm[0]


def test_false_positive_rate_of_the_tests_of_dependence() -> None:
    """At 5%, 60 structureless data sets give 3 false claims on average; more than 8 has a chance below 1%."""
    rng = np.random.default_rng(2)
    claims = 0
    for seed in range(60):
        found = analysis.associate(
            observation(rng, domain=0.0, token=0.0, num_samples=12), num_resamplings=59, seed=seed
        )
        claims += bool((np.concatenate([found.domain_holm, found.class_holm]) <= 0.05).any())
    assert claims <= 8


def test_false_positive_rate_of_the_causal_test() -> None:
    """200 data sets whose costs have nothing to do with the domains: 10 false claims expected, 20 have a
    chance of 0.2%. Costs vary strongly between samples, as real ones do."""
    rng = np.random.default_rng(3)
    preferring = observation(rng, domain=0.8, token=0.0)
    domains = tuple("ab" * 8)
    claims = 0
    for seed in range(200):
        increase = rng.gamma(0.5, 1.0, size=(1, 1, 16)) * rng.gamma(1.0, 1.0, size=(1, 3, 16))
        found = analysis.compare_with_ablation(preferring, increase, domains, num_resamplings=79, seed=seed)
        claims += bool(found.agreement_holm[0] <= 0.05)
    assert claims <= 20


def test_planted_cost_is_found() -> None:
    rng = np.random.default_rng(4)
    preferring = observation(rng, domain=0.8, token=0.0)
    increase = 0.05 * rng.random((1, 3, 16))
    increase[0, 0, ::2] += 1.0  # expert 0 matters in a, expert 1 in b
    increase[0, 1, 1::2] += 1.0
    found = analysis.compare_with_ablation(preferring, increase, tuple("ab" * 8), num_resamplings=199, seed=0)
    assert found.agreement[0] > 0.5 and found.agreement_holm[0] <= 0.05
    np.testing.assert_allclose(
        found.increase[0, 0], [increase[0, 0, ::2].mean(), increase[0, 0, 1::2].mean()]
    )
    assert (found.interval[0, 0, 0] > 0.9).all() and found.matches[0] >= 2


def test_rank_correlation() -> None:
    a = np.array([1.0, 2.0, 2.0, 5.0])
    assert analysis.rank_correlation(a, 10 * a) == pytest.approx(1.0)
    assert analysis.rank_correlation(a, -a) == pytest.approx(-1.0)
    assert analysis.rank_correlation(a, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.9486833)
    assert np.isnan(analysis.rank_correlation(a, np.ones(4)))


# --- a whole model
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["abc 123"], vocabulary_size=260)


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerFast) -> Samples:
    """Letters in one domain, digits in the other; 12 samples of 24 tokens each."""
    rng = np.random.default_rng(5)
    letters, digits = (
        np.array(tokenizer.convert_tokens_to_ids(list(text))) for text in ("abcdefgh", "12345678")
    )
    tokens = np.stack([rng.choice(letters if row % 2 == 0 else digits, size=24) for row in range(24)])
    return Samples(tokens, np.ones_like(tokens, dtype=bool), np.full(24, 24), ("letters", "digits") * 12)


def make_model(tokenizer: PreTrainedTokenizerFast) -> HydraForCausalLM:
    torch.manual_seed(0)
    config = HydraConfig.from_preset(
        "nano",
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        attention_every=0,
        moe_layers=[0],
        moe_top_k=1,
        workspace_layers=[],
        memory_layers=[],
    )
    return HydraForCausalLM(config).eval()


@pytest.fixture(scope="module")
def planted(tokenizer: PreTrainedTokenizerFast) -> HydraForCausalLM:
    """Expert 2 is forced on letters and makes letters likely, expert 0 the same for digits."""
    model = make_model(tokenizer)
    moe = model.get_submodule("model.layers.0.moe")
    assert isinstance(moe, measure.MoEPath)
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding[:, 0] = 0.0
        for text, sign in (("abcdefgh", 1.0), ("12345678", -1.0)):
            embedding[tokenizer.convert_tokens_to_ids(list(text)), 0] = sign
        moe.router.weight.zero_()
        for expert, sign in ((2, 1.0), (0, -1.0)):
            moe.router.weight[expert, 0] = 5.0 * sign
            hidden = moe.gate_up_proj.shape[1] // 2
            moe.gate_up_proj[expert] = 0.0
            moe.gate_up_proj[expert, 0, 0] = moe.gate_up_proj[expert, hidden, 0] = sign  # silu(|x|) |x|
            moe.down_proj[expert, 0, 0] = sign
    return model


def settings_of(**changes: Any) -> Settings:
    return load_settings(**{"num_resamplings": 99, "num_controls": 2, "num_tokens": 24, **changes})


def test_an_expert_forced_to_a_domain_is_found(
    planted: HydraForCausalLM, samples: Samples, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen = measure.observe(planted, samples, measure.token_classes(tokenizer), batch_size=5)
    assert (seen.routing.experts[0, ::2] == 2).all() and (seen.routing.experts[0, 1::2] == 0).all()
    assert (seen.heaviest[0, ::2] == 2).all()
    assert set(seen.tokens_class[0]) == {measure.TOKEN_CLASSES.index("word piece")}
    increase = measure.ablate(planted, samples, seen, batch_size=8, progress=lambda _line: None)
    assert (increase[0, 2, ::2] > 0.02).all() and (increase[0, 2, 1::2] == 0).all()
    assert (increase[0, [1, 3]] == 0).all()


def test_ablation_is_what_zeroed_expert_weights_cost(
    planted: HydraForCausalLM, samples: Samples, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen = measure.observe(planted, samples, measure.token_classes(tokenizer), batch_size=8)
    increase = measure.ablate(planted, samples, seen, batch_size=8, progress=lambda _line: None)
    down = planted.get_parameter("model.layers.0.moe.down_proj")
    kept = down[2].detach().clone()
    before = measure.sample_losses(planted, samples)
    with torch.no_grad():
        down[2] = 0.0
        after = measure.sample_losses(planted, samples)
        down[2] = kept
    np.testing.assert_allclose(increase[0, 2], after - before, atol=1e-5)


def test_the_study_of_a_planted_model(
    planted: HydraForCausalLM, samples: Samples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    weights = {name: value.clone() for name, value in planted.state_dict().items()}
    lines: list[str] = []
    found = run.run_study(
        planted, tokenizer, samples, tmp_path, settings_of(), name="planted", progress=lines.append
    )
    block = found["blocks"][0]
    assert block["domain_information"]["plug_in"] == pytest.approx(np.log(2))
    assert block["domain_information"]["p_holm"] <= 0.05
    assert block["experts_costliest_where_preferred"] == block["experts_in_use"] == 2
    assert block["causal_p_holm"] <= 0.05
    assert {(each["name"], each["expert"]) for each in found["domain_preferences"]} == {
        ("letters", 2),
        ("digits", 0),
    }
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(found))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert block["verdict"] in page and "<iframe" in page
    assert len(list((tmp_path / "figures").glob("*.html"))) == 6
    assert any("NO PNG FILES WRITTEN" in line for line in lines)
    for name, value in planted.state_dict().items():
        assert torch.equal(value, weights[name])  # the study leaves the model as it was


def test_the_study_claims_nothing_of_shuffled_labels(
    planted: HydraForCausalLM, samples: Samples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    half = tuple("letters" if row % 4 < 2 else "digits" for row in range(24))
    shuffled = Samples(samples.tokens, samples.scored, samples.length, half)
    found = run.run_study(planted, tokenizer, shuffled, tmp_path, settings_of())
    assert found["blocks"][0]["domain_information"]["p_holm"] > 0.05
    assert found["domain_preferences"] == []
    assert "no evidence" in found["blocks"][0]["verdict"] or "idle" in found["blocks"][0]["verdict"]


def test_an_unused_path_is_called_idle_whatever_its_routing_shows() -> None:
    rng = np.random.default_rng(6)
    found = analysis.associate(observation(rng, domain=0.9, token=0.0), num_resamplings=99, seed=0)
    caused = analysis.compare_with_ablation(
        observation(rng, domain=0.9, token=0.0),
        np.zeros((1, 3, 16)),
        tuple("ab" * 8),
        num_resamplings=9,
        seed=0,
    )
    use = metrics.PathUse(
        (0,), ("ssm", "moe"), np.array([[0.99, 0.01]]), np.ones((1, 2)), ("a",), np.ones(1), np.array([[3.0], [0.5]]),
        np.zeros((2, 1)), np.ones(1, dtype=int), np.ones(1, dtype=int),
    )  # fmt: skip
    controls = analysis.Control(np.zeros((2, 1)))
    assert analysis.verdicts(found, controls, caused, use, alpha=0.05)[0].startswith("idle")
    assert np.isnan(caused.agreement[0]) and caused.agreement_holm[0] == 1.0


def test_random_routers_differ_and_leave_the_model_alone(planted: HydraForCausalLM) -> None:
    before = planted.get_parameter("model.layers.0.moe.router.weight").clone()
    first, second = (measure.with_random_routers(planted, seed) for seed in (0, 1))
    weights = [each.get_parameter("model.layers.0.moe.router.weight") for each in (first, second)]
    assert not torch.equal(weights[0], weights[1])
    assert weights[0].std().item() == pytest.approx(before.std().item(), rel=0.25)
    assert torch.equal(planted.get_parameter("model.layers.0.moe.router.weight"), before)


def test_token_classes(tokenizer: PreTrainedTokenizerFast) -> None:
    classes = measure.token_classes(tokenizer)
    for text, name in (("a", "word piece"), ("7", "digit"), (";", "punctuation")):
        token = tokenizer.convert_tokens_to_ids(text)
        assert measure.TOKEN_CLASSES[classes[token]] == name
    (end,) = tokenizer.encode("<|endoftext|>")
    assert measure.TOKEN_CLASSES[classes[end]] == "special"
    assert measure._class_of(" the") == "word" and measure._class_of("\n  ") == "white space"


def test_bad_input_gives_one_line(
    planted: HydraForCausalLM, samples: Samples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=r"too few samples \(letters 1, digits 1\)"):
        run.run_study(planted, tokenizer, samples.take([0, 1]), tmp_path, settings_of())
    with pytest.raises(ValueError, match="of one domain"):
        run.run_study(planted, tokenizer, samples.take(range(0, 24, 2)), tmp_path, settings_of())
    assert run.main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no model") and error.count("\n") == 1
    with pytest.raises(ValueError, match=r"alpha=2.* must lie between"):
        load_settings(alpha=2.0)
    with pytest.raises(ValueError, match="unknown settings typo"):
        load_settings(typo=1)
