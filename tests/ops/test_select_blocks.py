"""The selection of blocks where all scores at once would take too much memory (test_sparse_attention has the rest)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import hydra_lab.ops.sparse_attention.torch as fast_path
from hydra_lab.ops.sparse_attention import select_blocks

OPTIONS: dict[str, Any] = {"window": 12, "block_size": 8, "num_selected": 3}


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made within the block took at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        q, means = torch.randn(1, length, 2, 4), torch.randn(1, length // 8, 1, 4)
        with LiveMemory() as memory:
            select_blocks(q, means, **OPTIONS)
        return memory.peak

    assert peak(8192) <= 2.2 * peak(4096)


@pytest.mark.parametrize("starts", [None, [0, 130]])
@pytest.mark.parametrize("floats", [1, 100, 1000])
def test_slices_of_any_size_give_the_same_blocks(
    floats: int, starts: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, means = torch.randn(2, 65, 4, 16), torch.randn(2, 25, 2, 16)
    start = None if starts is None else torch.tensor(starts)
    whole = select_blocks(q, means, start=start, **OPTIONS)
    monkeypatch.setattr(fast_path, "_SCORE_FLOATS", floats)
    sliced = select_blocks(q, means, start=start, **OPTIONS)
    assert torch.equal(sliced[0], whole[0])
    torch.testing.assert_close(sliced[1], whole[1], rtol=1e-6, atol=1e-6)
    assert (whole[0] >= 0).any()
