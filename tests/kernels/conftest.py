"""Kernels run on a GPU where there is one, else in Triton's interpreter, and write into poisoned memory."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

IMPORTED_BEFORE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not torch.cuda.is_available():  # read when triton and the kernels' modules are imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In one process with other tests, which may have imported triton without its interpreter, nothing runs here."""
    if IMPORTED_BEFORE and not torch.cuda.is_available():
        alone = pytest.mark.skip(
            reason="triton was imported without its interpreter: run `make test-kernels`"
        )
        for item in items:
            if item.path.parent.name == "kernels":
                item.add_marker(alone)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN (or a wild integer), on every thread: a value that
    nobody wrote shows."""

    def poisoned(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            return tensor.fill_(torch.nan if tensor.is_floating_point() else _wild(tensor.dtype))

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield


def _wild(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 2
