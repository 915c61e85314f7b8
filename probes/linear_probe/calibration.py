"""The study on models whose residual stream tells the domain, and on models that know nothing of it."""

from typing import Any

import numpy as np

from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Calibration, Probe, claims_anything, corrected, planted
from probes.linear_probe import run

NUM_SAMPLES = 32
NUM_CHUNKS = 4
SETTINGS: dict[str, Any] = {
    "tasks": ["domain", "position"],
    "every": planted.CHUNK_SIZE,
    "most_features": 32,
    "ridge": 30.0,
    "num_folds": 4,
    "num_permutations": 299,
    "num_controls": 3,
    "batch_size": 32,
}


def finds_planted(seed: int) -> bool:
    """Channel 0 of the embedding tells letters from digits, and the model guesses the next token with it."""
    rng = np.random.default_rng(seed)
    samples = planted.letters_and_digits(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_CHUNKS, purity=0.85)
    model = planted.one_block_model(
        seed, feature=planted.LETTERS, other=planted.DIGITS, moe_chunk_pooling="first"
    )
    told = corrected(run.findings(run.gather(_probe(model, samples, seed), SETTINGS)))
    (domain,) = (finding for finding in told if finding.name == "domain in the residual stream")
    return domain.is_claimed() and domain.causal is not None and domain.causal.is_claimed()


def claims_nothing_there(seed: int) -> bool:
    """Texts differ in what they hold, but their domain is drawn at random, and the model cannot tell where it is."""
    rng = np.random.default_rng(seed)
    samples = planted.texts_of_two_tastes(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_CHUNKS)
    model = planted.taste_model(seed, moe_chunk_pooling="first")
    planted.forget_at_once(model)
    return claims_anything(run.findings(run.gather(_probe(model, samples, seed), SETTINGS)))


def _probe(model: HydraForCausalLM, samples: Samples, seed: int) -> Probe:
    return Probe(model=model, tokenizer=planted.byte_tokenizer(), name="planted", samples=samples, seed=seed)


CALIBRATION = Calibration(
    planted="one direction of the residual stream tells the domain, and the model uses it",
    absent="texts differ, but their domain is drawn at random, and nothing in the model tells the position in a text",
    sample_size=f"{NUM_SAMPLES} samples with {NUM_CHUNKS} observations each, one block; domain and position",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
