"""The study put to small models whose half-lives are known."""

import math

import numpy as np
import torch

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Calibration, corrected
from probes.state_horizon.analysis import findings, horizon
from probes.state_horizon.measure import Measurement, measure

_NUM_TEXTS, _CONTEXT, _HORIZON = 8, 16, 64
_STEP_SIZE = 0.5
_NUM_RESAMPLINGS = 999


def planted_model(seed: int) -> tuple[HydraForCausalLM, np.ndarray]:
    """One block of 16 ssm heads with half-lives from 2 to 32 tokens, dealt out at random, whatever the tokens
    are; beside it an attention that adds little. Returns the model and the half-lives [H]."""
    torch.manual_seed(seed)
    config = HydraConfig.from_preset(
        "nano",
        num_hidden_layers=1,
        attention_every=1,
        moe_layers=[],
        workspace_layers=[],
        memory_layers=[],
        ssm_head_dim=4,
        ssm_state_size=8,
    )
    model = HydraForCausalLM(config).eval()
    ssm = model.model.blocks[0].ssm
    half_life = torch.logspace(1, 5, ssm.num_heads, base=2.0)[torch.randperm(ssm.num_heads)]
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").normal_()
        ssm.in_proj.weight.normal_(std=0.5)
        ssm.in_proj.weight[-ssm.num_heads :] = 0.0  # the step size is the same at every token
        ssm.dt_bias.fill_(math.log(math.expm1(_STEP_SIZE)))
        ssm.A_log.copy_((math.log(2) / (_STEP_SIZE * half_life)).log())
        ssm.out_proj.weight.normal_(std=0.3)
        model.model.blocks[0].attention.o_proj.weight.normal_(std=0.02)
    return model, half_life.double().numpy()


def unread_model(seed: int) -> HydraForCausalLM:
    """The same model, but nothing reads its memories: every output projection is zero."""
    model, _ = planted_model(seed)
    with torch.no_grad():
        model.model.blocks[0].ssm.out_proj.weight.zero_()
        model.model.blocks[0].attention.o_proj.weight.zero_()
    return model


def followed(model: HydraForCausalLM, seed: int) -> Measurement:
    """The study's measurement on random tokens, at the calibration's sample size."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(1, model.config.vocab_size, size=(_NUM_TEXTS, _CONTEXT + _HORIZON + 1))
    return measure(model, texts, context=_CONTEXT, batch_size=_NUM_TEXTS, seed=seed)


def finds_planted(seed: int) -> bool:
    """Both half-lives are claimed to follow the decays, the states' half-lives are right within a fifth
    (median), and the ssm is claimed to carry the token, the attention not to carry more."""
    model, half_life_H = planted_model(seed)
    measurement = followed(model, seed)
    found = {
        each.name: each
        for each in corrected(
            findings(measurement, measurement.decay_half_life, num_resamplings=_NUM_RESAMPLINGS, seed=seed)
        )
    }
    heads = found["heads: half-life against decay"]
    ssm, attention = (
        found[f"{path}: share of the far change that its memory carries"] for path in ("ssm", "attention")
    )
    error = np.median(np.abs(np.log2(horizon(measurement).state_half_life / half_life_H)))
    assert heads.causal is not None and heads.causal.p_corrected is not None
    return bool(
        heads.is_claimed()
        and heads.causal.p_corrected <= 0.05
        and error <= np.log2(1.2)
        and ssm.is_claimed()
        and ssm.estimate > attention.estimate
    )


def claims_nothing_there(seed: int) -> bool:
    """Whether anything is claimed of a model whose memories nothing reads, its heads' decays dealt out anew."""
    measurement = followed(unread_model(seed), seed)
    shuffled_H = np.random.default_rng(seed).permutation(measurement.decay_half_life)
    found = corrected(findings(measurement, shuffled_H, num_resamplings=_NUM_RESAMPLINGS, seed=seed))
    return any(
        each.is_claimed() or (each.causal is not None and (each.causal.p_corrected or 1.0) <= 0.05)
        for each in found
    )


CALIBRATION = Calibration(
    planted="16 heads with half-lives from 2 to 32 tokens, and nothing else that remembers much",
    absent="states that nothing reads, the heads' decays permuted over the heads",
    sample_size=f"{_NUM_TEXTS} texts, {_HORIZON} tokens followed, 16 heads",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
