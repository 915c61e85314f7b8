"""The memory path: a product-key memory (Lample et al., arXiv 1907.05242) behind a gate beta."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from hydra_lab.config import HydraConfig
from hydra_lab.nn.layers import OutputProjection
from hydra_lab.ops.product_key import memory_read, product_key_topk
from hydra_lab.taps import Lookup, Tap


class MemoryPath(nn.Module):
    """`beta * out_proj(sum over heads and k of w_k values[address_k])`, `beta = sigmoid(w . h + b)`, b starting at 0.

    Queries are RMS-normalised per half; addresses are the top-k of all n1 * n2 products of half-keys; weights are the
    softmax of their scores. The value table is shared by the heads. The path keeps no state between tokens.
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.num_heads = config.memory_num_heads
        self.key_size = config.memory_key_size
        self.top_k = config.memory_top_k
        self.norm_eps = config.norm_eps
        n1, n2 = config.memory_num_keys
        assert config.memory_value_size is not None
        self.query_proj = nn.Linear(config.hidden_size, self.num_heads * 2 * self.key_size, bias=False)
        self.keys1 = nn.Parameter(torch.empty(self.num_heads, n1, self.key_size))
        self.keys2 = nn.Parameter(torch.empty(self.num_heads, n2, self.key_size))
        self.values = nn.Parameter(torch.empty(n1 * n2, config.memory_value_size))
        self.gate = nn.Linear(config.hidden_size, 1)
        self.out_proj = OutputProjection(config.memory_value_size, config.hidden_size, bias=False)
        self.lookup = Tap()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Keys and values as in Lample et al.; beta at one half everywhere."""
        for keys in (self.keys1, self.keys2):
            init.normal_(keys, std=self.key_size**-0.5)
        init.normal_(self.values, std=self.values.shape[1] ** -0.5)
        init.zeros_(self.gate.weight)
        init.zeros_(self.gate.bias)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        with torch.autocast(hidden_BLD.device.type, enabled=False):
            query = F.linear(hidden_BLD.float(), self.query_proj.weight.float())
            halves = torch.unflatten(query, -1, (self.num_heads, 2, self.key_size))
            query = F.rms_norm(halves, (self.key_size,), None, self.norm_eps).flatten(-2)
            addresses, scores = product_key_topk(
                query, self.keys1.float(), self.keys2.float(), top_k=self.top_k
            )
            gate_BL1 = torch.sigmoid(
                F.linear(hidden_BLD.float(), self.gate.weight.float(), self.gate.bias.float())
            )
        lookup: Lookup = self.lookup(Lookup(addresses, scores.softmax(dim=-1), gate_BL1))
        read = memory_read(lookup.addresses, lookup.weights.to(self.values.dtype), self.values)
        return self.out_proj(read.to(hidden_BLD.dtype)) * lookup.gate.to(hidden_BLD.dtype)
