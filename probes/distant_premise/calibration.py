"""The study put to a small model whose selection always finds the premise, and to models that cannot tell the
pairs apart."""

import numpy as np
import torch

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Calibration, Finding, corrected
from probes.distant_premise.analysis import findings
from probes.distant_premise.measure import ask
from probes.distant_premise.problems import Problems

_NUM_PAIRS = 6
_NUM_VALUES = 256
_NUM_PROBLEMS = 16
_BLOCK, _WINDOW = 4, 8
_DISTANCES = (16, 128)
_NUM_FILLERS = 8
_NUM_RESAMPLINGS = 999

# Words: fillers, one token for every pair of a key and a value, a question for every key, an answer for every value.
_PAIRS = _NUM_FILLERS
_QUESTIONS = _PAIRS + _NUM_PAIRS * _NUM_VALUES
_ANSWERS = _QUESTIONS + _NUM_PAIRS
_NUM_WORDS = _ANSWERS + _NUM_VALUES
_SIZE = 8
"""Dimensions of a key and of a value."""
_NOISE = 0.02


def finding_model(seed: int) -> HydraForCausalLM:
    """One block that answers by its attention alone, built by hand, with a little noise.

    A pair's token holds a vector of its key and one of its value, a question that of its key, an answer that
    of its value, each in dimensions of its own. The query is the asked key and the keys are the pairs' keys,
    so the mean key of the premise's block has the highest score; what is read there is the value.
    """
    return _model(seed, tokens_hold_pairs=True)


def indifferent_model(seed: int) -> HydraForCausalLM:
    """The same block, but the tokens of the pairs hold vectors at random: they tell neither their key nor
    their value, so that the keys are random as well. So many values that two problems hardly share a pair,
    for a single random model is not quite indifferent to each pair."""
    return _model(seed, tokens_hold_pairs=False)


def _model(seed: int, *, tokens_hold_pairs: bool) -> HydraForCausalLM:
    torch.manual_seed(seed)
    config = HydraConfig.from_preset(
        "nano",
        vocab_size=_NUM_WORDS,
        hidden_size=5 * _SIZE,
        num_hidden_layers=1,
        attention_every=1,
        attention_num_heads=1,
        attention_num_kv_heads=1,
        attention_head_dim=_SIZE,
        attention_window=_WINDOW,
        attention_block_size=_BLOCK,
        attention_num_selected=1,
        moe_layers=[],
        workspace_layers=[],
        memory_layers=[],
    )
    model = HydraForCausalLM(config).eval()
    block = model.model.blocks[0]
    reader = block.attention
    key, value, question, answer, filler = (
        slice(start, start + _SIZE) for start in range(0, 5 * _SIZE, _SIZE)
    )
    keys = torch.eye(_SIZE)[:_NUM_PAIRS]
    values = torch.nn.functional.normalize(torch.randn(_NUM_VALUES, _SIZE), dim=-1)
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.zero_()
        embedding[:_NUM_FILLERS, filler].normal_()
        embedding[_PAIRS:_QUESTIONS, key] = keys.repeat_interleave(_NUM_VALUES, dim=0)
        embedding[_PAIRS:_QUESTIONS, value] = values.repeat(_NUM_PAIRS, 1)
        embedding[_QUESTIONS:_ANSWERS, question] = keys
        embedding[_ANSWERS:, answer] = values
        if not tokens_hold_pairs:
            drawn = torch.randn(2, _NUM_PAIRS * _NUM_VALUES, _SIZE)
            for place, vectors in zip(
                (key, value), torch.nn.functional.normalize(drawn, dim=-1), strict=True
            ):
                embedding[_PAIRS:_QUESTIONS, place] = vectors
        block.ssm.out_proj.weight.zero_()
        for weight in reader.parameters():
            weight.zero_()
        reader.q_proj.weight[:, question] = 3.0 * torch.eye(_SIZE)
        reader.k_proj.weight[:, key] = torch.eye(_SIZE)
        reader.v_proj.weight[:, value] = torch.eye(_SIZE)
        reader.o_proj.weight[answer] = torch.eye(_SIZE)
        for weight in reader.parameters():
            weight.add_(torch.randn_like(weight), alpha=_NOISE)
    return model


def problems(seed: int) -> Problems:
    """Pairs in blocks of their own, in random order with random values; then filler."""
    rng = np.random.default_rng(seed)
    keys, values = (
        rng.random((_NUM_PROBLEMS, count)).argsort(axis=1)[:, :_NUM_PAIRS]
        for count in (_NUM_PAIRS, _NUM_VALUES)
    )
    given = rng.integers(_NUM_FILLERS, size=(_NUM_PROBLEMS, (_NUM_PAIRS + 1) * _BLOCK))
    place = _BLOCK * np.arange(1, _NUM_PAIRS + 1) + 1
    given[:, place] = _PAIRS + keys * _NUM_VALUES + values
    return Problems(
        given=torch.from_numpy(given),
        filler=torch.from_numpy(rng.integers(_NUM_FILLERS, size=(_NUM_PROBLEMS, max(_DISTANCES)))),
        questions=torch.from_numpy(_QUESTIONS + keys)[..., None],
        values=_ANSWERS + values,
        asked=np.arange(_NUM_PAIRS),
        place=place,
    )


def studied(model: HydraForCausalLM, seed: int) -> dict[str, Finding]:
    """The study's findings at the calibration's sample size, by name."""
    asked_of = problems(seed)
    found = findings(
        ask(model, asked_of, _DISTANCES), asked_of.asked, num_resamplings=_NUM_RESAMPLINGS, seed=seed
    )
    return {each.name: each for each in corrected(found)}


def is_claimed(finding: Finding) -> bool:
    """Whether the finding or its causal effect is."""
    causal = finding.causal
    return finding.is_claimed() or (causal is not None and (causal.p_corrected or 1.0) <= 0.05)


def finds_planted(seed: int) -> bool:
    """At every distance the selection is claimed to find the premise and the answers to be right, and
    forbidding the block is claimed to cost the answer."""
    found = studied(finding_model(seed), seed)
    good = []
    for distance in _DISTANCES:
        selects = found[f"{distance} tokens: block 0 selects the premise's block"]
        assert selects.causal is not None and selects.causal.p_corrected is not None
        good += [
            selects.is_claimed() and selects.estimate > 0.9,
            selects.causal.p_corrected <= 0.05 and selects.causal.estimate > 0,
            found[f"{distance} tokens: accuracy"].is_claimed(),
        ]
    return all(good)


def claims_nothing_there(seed: int) -> bool:
    """Whether anything is claimed of a model that cannot tell the pairs apart."""
    return any(map(is_claimed, studied(indifferent_model(seed), seed).values()))


CALIBRATION = Calibration(
    planted="an attention whose selection always finds the asked pair's block, built by hand",
    absent="the same with random keys and values: no token tells its pair",
    sample_size=f"{_NUM_PROBLEMS} problems of {_NUM_PAIRS} questions at {len(_DISTANCES)} distances",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
