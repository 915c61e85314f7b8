"""How near each backend of an operation comes to its reference: the values, and the gradients of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_lab.bench.contests import Arena, Contest, Contestant
from hydra_lab.config import HydraConfig
from hydra_lab.ops.backend import BACKENDS

LENGTH = 300
"""Tokens: several chunks and blocks, the last of them broken off."""


@dataclass(frozen=True)
class Agreement:
    """The largest error of one backend, over the largest value of the reference's tensor.

    Attributes:
        operation, backend: which.
        output: error of what it returns.
        gradient: the largest error of its gradients, those of a random combination of the output towards every float
            input; None where the operation has none.
    """

    operation: str
    backend: str
    output: float
    gradient: float | None


def measure_agreement(
    config: HydraConfig, *, device: torch.device, dtype: torch.dtype, length: int = LENGTH, seed: int = 0
) -> Iterator[Agreement]:
    """Every backend that can run here, operation by operation, at the sizes of `config`, against its reference in the
    same precision.

    Args:
        length: tokens.
        seed: of the inputs.
    """
    for contest in Arena(config, length, device, dtype, seed).all():
        yield from agreements(contest)


def agreements(contest: Contest) -> Iterator[Agreement]:
    """The backends of one operation against its reference; peers, whose maths may differ, are left out."""
    reference = contest.contestants.get("reference")
    if reference is None:
        return
    expected = _values_and_gradients(reference)
    for backend, contestant in contest.contestants.items():
        if backend == "reference" or backend not in BACKENDS:
            continue
        errors = [
            _error(got, want) for got, want in zip(_values_and_gradients(contestant), expected, strict=True)
        ]
        yield Agreement(contest.operation, backend, errors[0], max(errors[1:], default=None))


def _values_and_gradients(contestant: Contestant) -> list[Tensor]:
    if not contestant.leaves:
        with torch.no_grad():
            return [contestant.run()]
    output = contestant.run()
    generator = torch.Generator(output.device).manual_seed(1)
    factor = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    gradients = torch.autograd.grad(output, contestant.leaves, factor)
    return [output.detach(), *gradients]


def _error(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest finite value wanted; infinities (scores of what is not seen) must be equal."""
    got, want = got.double(), want.double()
    largest = want.nan_to_num(posinf=0, neginf=0).abs().amax().clamp(min=1e-30)
    return float((got - want).masked_fill(got == want, 0.0).abs().amax() / largest)
