"""The study put to small models that copy by one known path, and to models that do not copy."""

import math

import numpy as np
import torch

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Calibration, Finding, corrected
from probes.induction.analysis import findings
from probes.induction.episodes import random_episodes
from probes.induction.measure import copy_gain, path_cuts

_NUM_WORDS = 40
_NUM_SEQUENCES = 16
_NAME = "random tokens, {distance} apart: share of the gain that goes with the {path}"
_DISTANCES = (8, 16)
_NOISE = 0.01
_NUM_RESAMPLINGS = 1999

# Sizes at which a one-hot vector per token fits beside another and a constant.
_HIDDEN = 96
_CONSTANT = 2 * _NUM_WORDS
"""Dimension that is 1 for every token; the dimensions of the current token come first, those of the previous
one next."""


def _config(**fields: object) -> HydraConfig:
    return HydraConfig.from_preset(
        "nano",
        **{
            "vocab_size": _NUM_WORDS,
            "hidden_size": _HIDDEN,
            "num_hidden_layers": 2,
            "ssm_head_dim": _HIDDEN,
            "ssm_state_size": _NUM_WORDS,
            "attention_every": 2,
            "attention_num_heads": 1,
            "attention_num_kv_heads": 1,
            "attention_head_dim": _NUM_WORDS,
            "attention_window": 64,
            "moe_layers": [],
            "workspace_layers": [],
            "memory_layers": [],
            **fields,
        },
    )


def copying_model(path: str, seed: int) -> HydraForCausalLM:
    """Two blocks that copy by one path, "ssm" or "attention", built by hand, with a little noise on every weight.

    By the ssm: block 0 stores each token under the one before it (B from the convolution's previous tap) and
        reads under
    the current one, S C = sum of the tokens that followed earlier occurrences. By the attention: the
    convolution of block 0 notes each token's predecessor, and in block 1 the query, the current token, meets
    the keys, the predecessors.
    """
    torch.manual_seed(seed)
    model = HydraForCausalLM(_config()).eval()
    words = torch.eye(_NUM_WORDS)
    first, second = model.model.blocks
    inner, mixer = first.ssm.inner_size, first.ssm
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding[:, :_NUM_WORDS] = words
        embedding[:, _CONSTANT] = 1.0
        mixer.in_proj.weight[:inner, _CONSTANT] = 1.0  # z: the gate is open
        mixer.in_proj.weight[inner : inner + _NUM_WORDS, :_NUM_WORDS] = words  # x: the token
        assert mixer.conv1d.bias is not None
        mixer.conv1d.bias.zero_()
        mixer.A_log.fill_(math.log(1e-3))  # next to no decay
        mixer.dt_bias.fill_(math.log(math.expm1(1.0)))
        if path == "ssm":
            mixer.D.zero_()
            mixer.conv1d.weight[:inner, 0, -1] = 1.0
            start = 2 * inner
            mixer.in_proj.weight[start : start + _NUM_WORDS, :_NUM_WORDS] = words  # B
            mixer.in_proj.weight[start + _NUM_WORDS : start + 2 * _NUM_WORDS, :_NUM_WORDS] = words  # C
            mixer.conv1d.weight[inner : inner + _NUM_WORDS, 0, -2] = 1.0
            mixer.conv1d.weight[inner + _NUM_WORDS : inner + 2 * _NUM_WORDS, 0, -1] = 1.0
            mixer.out_proj.weight[:_NUM_WORDS, :_NUM_WORDS] = words
        else:
            mixer.D.fill_(1.0)
            mixer.conv1d.weight[:inner, 0, -2] = 1.0
            mixer.out_proj.weight[_NUM_WORDS : 2 * _NUM_WORDS, :_NUM_WORDS] = words / math.sqrt(inner)
            reader = second.attention
            reader.q_proj.weight[:, :_NUM_WORDS] = 3.0 * words
            reader.k_proj.weight[:, _NUM_WORDS : 2 * _NUM_WORDS] = words
            reader.v_proj.weight[:, :_NUM_WORDS] = words
            reader.o_proj.weight[:_NUM_WORDS] = 2.0 * words
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    return model


def random_model(seed: int) -> HydraForCausalLM:
    """Two blocks that carry tokens forward by both paths, at random: nothing is matched.

    Output words of their own: where they are the input's, a random model that carries a token forward also raises
    or lowers that very token a little, and the study is right to find it. And so many words that two sequences
    hardly share a pair, since one random model is not quite indifferent to each pair.
    """
    torch.manual_seed(seed)
    model = HydraForCausalLM(
        _config(
            vocab_size=2000, hidden_size=32, ssm_head_dim=16, ssm_state_size=16, tie_word_embeddings=False
        )
    ).eval()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").normal_(std=0.5)
        model.get_parameter("lm_head.weight").normal_(std=0.5)
        for block in model.model.blocks:
            for name, parameter in block.named_parameters():
                if name.endswith(("o_proj.weight", "out_proj.weight")):
                    parameter.normal_(std=0.3)
    return model


def studied(model: HydraForCausalLM, seed: int) -> dict[str, Finding]:
    """The study's findings on random tokens, at the calibration's sample size, by name."""
    cuts = path_cuts(model)
    gains = [
        copy_gain(
            model,
            random_episodes(
                np.arange(model.config.vocab_size),
                num_sequences=_NUM_SEQUENCES,
                distance=distance,
                repeat=16,
                seed=seed,
            ),
            [*cuts, cuts[0] + cuts[1]],
            batch_size=_NUM_SEQUENCES,
        )
        for distance in _DISTANCES
    ]
    return {
        each.name: each for each in corrected(findings(gains, num_resamplings=_NUM_RESAMPLINGS, seed=seed))
    }


def finds_planted(seed: int) -> bool:
    """At every distance the gain is claimed, and the path that copies is claimed to take more of it than the
    other."""
    path, other = (("ssm", "attention"), ("attention", "ssm"))[seed % 2]
    found = studied(copying_model(path, seed), seed)
    return all(
        found[f"random tokens, {distance} apart: gain from the earlier occurrence"].is_claimed()
        and found[_NAME.format(distance=distance, path=path)].is_claimed()
        and found[_NAME.format(distance=distance, path=path)].estimate
        > max(0.5, found[_NAME.format(distance=distance, path=other)].estimate)
        for distance in _DISTANCES
    )


def claims_nothing_there(seed: int) -> bool:
    """Whether anything is claimed of a model that does not copy."""
    return any(each.is_claimed() for each in studied(random_model(seed), seed).values())


CALIBRATION = Calibration(
    planted="copying by the ssm (even seeds) or by the attention (odd seeds), built by hand",
    absent="random models that carry tokens forward but match nothing",
    sample_size=f"{_NUM_SEQUENCES} sequences at {len(_DISTANCES)} distances",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
