"""The study on models whose experts follow the domain, or something that has nothing to do with it."""

from typing import Any

import numpy as np

from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Calibration, Probe, claims_anything, corrected, planted
from probes.expert_specialization import run

NUM_SAMPLES = 24
NUM_CHUNKS = 4
SETTINGS: dict[str, Any] = {"num_resamplings": 199, "num_controls": 1, "batch_size": 24}


def finds_planted(seed: int) -> bool:
    """Expert 2 serves letters and expert 0 digits; three chunks of four are of the domain's own kind."""
    rng = np.random.default_rng(seed)
    samples = planted.letters_and_digits(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_CHUNKS, purity=0.85)
    model = planted.one_block_model(seed, feature=planted.LETTERS, other=planted.DIGITS)
    planted.tie_experts(model, (2,), (0,))
    evidence = run.gather(_probe(model, samples, seed), SETTINGS)
    (about_domain, _) = corrected(run.findings(evidence))
    assert about_domain.causal is not None
    letters = evidence.association.domains.index("letters")
    preferred = evidence.association.domain_share[0].argmax(axis=-1)
    named_right = preferred[letters] == 2 and preferred[1 - letters] == 0
    return bool(about_domain.is_claimed() and about_domain.causal.is_claimed() and named_right)


def claims_nothing_there(seed: int) -> bool:
    """Experts follow the half of the alphabet that a text has a taste for, which no domain or class shares."""
    rng = np.random.default_rng(seed)
    samples = planted.texts_of_two_tastes(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_CHUNKS)
    model = planted.taste_model(seed)
    planted.tie_experts(model, (2,), (0,))
    return claims_anything(run.findings(run.gather(_probe(model, samples, seed), SETTINGS)))


def _probe(model: HydraForCausalLM, samples: Samples, seed: int) -> Probe:
    return Probe(model=model, tokenizer=planted.byte_tokenizer(), name="planted", samples=samples, seed=seed)


CALIBRATION = Calibration(
    planted="one expert serves one domain and another expert the other, and each makes its domain's tokens likelier",
    absent="the experts follow a feature of the text that has nothing to do with its domain, and texts differ in it",
    sample_size=f"{NUM_SAMPLES} samples of {NUM_CHUNKS} chunks, two domains, one block of four experts",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
