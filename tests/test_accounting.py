"""Accounting against the real thing: built models, torch's FLOP counter, and the bytes of a real cache."""

import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hydra_lab.accounting import (
    COMPONENTS,
    ParameterTable,
    account,
    flops_per_token,
    parameter_table,
    state_bytes,
)
from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.ops.sparse_attention import torch as sparse_attention_torch
from hydra_lab.presets import PRESETS
from hydra_lab.taps import PATHS
from tests.helpers import lively_model, random_ids

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in PRESETS},
    "nano untied": {"tie_word_embeddings": False},
    "nano first": {"moe_chunk_pooling": "first"},
    "nano bare": {"attention_every": 0, "moe_layers": [], "workspace_layers": [], "memory_layers": []},
    "nano odd": {
        "memory_num_keys": [5, 9],
        "memory_value_size": 12,
        "ssm_num_groups": 2,
        "ssm_conv_kernel": 2,
    },
}


def meta_model(variant: str) -> HydraForCausalLM:
    with torch.device("meta"):
        return HydraForCausalLM(HydraConfig.from_preset(variant.split()[0], **VARIANTS[variant]))


def counted(model: HydraForCausalLM) -> dict[tuple[str, int | None], int]:
    """Parameters of a built model by (component, block)."""
    places: dict[tuple[str, int | None], int] = {}
    for name, parameter in model.named_parameters():  # a tied head is named once, as the embedding
        parts = name.split(".")
        block = int(parts[2]) if parts[1] == "layers" else None
        component = parts[3] if parts[1] == "layers" else parts[-2]
        component = {"embed_tokens": "embedding", "lm_head": "head"}.get(component, component)
        places[component, block] = places.get((component, block), 0) + parameter.numel()
    return places


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameter_table_is_the_real_count_in_every_place(variant: str) -> None:
    model = meta_model(variant)
    table = parameter_table(model.config)
    assert table.total == sum(parameter.numel() for parameter in model.parameters())
    assert {(row.component, row.block): row.total for row in table.rows if row.total} == counted(model)


def test_the_sizes_of_the_presets() -> None:
    totals = {name: parameter_table(HydraConfig.from_preset(name)).total for name in ("29m", "1.6b")}
    print(totals)
    assert totals["29m"] == pytest.approx(29e6, rel=0.03)
    assert totals["1.6b"] == pytest.approx(1.60e9, rel=0.02)


def test_active_parameters_by_hand() -> None:
    config = HydraConfig.from_preset("nano")
    rows = {(row.component, row.block): row for row in parameter_table(config).rows}
    expert = 3 * 24 * 32
    assert rows["moe", 0].total - rows["moe", 0].active == (4 - 2) * expert
    assert (
        rows["memory", 2].total - rows["memory", 2].active == (8 * 8 - 2 * 4) * 32
    )  # 2 heads read 4 rows each
    assert rows["embedding", None].active == 32
    assert rows["head", None].active == 97 * 32 and rows["head", None].total == 0
    for component, block in rows:
        if component in ("ssm", "attention", "workspace", "norm", "gates"):
            assert rows[component, block].active == rows[component, block].total


def test_a_memory_smaller_than_what_its_heads_read_is_not_counted_twice() -> None:
    config = HydraConfig.from_preset("nano", memory_num_keys=[2, 2], memory_top_k=2, memory_num_heads=4)
    (row,) = [row for row in parameter_table(config).rows if row.component == "memory"]
    assert row.active == row.total


# --- FLOPs ---


def _in_place_baddbmm(_c: object, a: list[int], b: list[int], *, out_shape: object = None) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def measured_flops(model: HydraForCausalLM, run: Callable[[], object]) -> dict[str, int]:
    """FLOPs by component, by torch's counter; it does not know the in-place `baddbmm_`, which is registered here."""
    mapping = {torch.ops.aten.baddbmm_: _in_place_baddbmm}
    with torch.no_grad(), FlopCounterMode(display=False, depth=9, custom_mapping=mapping) as counter:
        run()
    found: dict[str, int] = {}
    for place, flops in counter.get_flop_counts().items():
        parts = place.split(".")
        component = "head" if parts[-1] == "lm_head" else parts[-1]
        if len(parts) in (2, 5) and (component in PATHS or component == "head"):
            found[component] = found.get(component, 0) + sum(flops.values())
    assert sum(found.values()) == counter.get_total_flops()
    return found


@pytest.fixture
def one_query_per_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of the blocks part that have no empty places."""
    monkeypatch.setattr(sparse_attention_torch, "_PAIR_TILE", 1)
    yield


NANO = [{}, {"attention_selection": "tile"}, {"moe_chunk_pooling": "first", "ssm_num_groups": 2}]


@pytest.mark.parametrize("fields", NANO, ids=["token", "tile", "first"])
@pytest.mark.parametrize("length", [1, 33, 211])
@pytest.mark.usefixtures("one_query_per_tile")
def test_prefill_flops_are_those_that_torch_counts(length: int, fields: dict[str, Any]) -> None:
    model = lively_model(**fields)
    ids = random_ids(model.config, 1, length)
    measured = measured_flops(model, lambda: model(ids, use_cache=False))
    table = flops_per_token(model.config, length)
    total = table.prefill * length / sum(measured.values()) - 1
    print(f"length {length}: {sum(measured.values()):,} FLOPs, accounting off by {total:+.4%}")
    assert abs(total) < 0.02
    for component, (prefill, _) in table.by_component().items():
        assert prefill * length == pytest.approx(measured[component], rel=1e-9), component


@pytest.mark.parametrize("fields", NANO, ids=["token", "tile", "first"])
def test_the_padding_of_the_block_tiles_is_all_that_is_left_out(fields: dict[str, Any]) -> None:
    model = lively_model(**fields)
    for length in (64, 256):
        ids = random_ids(model.config, 1, length)
        measured = measured_flops(model, lambda ids=ids: model(ids, use_cache=False))
        share = 1 - flops_per_token(model.config, length).prefill * length / sum(measured.values())
        print(f"length {length}: {share:.2%} of all FLOPs go into empty places of tiles")
        assert 0 <= share < 0.08


@pytest.mark.parametrize("fields", NANO, ids=["token", "tile", "first"])
@pytest.mark.parametrize("length", [2, 34, 65])
def test_decode_flops_are_those_that_torch_counts(length: int, fields: dict[str, Any]) -> None:
    model = lively_model(**fields)
    ids = random_ids(model.config, 1, length)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    measured = measured_flops(model, lambda: model(ids[:, -1:], past_key_values=cache))
    block = model.config.attention_block_size
    exact_capacity = (length - 1) % block != 0  # else the cache has just doubled, and more means are scored
    for component, (_, decode) in flops_per_token(model.config, length).by_component().items():
        if component != "attention" or exact_capacity:
            assert decode == pytest.approx(measured[component], rel=1e-9), component


def test_decode_is_constant_but_for_the_attention_path() -> None:
    config = HydraConfig.from_preset("1.6b")
    short, long = (flops_per_token(config, length).by_component() for length in (4096, 65536))
    for component in short:
        if component != "attention":
            assert short[component][1] == long[component][1]
    growth = long["attention"][1] - short["attention"][1]
    means = (65536 - 4096) // config.attention_block_size
    width = config.attention_num_kv_heads * config.attention_head_dim
    assert growth == len(config.attention_layers) * 2 * means * width


def test_prefill_at_a_size_computed_by_hand() -> None:
    config = HydraConfig.from_preset(
        "nano", num_hidden_layers=1, attention_every=0, moe_layers=[0], workspace_layers=[], memory_layers=[0]
    )
    by_component = flops_per_token(config, 16).by_component()
    # 2 chunks of 8: routers 4 x 64 per chunk and 4 x 32 per token, 2 experts of 3 x 24 x 32, chunk averages 2 x 2 x 32
    assert by_component["moe"][0] * 16 == 2 * (2 * 4 * 64 + 16 * 4 * 32 + 16 * 2 * 3 * 24 * 32 + 2 * 2 * 32)
    # queries 32 x 2 x 2 x 8, 8 + 8 half-keys of 8 in 2 heads, gate 32, output 32 x 32
    assert by_component["memory"][0] == 2 * (32 * 32 + 2 * 16 * 8 + 32 + 32 * 32)
    assert by_component["head"] == (2 * 97 * 32, 2 * 97 * 32)


# --- state ---


@pytest.mark.parametrize("fields", [{}, {"attention_selection": "tile", "moe_top_k": 3, "ssm_num_groups": 2}])
@pytest.mark.parametrize("length", [1, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_those_of_a_real_cache(
    length: int, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = lively_model(**fields)
    cast(nn.Module, model).to(dtype)
    with torch.no_grad():
        cache = model(random_ids(model.config, 2, length), use_cache=True).past_key_values
    assert 2 * state_bytes(model.config, length, dtype).num_bytes == cache.num_bytes()


def test_only_the_attention_state_grows() -> None:
    config = HydraConfig.from_preset("1.6b")
    short, long = (state_bytes(config, length, torch.bfloat16).by_component() for length in (4096, 65536))
    assert long["attention"] / short["attention"] == pytest.approx(16, rel=0.01)
    assert {name: short[name] for name in short if name != "attention"} == {
        name: long[name] for name in long if name != "attention"
    }
    assert "memory" not in short


# --- what readers get ---


def test_every_view_adds_up_and_is_json() -> None:
    config = HydraConfig.from_preset("demo")
    result = account(config, (1, 300))
    table: ParameterTable = result.parameters
    assert sum(total for total, _ in table.by_component().values()) == table.total
    assert sum(total for total, _ in table.by_block().values()) == table.total
    assert list(table.by_component()) == [name for name in COMPONENTS if name in table.by_component()]
    for flops in result.flops:
        assert sum(prefill for prefill, _ in flops.by_block().values()) == pytest.approx(flops.prefill)
        assert sum(decode for _, decode in flops.by_component().values()) == pytest.approx(flops.decode)
    for state in result.state:
        assert sum(state.by_block().values()) == sum(state.by_component().values()) == state.num_bytes
    plain = result.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["parameters"]["total"] == table.total
    assert [entry["context_length"] for entry in plain["flops_per_token"]] == [1, 300]


def test_a_context_needs_a_token() -> None:
    config = HydraConfig.from_preset("nano")
    with pytest.raises(ValueError, match="context_length=0 must be at least 1"):
        flops_per_token(config, 0)
    with pytest.raises(ValueError, match="context_length=-1 must be at least 1"):
        state_bytes(config, -1)
