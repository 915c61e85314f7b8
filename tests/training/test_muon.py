"""Muon: its orthogonalisation, its agreement with torch's own on plain matrices, and AdamW for the rest."""

import pytest
import torch
from torch import Tensor, nn

from hydra_lab.training.muon import MuonAdamW, orthogonalize


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (3, 24, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    """The iteration's coefficients trade exactness for speed: values lie around 1, not at it."""
    matrices = drawn(*shape) + 0.2
    found = orthogonalize(matrices).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    agreement = torch.nn.functional.cosine_similarity(found.flatten(-2), (left @ right).flatten(-2), dim=-1)
    assert agreement.min() > 0.95


def test_zero_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6, dtype=torch.bfloat16))


def test_stacked_matrices_are_updated_one_by_one() -> None:
    stacked = orthogonalize(drawn(3, 6, 10))
    alone = torch.stack([orthogonalize(matrix) for matrix in drawn(3, 6, 10)])
    torch.testing.assert_close(stacked, alone, rtol=0, atol=1e-2)  # bfloat16 sums in another order


def steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int = 4) -> Tensor:
    for seed in range(count):
        parameter.grad = drawn(*parameter.shape, seed=seed)
        optimizer.step()
    return parameter.detach()


def group(parameter: nn.Parameter, *, muon: bool, decay: float = 0.1) -> list[dict[str, object]]:
    return [{"params": [parameter], "lr": 0.02, "weight_decay": decay, "muon": muon}]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_matrices_follow_torchs_muon(shape: tuple[int, int]) -> None:
    mine, theirs = (nn.Parameter(drawn(*shape)) for _ in range(2))
    found = steps(mine, MuonAdamW(group(mine, muon=True), lr=0.02, betas=(0.9, 0.95), eps=1e-8))
    oracle = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected = steps(theirs, oracle)
    moved = (expected - drawn(*shape)).norm()
    assert moved > 0.1
    # Fifteen products in bfloat16, each with a rounding of 0.4%, summed in another order.
    assert (found - expected).norm() < 0.03 * moved


def test_the_rest_follows_torchs_adamw() -> None:
    mine, theirs = (nn.Parameter(drawn(7, 5)) for _ in range(2))
    found = steps(mine, MuonAdamW(group(mine, muon=False), lr=1.0, betas=(0.9, 0.95), eps=1e-8))
    oracle = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    torch.testing.assert_close(found, steps(theirs, oracle), rtol=1e-6, atol=1e-7)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    parameter = nn.Parameter(drawn(4, 4))
    optimizer = MuonAdamW(group(parameter, muon=True), lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    optimizer.step()
    assert torch.equal(parameter.detach(), drawn(4, 4))
    assert not optimizer.state
