"""The whole model on the Triton backend against the torch backend: logits, loss and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.ops import use_backend
from hydra_lab.ops.backend import Backend, current_backends
from tests.helpers import lively_model, random_ids
from tests.kernels.checking import DEVICE


@pytest.mark.parametrize("selection", ["token", "tile"])
def test_logits_and_gradients_agree(selection: str) -> None:
    """Also under padding, and where a path's state comes from an earlier piece."""
    model: Any = lively_model(attention_selection=selection)
    model = model.to(DEVICE)
    ids = random_ids(model.config, 2, 30).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def results(backend: Backend) -> dict[str, Tensor]:
        model.zero_grad()
        with use_backend(backend):
            assert set(current_backends(ids.float()).values()) == {backend}
            out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
            out.loss.backward()
            with torch.no_grad():
                cache = model(
                    input_ids=ids[:, :21], attention_mask=mask[:, :21], use_cache=True
                ).past_key_values
                rest = model(input_ids=ids[:, 21:], attention_mask=mask, past_key_values=cache).logits
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {
            "logits": out.logits.detach()[mask.bool()],
            "rest": rest,
            "loss": out.loss.detach(),
        } | gradients

    expected, actual = results("torch"), results("triton")
    assert actual.keys() == expected.keys() and len(actual) > 40
    for name, want in expected.items():
        error = (actual[name] - want).abs().max() / want.abs().max().clamp(min=1e-3)
        assert error <= 1e-4, (
            f"{name}: relative error {error:.1e}"
        )  # float32 sums in another order, four blocks deep
