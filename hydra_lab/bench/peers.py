"""Models of others that ours is measured against, sized to the same total number of parameters."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, PreTrainedConfig

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM

Search = Callable[[int], PreTrainedConfig]

SIZES = {
    "29m": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 8, "mamba_layers": 16},
    "1.6b": {"hidden": 2048, "layers": 24, "heads": 32, "kv_heads": 8, "mamba_layers": 48},
}
"""Widths and depths in which the peers of a preset are built."""


def build(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model of this configuration, tied ones counted once."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def peer_configs(preset: str, device: torch.device) -> tuple[dict[str, PreTrainedConfig], dict[str, str]]:
    """Configurations of Hydra and its peers by name, and the peers that are missing with the reason.

    `hydra` is the preset itself; `transformer` is transformers' Llama with fused attention (SDPA); `mamba2` is
    transformers' Mamba2; `hybrid`, on a GPU, is transformers' Bamba (Mamba-2 with some attention layers). Each has the
    preset's total number of parameters within 2%.

    Raises:
        ValueError: the preset has no peers.
    """
    if preset not in SIZES:
        raise ValueError(f"preset {preset!r} has no peers: choose {', '.join(SIZES)}")
    hydra = HydraConfig.from_preset(preset)
    size = SIZES[preset]
    vocabulary: dict[str, Any] = {
        "vocab_size": hydra.vocab_size, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip

    attention: dict[str, Any] = {"attn_implementation": "sdpa"}

    def llama(width: int) -> PreTrainedConfig:
        return LlamaConfig(
            hidden_size=size["hidden"],
            intermediate_size=16 * width,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            max_position_embeddings=1 << 20,
            **attention,
            **vocabulary,
        )

    def mamba2(width: int) -> PreTrainedConfig:
        hidden = 32 * width
        return Mamba2Config(
            hidden_size=hidden,
            num_hidden_layers=size["mamba_layers"],
            state_size=hydra.ssm_state_size,
            head_dim=hydra.ssm_head_dim,
            num_heads=2 * hidden // hydra.ssm_head_dim,
            expand=2,
            n_groups=1,
            chunk_size=256,
            **vocabulary,
        )

    def hybrid(width: int) -> PreTrainedConfig:
        from transformers import BambaConfig

        return BambaConfig(
            hidden_size=size["hidden"],
            intermediate_size=16 * width,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            attn_layer_indices=[i for i in range(size["layers"]) if i % 4 == 3],
            mamba_n_heads=2 * size["hidden"] // hydra.ssm_head_dim,
            mamba_d_head=hydra.ssm_head_dim,
            mamba_d_state=hydra.ssm_state_size,
            mamba_n_groups=1,
            max_position_embeddings=1 << 20,
            **vocabulary,
        )

    total = num_parameters(hydra)
    configs: dict[str, PreTrainedConfig] = {"hydra": hydra}
    configs["transformer"] = _nearest(llama, total)
    configs["mamba2"] = _nearest(mamba2, total)
    missing: dict[str, str] = {}
    if device.type == "cuda":
        configs["hybrid"] = _nearest(hybrid, total)
        if importlib.util.find_spec("mamba_ssm") is None:
            missing["mamba_ssm"] = "not installed: transformers' Mamba2 and Bamba run their torch paths"
    else:
        missing["hybrid"] = "a peer on a GPU only"
        missing["mamba_ssm"] = "a peer on a GPU only"
    return configs, missing


def _nearest(make: Search, total: int) -> PreTrainedConfig:
    """The width whose model comes nearest to `total` parameters, within 2%; their number grows with the width."""
    low, high = 1, 1
    while num_parameters(make(high)) < total:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_parameters(make(middle)) < total else (low, middle)
    best = min((low, high), key=lambda width: abs(num_parameters(make(width)) - total))
    config = make(best)
    assert abs(num_parameters(config) / total - 1) <= 0.02, (config, total)
    return config


def is_hydra(model: Any) -> bool:
    """Whether `model` is ours."""
    return isinstance(model, HydraForCausalLM)
