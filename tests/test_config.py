"""The configuration: presets, defaults that depend on other fields, and one clear error for every bad field."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hydra_lab.config import HydraConfig
from hydra_lab.presets import PRESETS
from hydra_lab.taps import PATHS

BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
    ({"vocab_size": -5}, "vocab_size=-5 must be at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"ssm_chunk_size": 0}, "ssm_chunk_size=0 must be at least 1"),
    ({"ssm_conv_kernel": 0}, "ssm_conv_kernel=0 must be at least 1"),
    ({"ssm_head_dim": 7}, r"ssm_head_dim=7 must divide ssm_expand \* hidden_size \(64\)"),
    ({"ssm_num_groups": 3}, r"ssm_num_groups=3 must divide the number of ssm heads \(4\)"),
    ({"attention_every": -1}, "attention_every=-1 must be at least 0"),
    ({"attention_window": 0}, "attention_window=0 must be at least 1"),
    ({"attention_block_size": 0}, "attention_block_size=0 must be at least 1"),
    ({"attention_num_selected": -1}, "attention_num_selected=-1 must be at least 0"),
    ({"attention_num_kv_heads": 3}, r"attention_num_kv_heads=3 must divide attention_num_heads \(4\)"),
    ({"attention_selection": "block"}, "attention_selection='block' is not one of .*'token', 'tile'"),
    ({"attention_rope_theta": 100.0, "attention_head_dim": 7}, "attention_head_dim=7 must be even"),
    ({"attention_rope_theta": 0.0}, "attention_rope_theta=0.0 must be above 0"),
    ({"moe_top_k": 5}, "moe_top_k=5 must be at most moe_num_experts=4"),
    ({"moe_chunk_size": 0}, "moe_chunk_size=0 must be at least 1"),
    ({"moe_chunk_pooling": "max"}, "moe_chunk_pooling='max' is not one of"),
    ({"moe_ema_decay": 1.0}, "moe_ema_decay=1.0 must lie between 0 and 1"),
    ({"moe_ema_decay": 0.0}, "moe_ema_decay=0.0 must lie between 0 and 1"),
    ({"moe_load_balance_weight": -0.1}, "moe_load_balance_weight=-0.1 must be at least 0"),
    ({"moe_router_z_weight": -1.0}, "moe_router_z_weight=-1.0 must be at least 0"),
    ({"moe_layers": [4]}, r"moe_layers=\[4\] must be different blocks between 0 and 3"),
    ({"workspace_layers": [-1]}, r"workspace_layers=\[-1\] must be different blocks between 0 and 3"),
    ({"memory_layers": [1, 1]}, r"memory_layers=\[1, 1\] must be different blocks between 0 and 3"),
    ({"workspace_num_slots": 0}, "workspace_num_slots=0 must be at least 1"),
    ({"memory_num_keys": [8]}, r"memory_num_keys=\(8,\) must be two positive counts"),
    ({"memory_num_keys": [8, 0]}, r"memory_num_keys=\(8, 0\) must be two positive counts"),
    ({"memory_top_k": 9}, r"memory_top_k=9 must be at most the smaller of memory_num_keys=\(8, 8\)"),
    ({"memory_value_size": 0}, "memory_value_size=0 must be at least 1"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0"),
    ({"initializer_range": -0.02}, "initializer_range=-0.02 must be at least 0"),
    ({"num_hidden_layer": 3}, "HydraConfig has no field num_hidden_layer"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"moe_layers": [0.5]}, "moe_layers"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[",".join(fields) for fields, _ in BAD])
def test_a_bad_field_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HydraConfig.from_preset("nano", **fields)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="preset 'tiny' is not one of nano, demo, 29m"):
        HydraConfig.from_preset("tiny")


def test_every_field_but_the_ids_says_what_it_is() -> None:
    source = Path(HydraConfig.__module__.replace(".", "/") + ".py")
    lines = (Path(__file__).parents[1] / source).read_text().splitlines()
    own = [
        field.name for field in dataclasses.fields(HydraConfig) if field.name in HydraConfig.__annotations__
    ]
    for name in own:
        if name.endswith("_token_id") or name == "model_type":
            continue
        (line,) = [index for index, text in enumerate(lines) if text.startswith(f"    {name}: ")]
        assert lines[line + 1].strip().startswith('"""'), name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_only_what_exists_and_survive_the_disk(name: str, tmp_path: Path) -> None:
    config = HydraConfig.from_preset(name)
    for field, value in PRESETS[name].items():
        found = getattr(config, field)
        assert list(found) == list(value) if isinstance(value, list) else found == value
    config.save_pretrained(tmp_path)
    loaded = HydraConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert {path: loaded.layers_with(path) for path in PATHS} == {
        path: config.layers_with(path) for path in PATHS
    }


def test_presets_have_every_path() -> None:
    for name in PRESETS:
        config = HydraConfig.from_preset(name)
        assert all(config.layers_with(path) for path in PATHS)


def test_defaults_that_follow_from_other_fields() -> None:
    config = HydraConfig(num_hidden_layers=5, hidden_size=64, memory_layers=None)
    assert config.moe_layers == [0, 2, 4]
    assert config.attention_layers == [2]
    assert config.workspace_layers == config.memory_layers == []
    assert config.memory_value_size == 64
    assert HydraConfig(attention_every=0).attention_layers == []
    assert (config.ssm_inner_size, config.ssm_num_heads) == (128, 2)
    with pytest.raises(ValueError, match="path 'mlp' is not one of ssm, attention, moe, workspace, memory"):
        config.layers_with("mlp")


def test_presets_are_not_changed_by_use() -> None:
    config = HydraConfig.from_preset("nano")
    assert isinstance(config.moe_layers, list)
    config.moe_layers.append(3)
    assert HydraConfig.from_preset("nano").moe_layers == [0, 2]
