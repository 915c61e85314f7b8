"""A token on the Triton backend: the same as on the torch backend, and nothing that waits for the device."""

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_lab.decoding import DecodeGraph, StaticStep
from hydra_lab.ops import use_backend
from tests.helpers import lively_model, random_ids
from tests.kernels.checking import DEVICE

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "equal")
"""What a captured graph cannot hold: operations whose result Python looks at, or whose shape depends on values."""


class NothingWaits(TorchDispatchMode):
    """Raises where an operation would make Python wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS and not _checks_arguments():
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _checks_arguments() -> bool:
    """Whether an operation checks its arguments' values, as it does on a CPU only (`assert_on_device` elsewhere)."""
    return any(frame.name in ("_check_values", "_check_reach") for frame in traceback.extract_stack())


def test_steps_agree_with_the_torch_backend_and_wait_for_nothing() -> None:
    model: Any = lively_model()
    model = model.to(DEVICE)
    ids = random_ids(model.config, 2, 22).to(DEVICE)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 18:]
        cache = model(input_ids=ids[:, :18], use_cache=True).past_key_values
    step = StaticStep(model, cache, room=4)
    for t in range(4):
        step.input_ids.copy_(ids[:, 18 + t : 19 + t])
        with use_backend("triton"), NothingWaits():
            step.run()
        assert (step.logits[:, 0] - expected[:, t]).abs().max() <= 1e-4


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_graph_gives_the_same_logits() -> None:
    model: Any = lively_model()
    model = model.to(DEVICE)
    ids = random_ids(model.config, 2, 60).to(DEVICE)
    with torch.no_grad(), use_backend("triton"):
        expected = model(input_ids=ids).logits[:, 20:]
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        graph = DecodeGraph(model, cache, room=40)
    for t in range(40):
        assert (graph.step(ids[:, 20 + t : 21 + t])[:, 0] - expected[:, t]).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="no room is left"):
        graph.step(ids[:, :1])
