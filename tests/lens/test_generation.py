"""Traces of generation: every step is read and written as the same hook by hand does."""

from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor

from hydra_lab.lens import HydraLens
from hydra_lab.taps import Routing

STEPS = 5
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


@pytest.fixture(scope="module")
def prompt(ids: Tensor) -> Tensor:
    return ids[:, :7]


def generate_by_hand(model: Any, prompt: Tensor, force_from: int = 1000) -> tuple[Tensor, list[Routing]]:
    """Tokens, and block 2's routing at every step; from step `force_from` on, every expert is number 1."""
    seen: list[Routing] = []

    def hook(_module: Any, _inputs: Any, decision: Routing) -> Routing:
        if len(seen) >= force_from:
            decision = decision._replace(experts=torch.ones_like(decision.experts))
        seen.append(Routing(*(x.clone() for x in decision)))
        return decision

    handle = model.model.layers[2].moe.routing.register_forward_hook(hook)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)
    handle.remove()
    return tokens, seen


def test_every_step_is_read(model: Any, lens: HydraLens, prompt: Tensor) -> None:
    expected, routings = generate_by_hand(model, prompt)
    with lens.generate(prompt, **OPTIONS) as tracer:
        seen = nnsight.save([])
        for _ in tracer.iter[:STEPS]:
            seen.append(lens.layers[2].moe.routing.output)
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)
    assert [routing.weights.shape[1] for routing in seen] == [7, 1, 1, 1, 1]
    for got, want in zip(seen, routings, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("first", [0, 2])
def test_steps_are_written(model: Any, lens: HydraLens, prompt: Tensor, first: int) -> None:
    expected, routings = generate_by_hand(model, prompt, force_from=first)
    with lens.generate(prompt, **OPTIONS) as tracer:
        seen = nnsight.save([])
        for step in tracer.iter[:STEPS]:
            if step >= first:
                lens.layers[2].moe.experts[:] = 1
            seen.append(lens.layers[2].moe.experts)
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)
    for got, want in zip(seen, routings, strict=True):
        assert torch.equal(got, want.experts)


def test_an_edit_reaches_every_step(model: Any, lens: HydraLens, prompt: Tensor) -> None:
    expected, _ = generate_by_hand(model, prompt, force_from=0)
    with lens.edit() as (tracer, edited):
        for _ in tracer.iter[:STEPS]:
            edited.layers[2].moe.experts[:] = 1
    assert torch.equal(edited.generate(prompt, **OPTIONS), expected)
    assert torch.equal(lens.generate(prompt, **OPTIONS), generate_by_hand(model, prompt)[0])


def test_prompts_of_two_lengths(model: Any, lens: HydraLens, prompt: Tensor) -> None:
    with lens.generate(**OPTIONS) as tracer:
        with tracer.invoke(prompt[:1]):
            first = tracer.result.save()
        with tracer.invoke(prompt[1:, :4]):
            second = tracer.result.save()
    assert torch.equal(first[:, -STEPS:], generate_by_hand(model, prompt[:1])[0][:, -STEPS:])
    assert torch.equal(second[:, -STEPS:], generate_by_hand(model, prompt[1:, :4])[0][:, -STEPS:])


def test_trace_with_a_function(model: Any, lens: HydraLens, prompt: Tensor) -> None:
    with lens.trace(prompt, fn=model.generate, **OPTIONS) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(tokens, generate_by_hand(model, prompt)[0])
