"""A small model on which every path has something to say."""

import pytest
import torch
from torch import Tensor

from hydra_lab.modeling import HydraForCausalLM
from tests.helpers import lively_model, random_ids


@pytest.fixture(scope="package")
def model() -> HydraForCausalLM:
    """Blocks 0 and 2 have 4 experts (two per chunk), 1 and 3 a workspace (5 slots) and attention, 2 a memory (64 rows);
    chunks have 8 tokens, attention blocks 4."""
    model = lively_model(seed=3)
    with torch.no_grad():
        for block in model.model.blocks:
            block.ssm.dt_bias.add_(2.0)  # states that matter
            block.ssm.A_log.sub_(1.5)  # and last
    return model


@pytest.fixture(scope="package")
def ids(model: HydraForCausalLM) -> Tensor:
    """[3, 45]: five whole chunks and a part of one."""
    return random_ids(model.config, 3, 45, seed=1)
